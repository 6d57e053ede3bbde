// Polls for changes every second while the page is visible, and writes only what differs.
const root = document.querySelector("meta[name=root]").content;
const EVERY = 1000;
const numbers = new Intl.NumberFormat("en-US");
let version = "";
let signedOut;
let timer = 0;

function write(element, text) {
  if (!element || element.textContent === text) return;
  element.textContent = text;
  element.classList.remove("flash");
  void element.offsetWidth; // forces a reflow, without which the animation would not start again
  element.classList.add("flash");
}

function setLevel(element, name) {
  element.classList.remove("is-none", "is-ok", "is-warn", "is-full");
  element.classList.add(`is-${name}`);
}

function showLimit(row, [level, bar, used, left, resetAt]) {
  setLevel(row, level);
  write(row.querySelector("[data-used]"), used);
  write(row.querySelector("[data-left]"), left);
  const meter = row.querySelector("progress");
  if (meter && bar) {
    [meter.value, meter.max] = bar;
    meter.textContent = used;
  }
  const time = row.querySelector("time");
  if (resetAt) time.dateTime = resetAt;
  time.hidden = !resetAt;
  row.querySelector("[data-never]").hidden = Boolean(resetAt);
}

function showGroup(card, [members, level, limits, beneath]) {
  const count = card.querySelector("[data-members]");
  if (count) {
    write(count, numbers.format(members));
    card.querySelector("[data-word]").textContent = members === 1 ? "member" : "members";
  }
  const rows = card.querySelectorAll("[data-limit]");
  for (const [index, limit] of limits.entries()) {
    if (rows[index]) showLimit(rows[index], limit);
  }
  if (card.classList.contains("card")) setLevel(card, level);
  write(document.querySelector(`#beneath-${card.dataset.group} [data-beneath]`), beneath);
}

function show(answer, place) {
  for (const [name, value] of Object.entries(answer.summary)) {
    const number = document.querySelector(`[data-stat=${name}]`);
    write(number, numbers.format(value));
    const words = number?.nextElementSibling;
    if (words?.dataset.noun) words.textContent = value === 1 ? words.dataset.noun : `${words.dataset.noun}s`;
  }
  if (answer.shape !== place.dataset.shape) return htmx.trigger(place, "refresh");
  for (const card of place.querySelectorAll("[data-group]")) {
    const group = answer.groups[card.dataset.group];
    if (group) showGroup(card, group);
  }
}

function say(answered) {
  // the answer may arrive after the tab was hidden
  const state = document.hidden ? "paused" : answered;
  document.getElementById("away").hidden = state !== "away";
  document.getElementById("live-dot")?.classList.toggle("paused", state !== "live");
  const text = document.getElementById("live-text");
  if (text) text.textContent = { live: "Live", away: "Retrying…", paused: "Paused" }[state];
}

async function ask(place) {
  const address = `${root}${place.dataset.live || "/live"}?version=${version}`;
  const answer = await fetch(address, { headers: { "HX-Request": "true" } });
  if (answer.status === 401 || answer.status === 403) return signedOut();
  if (answer.status === 204) return say("live");
  if (!answer.ok) return say("away");
  const content = await answer.json();
  version = content.version;
  show(content, place);
  say("live");
}

async function look() {
  clearTimeout(timer);
  const place = document.querySelector("[data-live]");
  if (!place || document.hidden) return;
  try {
    await ask(place);
  } catch {
    say("away");
  }
  clearTimeout(timer);
  timer = setTimeout(look, EVERY);
}

export function startLive(whenSignedOut) {
  signedOut = whenSignedOut;
  if (!document.querySelector("[data-live]")) return;
  document.addEventListener("visibilitychange", () => (document.hidden ? say("paused") : look()));
  // the cards were loaded again: compare all of them with the next answer
  document.body.addEventListener("htmx:afterSwap", (event) => {
    if (event.detail.target.matches?.("[data-live]")) version = "";
  });
  look();
}
