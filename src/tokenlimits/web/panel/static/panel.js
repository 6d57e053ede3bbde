// Dialogs, toasts, countdowns. The content of pages comes from the server, through htmx.
import { startLive } from "./live.js";

const modal = document.getElementById("modal");
const dialog = document.getElementById("dialog"); // what is in it
const toasts = document.getElementById("toasts");
let opener = null;

// into the last open dialog: everything outside it is inert, and screen readers would not announce it
function raiseToasts() {
  const place = [...document.querySelectorAll("dialog[open]")].at(-1) ?? document.body;
  if (toasts.parentElement !== place) place.append(toasts);
  if (toasts.childElementCount && !toasts.matches(":popover-open")) toasts.showPopover();
}

export function toast(message, bad = false) {
  const element = document.createElement("div");
  element.className = bad ? "toast bad" : "toast";
  if (bad) element.setAttribute("role", "alert");
  element.textContent = message;
  toasts.append(element);
  raiseToasts();
  setTimeout(() => element.remove(), bad ? 8000 : 4000);
}

// dialogs: they open while loading, and close with the button, Escape or a click outside
document.body.addEventListener("htmx:beforeRequest", (event) => {
  if (event.detail.target !== dialog || dialog.contains(event.detail.elt)) return;
  opener = event.detail.elt;
  dialog.innerHTML = '<div class="loading" aria-label="Loading"><i></i><i></i><i></i></div>';
  if (!modal.open) modal.showModal();
  raiseToasts();
});
document.body.addEventListener("click", (event) => {
  if (event.target === modal || event.target.closest("[data-close]")) leave();
});
modal.addEventListener("cancel", (event) => {
  if (event.target !== modal || !edited()) return;
  event.preventDefault();
  leave();
});
modal.addEventListener("close", () => {
  delete dialog.dataset.edited;
  raiseToasts();
  dialog.replaceChildren();
  if (opener?.isConnected) opener.focus();
});

// confirmation before an action
const confirmation = document.getElementById("confirm");
function ask(title, words, yes, act) {
  document.getElementById("confirm-title").textContent = title;
  document.getElementById("confirm-words").textContent = words;
  document.getElementById("confirm-yes").textContent = yes;
  confirmation.returnValue = "no";
  confirmation.showModal();
  raiseToasts();
  confirmation.addEventListener(
    "close",
    () => {
      raiseToasts();
      if (confirmation.returnValue === "yes") act();
    },
    { once: true },
  );
}
document.body.addEventListener("htmx:confirm", (event) => {
  if (!event.detail.question) return;
  event.preventDefault();
  const { title, yes, ifEdited } = event.detail.elt.dataset;
  if (ifEdited !== undefined && !edited()) return event.detail.issueRequest(true);
  ask(title, event.detail.question, yes, () => event.detail.issueRequest(true));
});

// what was typed into a form is not lost by a slip: closing asks, and a session that has ended brings it back
const DRAFT = "tokenlimits-draft";
const edited = () => dialog.dataset.edited === "yes" && dialog.querySelector("form[data-draft]");
function leave() {
  if (!edited()) return modal.close();
  ask("Discard your changes?", "What you typed is not saved.", "Discard", () => modal.close());
}
function markEdited(event) {
  if (event.target.closest("form[data-draft]")) dialog.dataset.edited = "yes";
}
dialog.addEventListener("input", markEdited);
window.addEventListener("beforeunload", (event) => {
  if (edited()) event.preventDefault();
});
function keepDraft() {
  const form = edited();
  if (!form) return;
  const values = {};
  for (const [name, value] of new FormData(form)) values[name] = [...(values[name] ?? []), value];
  sessionStorage.setItem(DRAFT, JSON.stringify({ url: form.getAttribute("hx-post"), values }));
  delete dialog.dataset.edited;
}
function startAnew() {
  keepDraft();
  location.reload();
}
async function bringDraftBack() {
  const draft = JSON.parse(sessionStorage.getItem(DRAFT));
  if (!draft || !dialog) return;
  sessionStorage.removeItem(DRAFT);
  await htmx.ajax("POST", draft.url, {
    source: document.body,
    target: dialog,
    values: { ...draft.values, draft: "yes" },
  });
  dialog.dataset.edited = "yes";
  toast("Your changes are back. They are not saved yet.");
}

// the server's answers: success, or why not
document.body.addEventListener("done", (event) => {
  if (!event.detail.stay) modal.close();
  toast(event.detail.message);
  for (const element of document.querySelectorAll("[data-live], [data-refresh]")) htmx.trigger(element, "refresh");
});
document.body.addEventListener("go", (event) => location.assign(event.detail.to));
document.body.addEventListener("htmx:responseError", (event) => {
  const { status, responseText } = event.detail.xhr;
  if (status === 401 || event.detail.xhr.getResponseHeader("X-Stale-Page")) return startAnew();
  if (modal.open && !dialog.querySelector("form, [data-close]")) modal.close();
  toast(responseText.length < 500 ? responseText : "Something went wrong.", true);
});
document.body.addEventListener("htmx:sendError", () => {
  if (modal.open && !dialog.querySelector("form, [data-close]")) modal.close();
  toast("The server can't be reached. Nothing was changed.", true);
});
document.body.addEventListener("htmx:afterSettle", (event) => {
  if (event.detail.target === dialog || dialog.contains(event.detail.target)) {
    // a limit's sentence comes while somebody types
    if (event.detail.target === dialog) dialog.querySelector("[aria-invalid=true]")?.focus();
    showWhatCanBeDone();
  }
  tick();
});

// what somebody opened or closed stays so when the cards are loaded again
const opened = new Map();
document.body.addEventListener(
  "click",
  (event) => {
    const details = event.target.closest("summary")?.parentElement;
    if (details?.id) opened.set(details.id, !details.open);
  },
  true,
);
document.body.addEventListener("htmx:afterSwap", () => {
  for (const [id, isOpen] of opened) document.getElementById(id)?.toggleAttribute("open", isOpen);
});

// a button is disabled until everything it needs is selected or typed
function showWhatCanBeDone() {
  for (const button of dialog.querySelectorAll("[data-needs]")) {
    const given = new FormData(button.form);
    button.disabled = !button.dataset.needs.split(" ").every((name) => given.get(name));
  }
}
dialog.addEventListener("input", showWhatCanBeDone);

// Enter in a search field searches, without submitting the selection
document.body.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("dialog input[type=search]")) event.preventDefault();
});

// the limits editor
document.body.addEventListener("click", (event) => {
  const add = event.target.closest("[data-add-limit]");
  if (add) {
    const row = document.getElementById("limit-row").content.cloneNode(true);
    const kind = row.querySelector("input");
    document.querySelector(".limit-rows").append(row);
    htmx.process(kind.closest(".limit-row"));
    kind.focus();
    markEdited(event);
  }
  const remove = event.target.closest("[data-remove-limit]");
  if (remove) {
    markEdited(event);
    remove.closest(".limit-row").remove();
    document.querySelector("[data-add-limit]").focus();
  }
});
// before htmx asks for the row's sentence: a tick is sent as the hidden field beside it
dialog?.addEventListener(
  "change",
  (event) => {
    const row = event.target.closest(".limit-row");
    if (!row) return;
    const { sets, yes, no } = event.target.dataset;
    if (sets) row.querySelector(`[name=${sets}]`).value = event.target.checked ? yes : no;
    keep(row.querySelector("[name=max]"), row.querySelector("[name=unlimited]").value === "yes", "");
    const unit = row.querySelector("[name=unit]").value;
    keep(row.querySelector("[name=number]"), ["year", "lifetime", "in_flight"].includes(unit), "1");
    // what is in progress now has no beginning
    const starts = row.querySelector("[name=starts]");
    starts.hidden = unit === "in_flight";
    if (starts.hidden) starts.value = "calendar";
  },
  true,
);
function keep(field, isFixed, value) {
  field.readOnly = isFixed;
  if (isFixed) field.value = value;
}

// countdowns and moments, all in one time zone: the group's on its page, else the reader's
const zone = known(document.querySelector("[data-zone]")?.dataset.zone);
const inFull = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "long", timeZone: zone });
const ofMinute = { month: "short", day: "numeric", hour: "numeric", minute: "2-digit", timeZone: zone };
const inShort = new Intl.DateTimeFormat(undefined, ofMinute);
const withYear = new Intl.DateTimeFormat(undefined, { ...ofMinute, year: "numeric" });
for (const element of document.querySelectorAll("[data-zone-name]")) element.textContent = zone;

// the database may know more time zones than this browser, as _charts.py has it of the server
function known(name) {
  try {
    const { timeZone } = new Intl.DateTimeFormat(undefined, { timeZone: name }).resolvedOptions();
    return name ?? timeZone;
  } catch {
    return "UTC";
  }
}

function inWords(milliseconds) {
  const seconds = Math.max(0, Math.ceil(milliseconds / 1000));
  const [days, hours, minutes] = [
    Math.floor(seconds / 86400),
    Math.floor(seconds / 3600) % 24,
    Math.floor(seconds / 60) % 60,
  ];
  const two = (number) => String(number).padStart(2, "0");
  if (days) return `${days}d ${hours}h`;
  if (hours) return `${hours}h ${two(minutes)}m ${two(seconds % 60)}s`;
  return minutes ? `${minutes}m ${two(seconds % 60)}s` : `${seconds}s`;
}
function written(moment) {
  return (moment.getFullYear() === new Date().getFullYear() ? inShort : withYear).format(moment);
}
function showMoment(element) {
  if (element.dataset.shown === element.dateTime) return;
  const moment = new Date(element.dateTime);
  element.dataset.shown = element.dateTime;
  element.dataset.words = written(moment);
  element.title = `${inFull.format(moment)} (${zone})`;
  if (!("countdown" in element.dataset)) element.textContent = element.dataset.words;
}
function tick() {
  const now = Date.now();
  for (const element of document.querySelectorAll("time[data-moment], time[data-countdown]:not([hidden])"))
    showMoment(element);
  for (const element of document.querySelectorAll("time[data-countdown]:not([hidden])")) {
    const words = `${element.dataset.countdown} in ${inWords(Date.parse(element.dateTime) - now)} · ${element.dataset.words}`;
    if (element.textContent !== words) element.textContent = words;
  }
}
tick();
setInterval(() => document.hidden || tick(), 1000);

// a page that could not be shown reloads itself
const reload = document.querySelector("[data-reload]");
if (reload) {
  let left = Number(reload.dataset.reload);
  setInterval(() => {
    if (--left === 0) location.reload();
    else if (left > 0) reload.querySelector("[data-seconds]").textContent = left;
  }, 1000);
}

startLive(startAnew);
if (document.querySelector("[data-signed-in]")) bringDraftBack();
