// In the head, before anything is shown: the theme that was chosen last, else the system's. Paper is light.
const systemIsLight = matchMedia("(prefers-color-scheme: light)");
const isPrinted = matchMedia("print");
const hasForcedColours = matchMedia("(forced-colors: active)");

function showTheme() {
  const chosen = hasForcedColours.matches ? null : localStorage.getItem("tokenlimits-theme");
  const isLight = isPrinted.matches || (chosen ? chosen === "light" : systemIsLight.matches);
  document.documentElement.dataset.theme = isLight ? "light" : "dark";
  document.dispatchEvent(new Event("theme"));
}

for (const query of [systemIsLight, isPrinted, hasForcedColours]) query.addEventListener("change", showTheme);
document.addEventListener("click", (event) => {
  if (!event.target.closest("[data-theme-switch]")) return;
  localStorage.setItem("tokenlimits-theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  showTheme();
});
showTheme();
