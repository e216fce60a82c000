// Light, dark or as the system. A canvas cannot read light-dark(), so a hidden element (#probe) resolves the colours.
import {$, set} from "./dom.js";

const THEMES = ["auto", "light", "dark"];
let paints = {}, theme = "auto";
const listeners = [];
/** Calls `listener` whenever the colours have changed. */
export const onRepaint = listener => listeners.push(listener);
export function paint(name) {
  if (!paints[name]) { $("probe").style.color = `var(--${name})`; $("probe").hidden = false; paints[name] = getComputedStyle($("probe")).color; $("probe").hidden = true; }
  return paints[name];
}
export function setTheme(name) {
  theme = THEMES.includes(name) ? name : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
  set($("theme"), "Theme: " + theme);
  repaint();
}
function repaint() { paints = {}; for (const listener of listeners) listener(); }
export function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  try { localStorage.setItem("theme", theme); } catch { /* there is no storage in a private window */ }
}
const systemDark = matchMedia("(prefers-color-scheme: dark)");
export const isDark = () => theme === "dark" || theme === "auto" && systemDark.matches;
systemDark.addEventListener("change", repaint);
