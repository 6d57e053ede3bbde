// In the head, before anything is shown: what was chosen last, else dark.
document.documentElement.dataset.theme = localStorage.getItem("tokenlimits-theme") === "light" ? "light" : "dark";
