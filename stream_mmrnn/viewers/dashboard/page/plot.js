// One time axis for all canvases of the timeline: the last 30 s, "now", and what is predicted after it.
import {$} from "./dom.js";
import {paint} from "./theme.js";

export const HISTORY_MS = 30000, LEFT = 30;
export function context(canvas) {
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (!w || !h) return null;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0); g.clearRect(0, 0, w, h);
  g.font = `11px ${getComputedStyle(document.body).fontFamily}`; g.lineWidth = 1; g.setLineDash([]); g.globalAlpha = 1;
  return {g, w, h};
}
export const nowX = () => $("spectrogram").clientWidth;
export const pastX = (ageMs, right) => right - (right - LEFT) * Math.min(Math.max(ageMs, 0), HISTORY_MS) / HISTORY_MS;
export function grid(g, right, h) {
  g.strokeStyle = paint("line");
  for (let t = 5000; t < HISTORY_MS; t += 5000) { const x = Math.round(pastX(t, right)) + .5; g.beginPath(); g.moveTo(x, 0); g.lineTo(x, h); g.stroke(); }
}
