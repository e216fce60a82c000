// A picture for each kind of head, on the common time axis: lines, a heat strip of classes, small multiples, a curve.
import {paint, ramp} from "./theme.js";
import {HISTORY_MS, LEFT, futureX, grid, pastX} from "./plot.js";

const DASHES = [[], [7, 4], [2, 3]], STEP_MS = 80, MOST_ROWS = 12;
const spoken = v => v == null ? "–" : Math.abs(v) >= 100 ? v.toFixed(0) : String(+v.toPrecision(3));
const percent = v => v == null ? "–" : `${Math.round(100 * v)} %`;
const plain = text => text.replaceAll("_", " ");
/** The probability that the event has come by the end of each interval. */
const cumulative = hazard => { let not = 1; return hazard.map(h => h == null ? null : 1 - (not *= 1 - h)); };
const old = s => Boolean(s.ended) || s.forecast.state === "old";
const ink = (s, colour) => paint(old(s) ? "quiet" : colour);

function range(lists, h) {
  if (h.unit === "probability") return [0, 1];
  let low = Infinity, high = -Infinity;
  for (const list of lists) for (const v of list) if (v != null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * .1;
  return [low - pad, high + pad];
}
function past(g, ages, values, colour, dashes, right, y) {
  g.strokeStyle = paint(colour); g.setLineDash(dashes); g.lineWidth = 1.75; g.lineJoin = "round"; g.beginPath();
  let on = false, before = 0;
  values.forEach((v, k) => {
    const t = ages[k];
    if (v == null) { on = false; return; }
    // do not connect points across a second without predictions
    if (on && before - t > 1000) on = false;
    const x = pastX(t, right);
    // one that stands alone is a dot
    if (on) g.lineTo(x, y(v)); else { g.moveTo(x - .75, y(v)); g.lineTo(x, y(v)); }
    on = true; before = t;
  });
  g.stroke(); g.setLineDash([]);
}
function scale(g, low, high, y, right, until, unit) {
  g.fillStyle = paint("quiet"); g.textAlign = "right"; g.textBaseline = "middle";
  for (const part of [0, .5, 1]) {
    const v = low + (high - low) * part, at = Math.round(y(v)) + .5;
    g.strokeStyle = paint("line"); g.setLineDash([]); g.lineWidth = 1; g.beginPath(); g.moveTo(LEFT, at); g.lineTo(until, at); g.stroke();
    g.fillStyle = paint("quiet");
    g.fillText(unit === "probability" ? `${Math.round(100 * v)}` : spoken(v), LEFT - 4, at);
  }
}
const height = (low, high, top, bottom) => v => bottom - (bottom - top) * (Math.min(high, Math.max(low, v)) - low) / (high - low);
/** The prediction for each horizon of one target, as a step as wide as the horizon. */
function steps(g, s, h, outputs, k, most, right, w, y, zero) {
  g.strokeStyle = g.fillStyle = ink(s, "c" + k % 8);
  for (const i of outputs) {
    const v = h.values[i], [from, to] = h.horizons_s[i];
    if (v == null) continue;
    const x0 = futureX(from, most, right, w), x1 = futureX(to, most, right, w);
    g.globalAlpha = .18; g.fillRect(x0, y(v), x1 - x0, y(zero) - y(v));
    g.globalAlpha = 1; g.lineWidth = 2.5; g.setLineDash(DASHES[k % 3]); g.beginPath(); g.moveTo(x0 + 1, y(v)); g.lineTo(x1 - 1, y(v)); g.stroke(); g.setLineDash([]);
  }
}
function now(g, s, text, note, right, w, h) {
  g.textAlign = "left"; g.fillStyle = ink(s, "ink"); g.textBaseline = note ? "bottom" : "middle";
  const font = g.font; g.font = font.replace("11px", "600 16px"); g.fillText(text, right + 14, h / 2 + (note ? 2 : 0)); g.font = font;
  if (!note) return;
  g.fillStyle = paint("quiet"); g.textBaseline = "top"; g.fillText(note, right + 14, h / 2 + 5);
}

/** Lines over time, and steps for the future: projected speech, and one probability. */
function lines(g, s, h, w, ht, right, most) {
  const ahead = h.targets, [low, high] = range([...h.history.series, h.values], h), y = height(low, high, 6, ht - 6);
  scale(g, low, high, y, right, ahead.length ? w : right, h.unit);
  if (h.threshold != null) {
    g.setLineDash([4, 4]); g.lineWidth = 1; g.strokeStyle = paint("quiet"); g.beginPath(); g.moveTo(LEFT, y(h.threshold)); g.lineTo(right, y(h.threshold)); g.stroke(); g.setLineDash([]);
  }
  const shown = ahead.length ? ahead.map(t => t.outputs[0]) : h.history.series.map((_, i) => i);
  shown.forEach((i, k) => past(g, h.history.age_ms, h.history.series[i] || [], "c" + k % 8, DASHES[k % 3], right, y));
  ahead.forEach((t, k) => steps(g, s, h, t.outputs, k, most, right, w, y, Math.max(low, Math.min(0, high))));
  if (ahead.length || h.values.length !== 1) return;
  const v = h.values[0], text = h.unit === "probability" ? percent(v) : `${spoken(v)} ${h.unit}`;
  now(g, s, v == null ? "–" : text, h.threshold == null ? "" : v == null ? "not now" : `${v > h.threshold ? "yes" : "no"}: ${percent(h.threshold)} is the limit`, right, w, ht);
}
function classes(h) {
  const all = h.values.map((_, i) => i);
  if (all.length <= MOST_ROWS) return all;
  const most = i => Math.max(0, ...(h.history.series[i] || []).filter(v => v != null));
  return all.sort((a, b) => most(b) - most(a)).slice(0, MOST_ROWS).sort((a, b) => a - b);
}
const strip = new OffscreenCanvas(1, 1);
/** One row for each class, the darker the likelier; names and values at the right. */
function heat(g, s, h, w, ht, right) {
  const rows = classes(h), columns = Math.ceil(HISTORY_MS / STEP_MS), tall = ht / rows.length;
  const image = new ImageData(columns, rows.length), pixels = new Uint32Array(image.data.buffer), colours = new Uint32Array(ramp().buffer);
  pixels.fill(colours[0]);
  h.history.age_ms.forEach((t, k) => {
    const column = columns - 1 - Math.floor(Math.max(0, t) / STEP_MS);
    if (column >= 0) rows.forEach((i, r) => { const v = h.history.series[i]?.[k]; if (v != null) for (const c of [column, column + 1]) if (c < columns) pixels[r * columns + c] = colours[Math.round(255 * Math.min(1, Math.max(0, v)))]; });
  });
  strip.width = columns; strip.height = rows.length; strip.getContext("2d").putImageData(image, 0, 0);
  g.imageSmoothingEnabled = false; g.drawImage(strip, LEFT, 0, right - LEFT, ht);
  g.strokeStyle = paint("line"); g.lineWidth = 1; g.strokeRect(LEFT + .5, .5, right - LEFT - 1, ht - 1);
  const best = h.values.reduce((b, v, i) => v != null && v > (h.values[b] ?? -1) ? i : b, 0), font = g.font;
  rows.forEach((i, r) => {
    const y = tall * (r + .5), chosen = i === best && h.values[i] != null;
    g.strokeStyle = paint("line"); g.beginPath(); g.moveTo(LEFT, tall * r + .5); g.lineTo(w, tall * r + .5); g.stroke();
    g.font = chosen ? font.replace("11px", "650 11px") : font; g.fillStyle = ink(s, chosen ? "ink" : "quiet"); g.textBaseline = "middle";
    const value = percent(h.values[i]), room = w - right - 22 - g.measureText(value).width;
    let name = plain(h.labels[i] || String(i));
    while (name.length > 2 && g.measureText(name).width > room) name = name.slice(0, -2) + "…";
    g.textAlign = "left"; g.fillText(name, right + 8, y); g.textAlign = "right"; g.fillText(value, w - 4, y);
  });
  g.font = font;
}
/** A small plot for each number, each with a scale of its own. */
function multiples(g, s, h, w, ht, right, most) {
  const rows = parts(h), tall = ht / rows.length, zeroed = h.unit === "probability";
  rows.forEach(({name, outputs}, k) => {
    const series = h.history.series[outputs[0]] || [], values = outputs.map(i => h.values[i]);
    const [low, high] = range([series, values], h), top = tall * k, y = height(low, high, top + 6, top + tall - 6);
    g.strokeStyle = paint("line"); g.lineWidth = 1; g.setLineDash([]); g.beginPath(); g.moveTo(LEFT, top + tall - .5); g.lineTo(w, top + tall - .5); g.stroke();
    past(g, h.history.age_ms, series, "c" + k % 8, DASHES[Math.floor(k / 8) % 3], right, y);
    if (h.targets.length) steps(g, s, h, outputs, k, most, right, w, y, zeroed ? 0 : low);
    g.fillStyle = paint("quiet"); g.textAlign = "right"; g.textBaseline = "top"; g.fillText(spoken(high), LEFT - 4, top + 2);
    g.textBaseline = "bottom"; g.fillText(spoken(low), LEFT - 4, top + tall - 2);
    const text = `${plain(name)}${h.targets.length ? "" : `  ${spoken(values[0])}`}`, width = g.measureText(text).width;
    const x = h.targets.length ? LEFT + 6 : right + 8;
    g.fillStyle = paint("card"); g.globalAlpha = .8; g.fillRect(x - 2, top + 2, width + 4, 13); g.globalAlpha = 1;
    g.fillStyle = paint("ink"); g.textAlign = "left"; g.textBaseline = "top"; g.fillText(text, x, top + 3);
  });
}
/** The chance that the event comes: so far for all of the time ahead, and as a curve from now on. */
function hazard(g, s, h, w, ht, right, most) {
  const y = height(0, 1, 6, ht - 6), series = h.history.series, points = h.history.age_ms.map((_, k) => cumulative(series.map(line => line[k])).at(-1));
  scale(g, 0, 1, y, right, w, "probability");
  past(g, h.history.age_ms, points, "c0", [], right, y);
  const curve = cumulative(h.values);
  g.strokeStyle = g.fillStyle = ink(s, "c0"); g.lineWidth = 2.5; g.beginPath(); g.moveTo(right, y(0));
  let x = right;
  curve.forEach((v, i) => { if (v != null) { x = futureX(h.horizons_s[i][1], most, right, w); g.lineTo(x, y(v)); } });
  g.stroke();
  g.lineTo(x, y(0)); g.closePath(); g.globalAlpha = .18; g.fill(); g.globalAlpha = 1;
}
/** The plots of a regression: one for each target, or for each number. */
function parts(h) {
  const all = h.targets.length ? h.targets : h.values.map((_, i) => ({name: h.labels[i] || String(i), outputs: [i]}));
  return all.slice(0, MOST_ROWS);
}
/** Which picture a head gets: {draw, high (in px), what}. */
export function picture(h) {
  if (h.kind === "hazard" && h.horizons_s.length) return {draw: hazard, high: 110, what: `chance that it comes within ${h.horizons_s.at(-1)[1]} s, %`};
  if (h.kind === "classification" && h.values.length > 1) return {draw: heat, high: Math.max(40, 18 * classes(h).length), what: "classes", legend: "heat"};
  if (h.kind === "classification" || h.kind === "activity_projection") return {draw: lines, high: h.values.length > 1 ? 132 : 72, what: h.values.length > 1 ? "who will speak, %" : "%", legend: "lines"};
  return {draw: multiples, high: Math.max(56, 42 * parts(h).length), what: h.unit === "probability" ? "" : h.unit};
}
