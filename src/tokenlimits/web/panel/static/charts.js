// The history as a chart (Chart.js), and the same numbers as a table.
const COLOURS = {
  dark: ["#34d399", "#38bdf8", "#a78bfa", "#fbbf24", "#fb7185", "#2dd4bf"],
  light: ["#059669", "#0284c7", "#7c3aed", "#d97706", "#e11d48", "#0d9488"],
};
const numbers = new Intl.NumberFormat("en-US");
const compact = new Intl.NumberFormat("en-US", { notation: "compact" });
const place = document.querySelector("[data-chart]");
const choice = document.querySelector("[data-kind]");
const words = place.querySelector(".chart-words");
const note = document.querySelector("[data-chart-note]");
let drawn = null;
let shown = null;

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// units of different kinds have no common axis
function draw({ labels, kinds }) {
  drawn?.destroy();
  const index = Math.max(kindOf(kinds), 0);
  const { kind, used } = kinds[index] ?? { kind: "", used: [] };
  const colours = COLOURS[document.documentElement.dataset.theme];
  Chart.defaults.font.family = "Inter, sans-serif";
  Chart.defaults.color = variable("--muted");
  const grid = { color: variable("--line"), drawTicks: false };
  drawn = new Chart(place.querySelector("canvas"), {
    type: "bar",
    data: {
      labels,
      datasets: [
        {
          label: kind,
          data: used,
          backgroundColor: colours[index % colours.length],
          borderRadius: 3,
          maxBarThickness: 34,
        },
      ],
    },
    options: {
      animation: matchMedia("(prefers-reduced-motion: reduce), print").matches ? false : { duration: 300 },
      animations: { numbers: { type: "number", properties: ["y", "base"] } }, // bars grow from the axis, without flying in from a corner
      maintainAspectRatio: false,
      interaction: { mode: "index", intersect: false },
      scales: {
        x: {
          grid: { display: false },
          border: { color: variable("--line") },
          ticks: { maxRotation: 0, autoSkipPadding: 18 },
        },
        y: {
          grid,
          border: { display: false },
          beginAtZero: true,
          ticks: { padding: 8, maxTicksLimit: 6, callback: short },
        },
      },
      plugins: {
        legend: { display: false },
        tooltip: {
          backgroundColor: variable("--raised"),
          titleColor: variable("--text"),
          bodyColor: variable("--text"),
          borderColor: variable("--line-strong"),
          borderWidth: 1,
          padding: 12,
          cornerRadius: 10,
          usePointStyle: true,
          boxPadding: 6,
          filter: (item) => item.raw > 0,
        },
      },
    },
  });
}

// as `short` in _format.py
function short(value) {
  if (value < 1e15) return compact.format(value);
  const [digits, power] = value.toExponential(1).split("e+");
  return `${digits.replace(".0", "")}×10${[...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
}

const kindOf = (kinds) => kinds.findIndex(({ kind }) => kind === choice.value);

function offer(kinds) {
  const options = kinds.map(({ kind }) => new Option(kind, kind, false, kind === choice.value));
  choice.replaceChildren(...options);
  choice.hidden = !options.length;
}

function tabulate({ labels, kinds }) {
  const table = document.querySelector("[data-chart-table]");
  const row = (cells, tag) => {
    const tr = document.createElement("tr");
    cells.forEach((text, index) => {
      const cell = document.createElement(tag);
      if (index) cell.className = "num";
      cell.textContent = text;
      tr.append(cell);
    });
    return tr;
  };
  const rows = labels.map((label, index) => [label, ...kinds.map(({ used }) => used[index])]);
  const filled = rows.filter((cells) => cells.slice(1).some((used) => used > 0)).reverse();
  table.replaceChildren(
    row(["When", ...kinds.map(({ kind }) => kind)], "th"),
    ...filled.map(([label, ...used]) => row([label, ...used.map((value) => numbers.format(value))], "td")),
  );
}

function say(text) {
  words.textContent = text;
  words.hidden = !text;
  place.querySelector("canvas").hidden = Boolean(text);
}

async function load(step) {
  place.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch(`${place.dataset.chart}?step=${step}`, { headers: { "HX-Request": "true" } });
    if (!answer.ok) throw new Error(String(answer.status));
    shown = await answer.json();
    say(shown.kinds.length ? "" : "There was no usage in this time.");
    note.textContent = shown.note ?? "";
    note.hidden = !shown.note;
    offer(shown.kinds);
    tabulate(shown);
    draw(shown);
  } catch {
    say("The history can't be loaded now. Select a step to try again.");
  }
  place.removeAttribute("aria-busy");
}

const steps = document.querySelectorAll("[data-step]");
for (const button of steps) {
  button.addEventListener("click", () => {
    for (const other of steps) other.setAttribute("aria-pressed", String(other === button));
    load(button.dataset.step);
  });
}
choice.addEventListener("change", () => draw(shown));
const now = () => document.querySelector("[data-step][aria-pressed=true]").dataset.step;
document.addEventListener("theme", () => shown && draw(shown));
document.body.addEventListener("done", () => load(now()));
document.body.addEventListener("click", (event) => {
  if (!event.target.closest("[data-look-again]")) return;
  load(now());
  for (const element of document.querySelectorAll("[data-refresh]")) htmx.trigger(element, "refresh");
});
load("day");
