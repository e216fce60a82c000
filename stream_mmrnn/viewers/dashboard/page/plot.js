// One time axis for all canvases of the timeline: the last 30 s, "now", and what is predicted after it.
import {$} from "./dom.js";
import {paint} from "./theme.js";

export const HISTORY_MS = 30000, LEFT = 30;
/** A canvas made ready for drawing: {g, w, h}; null if it is not visible. */
export function context(canvas) {
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (!w || !h) return null;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0); g.clearRect(0, 0, w, h);
  g.font = `11px ${getComputedStyle(document.body).fontFamily}`; g.lineWidth = 1; g.setLineDash([]); g.globalAlpha = 1;
  return {g, w, h};
}
export const nowX = () => $("past").clientWidth;
export const pastX = (ageMs, right) => right - (right - LEFT) * Math.min(Math.max(ageMs, 0), HISTORY_MS) / HISTORY_MS;
export const futureX = (t, most, right, w) => right + (w - 10 - right) * t / most;
export function grid(g, right, h) {
  g.strokeStyle = paint("line");
  for (let t = 5000; t < HISTORY_MS; t += 5000) { const x = Math.round(pastX(t, right)) + .5; g.beginPath(); g.moveTo(x, 0); g.lineTo(x, h); g.stroke(); }
}
export function stripes(g, x0, x1, h) {
  if (x1 - x0 < 1) return;
  g.save(); g.beginPath(); g.rect(x0, 0, x1 - x0, h); g.clip();
  g.globalAlpha = .22; g.fillStyle = paint("quiet"); g.fillRect(x0, 0, x1 - x0, h);
  g.globalAlpha = .8; g.strokeStyle = paint("quiet"); g.lineWidth = 1.5; g.setLineDash([]); g.beginPath();
  for (let x = Math.floor((x0 - h) / 9) * 9; x < x1; x += 9) { g.moveTo(x, h); g.lineTo(x + h, 0); }
  g.stroke(); g.restore();
}
/** Striped: predictions that were made without an input that should be there; the forecast, too, if it is doubtful. */
export function doubts(g, s, right, w, h, ahead) {
  for (const span of s.doubts) {
    const x0 = pastX(span.from_ms, right), x1 = pastX(span.to_ms, right);
    stripes(g, x0, Math.max(x0 + 2, x1), h);
    const width = g.measureText(span.why).width;
    if (x1 - x0 > width + 12) {
      g.fillStyle = paint("card"); g.fillRect(x0 + 4, 3, width + 8, 15);
      g.fillStyle = paint("ink"); g.textAlign = "left"; g.textBaseline = "top"; g.fillText(span.why, x0 + 8, 5);
    }
  }
  if (ahead && s.forecast.state === "doubtful" && !s.ended) stripes(g, right, w, h);
}
export function nowLine(g, right, h) {
  g.strokeStyle = paint("ink"); g.lineWidth = 1.5; g.setLineDash([]); g.beginPath(); g.moveTo(right - .5, 0); g.lineTo(right - .5, h); g.stroke();
}
