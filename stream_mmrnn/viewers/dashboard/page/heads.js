// What the model's heads say: their last 30 s, and what they predict.
import {$, set, make, fill} from "./dom.js";
import {paint} from "./theme.js";
import {HISTORY_MS, LEFT, context, grid, nowX, pastX} from "./plot.js";

// outputs with the same horizon belong to different targets: the k-th output of each horizon to target k
function groups(name, h) {
  if (!h.horizons_s.length) return [];
  const seen = new Map(), found = [];
  h.horizons_s.forEach((span, i) => {
    const key = span.join(), k = seen.get(key) || 0;
    seen.set(key, k + 1);
    (found[k] = found[k] || {name: "", outputs: []}).outputs.push(i);
  });
  for (const group of found) {
    const labels = group.outputs.map(i => h.labels[i] || "");
    let common = labels[0];
    for (const l of labels) while (!l.startsWith(common)) common = common.slice(0, -1);
    group.name = common.replace(/[_\W\d]+$/, "").replaceAll("_", " ") || name;
  }
  return found;
}
function limits(h) {
  if (h.unit === "probability") return [0, 1];
  let low = Infinity, high = -Infinity;
  for (const line of [...h.history.series, h.values]) for (const v of line) if (v != null) { low = Math.min(low, v); high = Math.max(high, v); }
  if (low > high) return [0, 1];
  const pad = (high - low || Math.abs(high) || 1) * .1;
  return [low - pad, high + pad];
}
const DASHES = [[], [7, 4], [2, 3]];
function line(g, h, i, colour, dashes, right, y) {
  g.strokeStyle = paint(colour); g.setLineDash(dashes); g.lineWidth = 1.75; g.lineJoin = "round"; g.beginPath();
  let on = false, before = 0;
  (h.history.series[i] || []).forEach((v, k) => {
    const t = h.history.age_ms[k];
    if (v == null) { on = false; return; }
    // do not connect points across a second without predictions
    if (on && before - t > 1000) on = false;
    const x = pastX(t, right);
    if (on) g.lineTo(x, y(v)); else g.moveTo(x, y(v));
    on = true; before = t;
  });
  g.stroke(); g.setLineDash([]);
}
const longestHorizon = s => Math.max(0, ...Object.values(s.heads).flatMap(h => h.horizons_s.map(span => span[1])));
const futureX = (t, most, right, w) => right + (w - 10 - right) * t / most;
function draw(canvas, name, h, most) {
  const c = context(canvas);
  if (!c) return;
  const {g, w, h: ht} = c, right = nowX(), ahead = groups(name, h), [low, high] = limits(h), top = 5, bottom = ht - 5;
  const y = v => bottom - (bottom - top) * (Math.min(high, Math.max(low, v)) - low) / (high - low);
  if (ahead.length) { g.fillStyle = paint("ahead"); g.fillRect(right, 0, w - right, ht); }
  grid(g, right, ht);
  g.fillStyle = paint("quiet"); g.textAlign = "right"; g.textBaseline = "middle";
  for (const part of [0, .5, 1]) {
    const v = low + (high - low) * part, at = Math.round(y(v)) + .5;
    g.strokeStyle = paint("line"); g.beginPath(); g.moveTo(LEFT, at); g.lineTo(ahead.length ? w : right, at); g.stroke();
    g.fillText(high - low >= 100 ? v.toFixed(0) : high - low > 20 ? v.toFixed(1) : String(+v.toFixed(1)), LEFT - 6, at);
  }
  if (h.threshold != null) {
    g.setLineDash([4, 4]); g.strokeStyle = paint("quiet"); g.beginPath(); g.moveTo(LEFT, y(h.threshold)); g.lineTo(right, y(h.threshold)); g.stroke(); g.setLineDash([]);
  }
  if (ahead.length) {
    ahead.forEach((group, k) => line(g, h, group.outputs[0], "c" + k % 8, DASHES[k % 3], right, y));
    ahead.forEach((group, k) => {
      // the prediction for each horizon, as a step as wide as the horizon
      g.strokeStyle = g.fillStyle = paint("c" + k % 8);
      for (const i of group.outputs) {
        const v = h.values[i], [from, to] = h.horizons_s[i];
        if (v == null) continue;
        const x0 = futureX(from, most, right, w), x1 = futureX(to, most, right, w);
        g.globalAlpha = .18; g.fillRect(x0, y(v), x1 - x0, y(Math.max(low, Math.min(0, high))) - y(v));
        g.globalAlpha = 1; g.lineWidth = 2.5; g.setLineDash(DASHES[k % 3]); g.beginPath(); g.moveTo(x0 + 1, y(v)); g.lineTo(x1 - 1, y(v)); g.stroke(); g.setLineDash([]);
      }
    });
  } else h.history.series.forEach((_, i) => line(g, h, i, "c" + i % 8, DASHES[Math.floor(i / 8) % 3], right, y));
  g.strokeStyle = paint("ink"); g.lineWidth = 1.5; g.beginPath(); g.moveTo(right - .5, 0); g.lineTo(right - .5, ht); g.stroke();
}
const formatValue = (h, v) => v == null ? "–" : h.unit === "probability" ? v.toFixed(2) : String(+v.toPrecision(3));
export function showHeads(s) {
  const heads = Object.entries(s.heads), most = longestHorizon(s);
  $("no-heads").hidden = heads.length > 0;
  $("timeline").querySelector(".future").hidden = !most;
  set($("timeline").querySelector(".future"), most ? `next ${most} s` : "");
  fill($("head-list"), heads, () => {
    const div = make("div", "lane head-lane"), h3 = make("h3"), plot = make("div", "plot"), canvas = make("canvas");
    plot.append(canvas);
    canvas.setAttribute("role", "img"); h3.append(make("span"), make("span", "legend"));
    div.append(h3, plot, make("div", "panel")); div.lastChild.append(make("p"), make("ul", "outputs"));
    return div;
  }, (div, [name, h]) => {
    const [h3, plot, panel] = div.children, canvas = plot.firstChild, [big, ul] = panel.children, ahead = groups(name, h);
    div.classList.toggle("wide", ahead.length > 0); panel.hidden = ahead.length > 0;
    const words = h.kind.replaceAll("_", " "), called = name.replaceAll("_", " ");
    set(h3.firstChild, words.startsWith(called) ? words : words ? `${called} · ${words}` : called);
    const legend = ahead.length > 1 || ahead.length === 1 && ahead[0].name !== name ? ahead : [];
    fill(h3.lastChild, legend, () => { const el = make("span"); el.append(make("i"), make("span")); return el; }, (el, group, k) => {
      el.firstChild.className = "dash" + k % 3; el.firstChild.style.borderTopColor = `var(--c${k % 8})`;
      set(el.lastChild, `${group.name} ${formatValue(h, h.values[group.outputs[0]])}`);
    });
    const description = h.values.slice(0, 8).map((v, i) => `${h.labels[i] || name} ${formatValue(h, v)}`).join(", ");
    canvas.setAttribute("aria-label", `${name}: last 30 seconds${ahead.length ? " and what is expected" : ""}; now ${description}`);
    draw(canvas, name, h, most);
    if (ahead.length) return;
    const one = h.values.length === 1, yes = h.threshold != null && h.values[0] != null;
    big.hidden = !one; ul.hidden = one;
    if (one) {
      if (!big.firstChild) big.append(make("b"), make("span"), make("span", "why"));
      set(big.children[0], formatValue(h, h.values[0]));
      set(big.children[1], yes ? h.values[0] > h.threshold ? " yes" : " no" : h.unit === "probability" ? "" : " " + h.unit);
      set(big.children[2], yes ? ` above ${+h.threshold.toPrecision(2)} is yes` : "");
      return;
    }
    const order = h.values.map((v, i) => [v, i]);
    if (order.length > 5) order.sort(([a], [b]) => (b ?? -Infinity) - (a ?? -Infinity));
    const [low, high] = limits(h);
    fill(ul, order.slice(0, 5), () => { const li = make("li"), bar = make("span", "meter"); bar.append(make("i")); bar.ariaHidden = "true"; li.append(make("span", "name"), make("span", "n"), bar); return li; }, (li, [v, i]) => {
      set(li.children[0], (h.labels[i] || String(i)).replaceAll("_", " ")); set(li.children[1], formatValue(h, v));
      const bar = li.children[2].firstChild;
      bar.style.width = (v == null ? 0 : 100 * Math.min(1, Math.max(0, (v - low) / (high - low)))).toFixed(1) + "%"; bar.style.background = `var(--c${i % 8})`;
    });
  });
  const c = context($("axis"));
  if (!c) return;
  const {g, w, h} = c, right = nowX();
  g.fillStyle = paint("quiet"); g.textBaseline = "top";
  const every = right < 400 ? 10000 : 5000;
  for (let t = every; t <= HISTORY_MS; t += every) { g.textAlign = t === HISTORY_MS ? "left" : "center"; g.fillText(`−${t / 1000} s`, pastX(t, right), 4); }
  g.textAlign = most ? "center" : "right"; g.fillStyle = paint("ink"); g.fillText("now", right, 4); g.fillStyle = paint("quiet");
  const ticks = [...new Set(Object.values(s.heads).flatMap(v => v.horizons_s.map(span => span[1])))].sort((a, b) => b - a);
  let free = w;
  for (const t of ticks) {
    const x = futureX(t, most, right, w), text = `+${t}`, width = g.measureText(text).width;
    g.textAlign = "right";
    if (x + 6 > free || x - width < right + 22) continue;
    g.fillText(text + (t === ticks[0] ? " s" : ""), x + (t === ticks[0] ? 8 : width / 2), 4); free = x - width;
  }
}
