// Light, dark, or what the system says.

import { byId, say } from "./dom.js";

const STORED = "crosspool-theme";
const THEMES = ["auto", "light", "dark"];

function use(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(STORED, theme);
  say(byId("theme-button"), `Theme: ${theme}`);
}

const stored = localStorage.getItem(STORED);
use(THEMES.includes(stored) ? stored : "auto");
byId("theme-button").addEventListener("click", () => {
  const now = THEMES.indexOf(document.documentElement.dataset.theme);
  use(THEMES[(now + 1) % THEMES.length]);
});
