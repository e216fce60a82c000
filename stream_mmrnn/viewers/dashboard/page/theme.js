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
const isDark = () => theme === "dark" || theme === "auto" && systemDark.matches;
systemDark.addEventListener("change", repaint);
let scale = null;
listeners.push(() => { scale = null; });
// colour scale of the spectrogram and of classes: from the card's background to a contrasting colour, monotonic in lightness
const RAMPS = {light: ["#ffffff", "#cfe3f1", "#7fb4d9", "#2f77b5", "#173f7a", "#0b1d3f"], dark: ["#171a20", "#22345c", "#2b5f8a", "#2f9a97", "#8fd07a", "#fdf3a0"]};
/** 256 colours as RGBA bytes, from nothing to the most. */
export function ramp() {
  if (scale) return scale;
  const stops = RAMPS[isDark() ? "dark" : "light"].map(c => [1, 3, 5].map(i => parseInt(c.slice(i, i + 2), 16)));
  scale = new Uint8ClampedArray(256 * 4);
  for (let v = 0; v < 256; v++) {
    const at = v / 255 * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(at)), t = at - i;
    for (let k = 0; k < 3; k++) scale[v * 4 + k] = stops[i][k] * (1 - t) + stops[i + 1][k] * t;
    scale[v * 4 + 3] = 255;
  }
  return scale;
}
