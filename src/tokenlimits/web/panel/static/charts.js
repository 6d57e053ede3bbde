// The history as a chart (Chart.js), and the same numbers as a table.
const COLOURS = {
  dark: ["#34d399", "#38bdf8", "#a78bfa", "#fbbf24", "#fb7185", "#2dd4bf"],
  light: ["#059669", "#0284c7", "#7c3aed", "#d97706", "#e11d48", "#0d9488"],
};
const numbers = new Intl.NumberFormat("en-US");
const compact = new Intl.NumberFormat("en-US", { notation: "compact" });
const place = document.querySelector("[data-chart]");
const words = place.querySelector(".chart-words");
let drawn = null;
let shown = null;

const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw({ labels, kinds }) {
  drawn?.destroy();
  const colours = COLOURS[document.documentElement.dataset.theme];
  Chart.defaults.font.family = "Inter, sans-serif";
  Chart.defaults.color = variable("--muted");
  const grid = { color: variable("--line"), drawTicks: false };
  drawn = new Chart(place.querySelector("canvas"), {
    type: "bar",
    data: {
      labels,
      datasets: kinds.map(({ kind, used }, index) => ({
        label: kind,
        data: used,
        backgroundColor: colours[index % colours.length],
        borderRadius: 3,
        maxBarThickness: 34,
      })),
    },
    options: {
      animation: matchMedia("(prefers-reduced-motion: reduce), print").matches ? false : { duration: 300 },
      animations: { numbers: { type: "number", properties: ["y", "base"] } }, // bars grow from the axis, without flying in from a corner
      maintainAspectRatio: false,
      interaction: { mode: "index", intersect: false },
      scales: {
        x: {
          stacked: true,
          grid: { display: false },
          border: { color: variable("--line") },
          ticks: { maxRotation: 0, autoSkipPadding: 18 },
        },
        y: {
          stacked: true,
          grid,
          border: { display: false },
          beginAtZero: true,
          ticks: { padding: 8, maxTicksLimit: 6, callback: (value) => compact.format(value) },
        },
      },
      plugins: {
        legend: {
          position: "bottom",
          align: "start",
          labels: { usePointStyle: true, pointStyle: "circle", boxHeight: 7, padding: 18, color: variable("--text") },
        },
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
const now = () => document.querySelector("[data-step][aria-pressed=true]").dataset.step;
document.addEventListener("theme", () => shown && draw(shown));
document.body.addEventListener("done", () => load(now()));
document.body.addEventListener("click", (event) => {
  if (!event.target.closest("[data-look-again]")) return;
  load(now());
  for (const element of document.querySelectorAll("[data-refresh]")) htmx.trigger(element, "refresh");
});
load("day");
