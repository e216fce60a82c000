// The lanes of the timeline that show what the heads said in the last 30 s, and what they predict now.
import {$, set, make, fill} from "./dom.js";
import {paint} from "./theme.js";
import {HISTORY_MS, context, doubts, futureX, grid, nowLine, nowX, pastX} from "./plot.js";
import {picture} from "./pictures.js";

const formatValue = (h, v) => v == null ? "none" : h.unit === "probability" ? `${Math.round(100 * v)} %` : String(+v.toPrecision(3));
const longestHorizon = s => Math.max(0, ...Object.values(s.heads).flatMap(h => h.horizons_s.map(span => span[1])));
const WHO = {self: "you", other: "the other"};
function lane() {
  const div = make("div", "lane head-lane"), h3 = make("h3"), plot = make("div", "plot"), canvas = make("canvas");
  canvas.setAttribute("role", "img");
  h3.append(make("span"), make("span", "what"), make("span", "legend")); plot.append(canvas); div.append(h3, plot);
  return div;
}
function legend(el, how, h) {
  const targets = how.legend === "lines" && h.targets.length > 1 ? h.targets : [], scale = how.legend === "heat" ? [0] : [];
  fill(el, [...targets, ...scale], () => { const span = make("span"); span.append(make("i"), make("span")); return span; }, (span, target, k) => {
    span.firstChild.className = targets.length ? "dash" + k % 3 : "heat";
    span.firstChild.style.borderTopColor = targets.length ? `var(--c${k % 8})` : "";
    set(span.lastChild, targets.length ? WHO[target.name] || target.name.replaceAll("_", " ") : "0 to 100 %");
  });
}
export function showHeads(s) {
  const heads = Object.entries(s.heads), most = longestHorizon(s), right = nowX(), future = $("timeline").querySelector(".future");
  future.hidden = !most;
  set(future, most ? `next ${most} s` : "");
  fill($("head-list"), heads, lane, (div, [name, h]) => {
    const [h3, plot] = div.children, canvas = plot.firstChild, how = picture(h), ahead = h.targets.length > 0;
    set(h3.children[0], name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " ")); set(h3.children[1], how.what);
    legend(h3.children[2], how, h);
    plot.style.minHeight = how.high + "px"; plot.style.maxHeight = 2 * how.high + "px"; div.style.flex = `${how.high} 0 auto`;
    const description = h.values.slice(0, 8).map((v, i) => `${h.labels[i] || name} ${formatValue(h, v)}`).join(", ");
    canvas.setAttribute("aria-label", `${name}: last 30 seconds${ahead ? " and what is expected" : ""}; now ${description}`);
    const c = context(canvas);
    if (!c) return;
    const {g, w, h: ht} = c;
    if (ahead) { g.fillStyle = paint("ahead"); g.fillRect(right, 0, w - right, ht); }
    if (how.legend !== "heat") grid(g, right, ht);
    how.draw(g, s, h, w, ht, right, most);
    doubts(g, s, right, w, ht, ahead);
    nowLine(g, right, ht);
  });
  showAxis(s, right, most);
  const why = [...new Set(s.doubts.map(span => span.why))];
  set($("doubts"), why.length ? `Striped: ${why.slice(-2).join("; ")}` : "\u00a0");
}
function showAxis(s, right, most) {
  const c = context($("axis"));
  if (!c) return;
  const {g, w} = c, every = right < 400 ? 10000 : 5000;
  g.fillStyle = paint("quiet"); g.textBaseline = "top";
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
