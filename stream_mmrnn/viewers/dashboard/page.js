"use strict";
// Draws the newest state from the server. Untrusted input is inserted as text, never as markup.
const $ = id => document.getElementById(id);
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const TIMEOUT_MS = 2500, HISTORY_MS = 30000, LEFT = 30, BANDS = 64, COLUMNS = 750;
let source = null, opened = false, receivedAt = 0, shownAt = 0, newest = null, shown = null;
let pausedAt = 0;
const paused = () => pausedAt > 0;
const replaying = () => Boolean(newest && newest.replay);

// ---- helpers

const set = (el, text) => { if (el.textContent !== text) el.textContent = text; };
const make = (tag, cls) => { const el = document.createElement(tag); if (cls) el.className = cls; return el; };
function fill(parent, items, create, update) {
  while (parent.children.length > items.length) parent.lastChild.remove();
  items.forEach((item, i) => { if (!parent.children[i]) parent.append(create(item)); update(parent.children[i], item, i); });
}
const ms = v => v == null ? "–" : Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) >= 10 ? v.toFixed(1) : v.toFixed(2);
function age(v) {
  if (v == null) return "–";
  if (v < 1000) return Math.max(0, Math.round(v)) + " ms";
  if (v < 100000) return (v / 1000).toFixed(v < 10000 ? 1 : 0) + " s";
  return v < 7200000 ? Math.round(v / 60000) + " min" : Math.round(v / 3600000) + " h";
}
const clock = s => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const number = v => v.toLocaleString("en");
function announce(text) { set($("announcements"), text); }
async function post(path, body) {
  try {
    const answer = await fetch(path, {method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body)});
    return answer.ok ? "" : (await answer.text()).trim();
  } catch { return "the session cannot be reached"; }
}

// ---- theme; a canvas cannot read light-dark(), so a hidden element (#probe) resolves the colours

const THEMES = ["auto", "light", "dark"];
let paints = {}, theme = "auto", scale = null;
function paint(name) {
  if (!paints[name]) { $("probe").style.color = `var(--${name})`; $("probe").hidden = false; paints[name] = getComputedStyle($("probe")).color; $("probe").hidden = true; }
  return paints[name];
}
function setTheme(name) {
  theme = THEMES.includes(name) ? name : "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
  set($("theme"), "Theme: " + theme);
  repaint();
}
function repaint() { paints = {}; scale = null; if (shown) show(shown); }
function nextTheme() {
  setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]);
  try { localStorage.setItem("theme", theme); } catch { /* there is no storage in a private window */ }
}

// ---- states, streams, processes

const GOOD = ["open", "ready"], BAD = ["missing", "restarting", "failed"], DONE = ["ended", "closed"];
function state(el, name, silent) {
  const quiet = silent && !DONE.includes(name) && !BAD.includes(name);
  const tone = BAD.includes(name) ? "bad" : quiet || name === "starting" || name === "stale" ? "warn" : GOOD.includes(name) || !name ? "good" : "none";
  el.className = "state " + tone;
  set(el, quiet && name !== "starting" ? "silent" : name || "live");
}
const row = kinds => () => { const tr = make("tr"); kinds.forEach(k => tr.append(make("td", k))); return tr; };
const STREAMS = {  // in display order
  "feature/vision": "vision", "feature/audio": "audio", "feature/text": "text", "feature/other_audio": "other audio",
  "feature/other_text": "other text", "feature/signal": "signal", "prediction": "predictions", "clock": "clock",
};
function showStreams(s) {
  fill($("t-streams"), Object.keys(STREAMS).filter(n => n in s.streams), row(["", "", "n", "n"]), (tr, name) => {
    const v = s.streams[name], [a, b, c, d] = tr.children;
    if (!a.firstChild) { a.append(make("span"), make("span", "why")); b.append(make("span")); }
    set(a.firstChild, STREAMS[name]); set(a.lastChild, BAD.includes(v.state) ? v.reason : "");
    state(b.firstChild, s.replay ? "" : v.state, v.silent);
    set(c, v.rate_hz.toFixed(1) + " Hz"); set(d, age(v.age_ms));
  });
}
function showDelays(s) {
  const stages = Object.entries(s.latency), top = s.latency.total ? Math.max(s.latency.total.p99, .001) : 1;
  set($("delays-what"), s.replay ? "As recorded, except the step, which is measured now; a replay has no bus." : "The stages of one prediction add up to its total; percentiles do not. Bars: median, with p99 behind it.");
  fill($("t-delays"), stages, row(["", "bars", "n", "n"]), (tr, [name, v]) => {
    const [a, b, c, d] = tr.children;
    tr.className = name === "total" ? "total" : "";
    set(a, name); set(c, ms(v.p50)); set(d, ms(v.p99));
    if (!b.firstChild) { const m = make("div", "meter"); m.ariaHidden = "true"; m.append(make("i", "far"), make("i")); b.append(m); }
    const width = x => Math.min(100, Math.max(0, 100 * x / top)).toFixed(1) + "%";
    b.firstChild.firstChild.style.width = width(v.p99); b.firstChild.lastChild.style.width = width(v.p50);
  });
}
const lastStates = new Map();
function showProcesses(s) {
  const nodes = Object.entries(s.nodes), failing = nodes.filter(([, v]) => BAD.includes(v.state));
  set($("processes-note"), s.replay ? "at the end of the recording, and this replay" : nodes.length ? failing.length ? `${failing.length} of ${nodes.length} with problems` : `all ${nodes.length} running` : "no status yet");
  fill($("t-processes"), nodes, row(["", "", "", "", "n"]), (tr, [name, v]) => {
    const [a, b, c, d, e] = tr.children;
    if (!b.firstChild) b.append(make("span"));
    set(a, name); state(b.firstChild, v.state, v.silent && !s.replay);
    tr.className = (v.reason ? "has-reason" : "") + (v.deaths ? " restarted" : "");
    set(c, v.reason || Object.entries(v.counts).filter(([, n]) => n).slice(0, 4).map(([k, n]) => `${k.replaceAll("_", " ")} ${number(n)}`).join(" · "));
    set(d, v.deaths ? `${v.deaths.count}×: ${v.deaths.reason}, ${age(v.deaths.age_ms)} ago` : "none");
    set(e, s.replay ? name === "replay" ? "now" : "recorded" : age(v.age_ms) + " ago");
    if (lastStates.get(name) !== v.state && (BAD.includes(v.state) || BAD.includes(lastStates.get(name)))) announce(`${name}: ${v.state}`);
    lastStates.set(name, v.state);
  });
}
function showLosses(s) {
  $("no-losses").hidden = s.losses.length > 0;
  set($("losses-note"), s.replay ? "when it was recorded" : "since the start");
  fill($("t-losses"), s.losses, row(["", "", "n"]), (tr, v) => {
    set(tr.children[0], v.node); set(tr.children[1], v.what.replaceAll("_", " ")); set(tr.children[2], number(v.count));
  });
}
function showSessions(s) {
  set($("sessions-note"), s.sessions.count > s.sessions.names.length ? `${s.sessions.names.length} of ${number(s.sessions.count)}` : "");
  fill($("l-sessions"), s.sessions.names.length ? s.sessions.names : ["none yet"], () => make("li"), (li, name) => {
    set(li, name);
    if (name === s.session) li.setAttribute("aria-current", "true"); else li.removeAttribute("aria-current");
  });
}
function showWords(s) {
  const lines = [
    ...s.texts.map(v => ({...v, kind: ""})), ...s.other_texts.map(v => ({...v, kind: "other"})), ...s.labels.map(v => ({...v, kind: "label"})),
  ].sort((a, b) => a.age_ms - b.age_ms).slice(0, 40);
  fill($("l-words"), lines, () => { const li = make("li"), what = make("span"); what.append(make("span", "tag"), make("span")); li.append(what, make("span")); return li; }, (li, v) => {
    li.className = v.kind;
    const [tag, text] = li.firstChild.children;
    tag.hidden = !v.kind; set(tag, v.kind); set(text, v.text); set(li.lastChild, age(v.age_ms));
  });
  for (const id of ["line", "label"]) { $(id).disabled = !s.typing.possible; $(id).form.lastElementChild.disabled = !s.typing.possible; }
  if (!s.typing.possible) { set($("typing"), s.typing.why); $("typing").className = "why"; $("typing").dataset.off = "1"; }
  else if ($("typing").dataset.off) { set($("typing"), "\u00a0"); delete $("typing").dataset.off; }
}
const VIEWERS = ["dashboard", "this view"];
function showKey(s) {
  const total = s.latency.total, model = s.model.name || "model " + s.model.sha256.slice(0, 12);
  set($("about"), [s.replay && s.replay.recording, s.session && "session " + s.session, s.model.sha256 || s.model.name ? model : ""].filter(Boolean).join(" · "));
  $("about").title = s.model.sha256;
  set($("k-rate"), s.ticks == null ? "–" : s.predictions_per_s.toFixed(1));
  set($("k-p50"), total ? ms(total.p50) + " ms" : "–"); set($("k-p99"), total ? ms(total.p99) + " ms" : "–");
  set($("k-tick"), s.ticks ? number(s.ticks) : "–"); set($("k-sessions"), number(s.sessions.count));
  // messages that only a viewer missed are in the table, not in this sum
  set($("k-losses"), number(s.losses.reduce((n, l) => n + (VIEWERS.includes(l.node) ? 0 : l.count), 0)));
}

// ---- pictures and sound are fetched separately: one request at a time

const picture = {shown: 0, busy: false};
function showPicture(s) {
  const vision = s.streams["feature/vision"];
  $("main").classList.toggle("no-camera", !s.picture.number && !(vision && (vision.state || vision.age_ms != null)));
  set($("camera-age"), s.picture.age_ms == null ? "\u00a0" : age(s.picture.age_ms) + " old");
  if (picture.busy || !s.picture.number || s.picture.number === picture.shown) return;
  const image = new Image(), wanted = s.picture.number;
  picture.busy = true;
  image.src = "picture.jpg?" + wanted;
  image.decode().then(() => {
    const canvas = $("picture");
    if (canvas.width !== image.naturalWidth || canvas.height !== image.naturalHeight) {
      canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
      canvas.parentElement.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
    }
    canvas.getContext("2d").drawImage(image, 0, 0);
    canvas.hidden = false; $("no-picture").hidden = true; picture.shown = wanted;
  }).catch(() => {}).finally(() => { picture.busy = false; });
}
const sound = {columns: new Map(), newest: -1, busy: false, image: new OffscreenCanvas(COLUMNS, BANDS)};
function fetchSound(s) {
  if (s.sound.newest < sound.newest || s.sound.newest - sound.newest > COLUMNS) { sound.columns.clear(); sound.newest = -1; }
  if (sound.busy || s.sound.newest <= sound.newest) return;
  sound.busy = true;
  fetch("sound?since=" + Math.max(0, sound.newest + 1)).then(async answer => {
    if (!answer.ok) return;
    const first = Number(answer.headers.get("X-First")), bytes = new Uint8Array(await answer.arrayBuffer());
    for (let i = 0; i * BANDS < bytes.length; i++) sound.columns.set(first + i, bytes.subarray(i * BANDS, (i + 1) * BANDS));
    if (bytes.length) sound.newest = first + bytes.length / BANDS - 1;
    for (const key of sound.columns.keys()) if (key <= sound.newest - COLUMNS) sound.columns.delete(key);
  }).catch(() => {}).finally(() => { sound.busy = false; });
}
// colour scale of the spectrogram: from the card's background to a contrasting colour, monotonic in lightness
const RAMPS = {light: ["#ffffff", "#cfe3f1", "#7fb4d9", "#2f77b5", "#173f7a", "#0b1d3f"], dark: ["#171a20", "#22345c", "#2b5f8a", "#2f9a97", "#8fd07a", "#fdf3a0"]};
function ramp() {
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
const systemDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => theme === "dark" || theme === "auto" && systemDark.matches;

// ---- the timeline

function context(canvas) {
  const ratio = devicePixelRatio || 1, w = canvas.clientWidth, h = canvas.clientHeight;
  if (!w || !h) return null;
  if (canvas.width !== Math.round(w * ratio) || canvas.height !== Math.round(h * ratio)) { canvas.width = Math.round(w * ratio); canvas.height = Math.round(h * ratio); }
  const g = canvas.getContext("2d");
  g.setTransform(ratio, 0, 0, ratio, 0, 0); g.clearRect(0, 0, w, h);
  g.font = `11px ${getComputedStyle(document.body).fontFamily}`; g.lineWidth = 1; g.setLineDash([]); g.globalAlpha = 1;
  return {g, w, h};
}
const nowX = () => $("spectrogram").clientWidth;
const pastX = (ageMs, right) => right - (right - LEFT) * Math.min(Math.max(ageMs, 0), HISTORY_MS) / HISTORY_MS;
function grid(g, right, h) {
  g.strokeStyle = paint("line");
  for (let t = 5000; t < HISTORY_MS; t += 5000) { const x = Math.round(pastX(t, right)) + .5; g.beginPath(); g.moveTo(x, 0); g.lineTo(x, h); g.stroke(); }
}
function showSound(s) {
  fetchSound(s);
  const v = s.sound, current = v.level_db != null && v.age_ms < 1500;
  set($("level-db"), v.level_db == null ? "–" : String(Math.round(v.level_db)).replace("-", "−"));
  set($("level-what"), v.level_db == null ? "no sound yet" : current ? `peak ${String(Math.round(v.peak_db)).replace("-", "−")} dB` : "silent for " + age(v.age_ms));
  const part = db => Math.min(100, Math.max(0, (db + 72) / 72 * 100));
  $("level-bar").style.width = (current ? part(v.level_db) : 0) + "%"; $("level-peak").style.left = (current ? part(v.peak_db) : -9) + "%";
  const c = context($("spectrogram"));
  if (!c) return;
  const {g, w, h} = c, colours = ramp(), image = new ImageData(COLUMNS, BANDS), pixels = new Uint32Array(image.data.buffer), words = new Uint32Array(colours.buffer);
  pixels.fill(words[0]);
  // the image ends at the newest column of the state; columns that were not fetched yet stay empty
  const last = v.newest;
  for (let i = 0; i < COLUMNS; i++) {
    const column = sound.columns.get(last - COLUMNS + 1 + i);
    if (column) for (let b = 0; b < BANDS; b++) pixels[(BANDS - 1 - b) * COLUMNS + i] = words[column[b]];
  }
  sound.image.getContext("2d").putImageData(image, 0, 0);
  const width = w - LEFT, shift = Math.min(width, (v.age_ms || 0) / HISTORY_MS * width);
  g.fillStyle = `rgb(${colours[0]},${colours[1]},${colours[2]})`; g.fillRect(LEFT, 0, width, h);
  g.save(); g.beginPath(); g.rect(LEFT, 0, width, h); g.clip(); g.imageSmoothingEnabled = true;
  g.drawImage(sound.image, LEFT - shift, 0, width, h); g.restore();
  g.strokeStyle = paint("line"); g.strokeRect(LEFT + .5, .5, width - 1, h - 1);
  g.fillStyle = paint("quiet"); g.textAlign = "right";
  g.textBaseline = "top"; g.fillText("8k", LEFT - 6, 0); g.textBaseline = "bottom"; g.fillText("0 Hz", LEFT - 6, h);
}
function showEvents(s) {
  const c = context($("events"));
  if (!c) return;
  const {g, w, h} = c, taken = [[], [], []], step = (h - 6) / taken.length;
  grid(g, w, h);
  g.strokeStyle = paint("line"); g.beginPath(); g.moveTo(LEFT, h - .5); g.lineTo(w, h - .5); g.stroke();
  const all = [...s.texts.map(v => [v, "ink"]), ...s.other_texts.map(v => [v, "quiet"]), ...s.labels.map(v => [v, "c1"])];
  g.textBaseline = "middle"; g.textAlign = "left";
  // labels first, then words from the newest on; a word without room becomes a tick mark
  for (const [v, colour] of all.filter(([v]) => v.age_ms <= HISTORY_MS).sort(([a, x], [b, y]) => (y === "c1") - (x === "c1") || a.age_ms - b.age_ms)) {
    const x = pastX(v.age_ms, w), label = colour === "c1", text = v.text.length > 26 ? v.text.slice(0, 25) + "…" : v.text, width = g.measureText(text).width;
    g.fillStyle = g.strokeStyle = paint(colour);
    if (label) { g.beginPath(); g.moveTo(x, 0); g.lineTo(x, h); g.stroke(); }
    // a word ends at its time; a label begins at its time
    const at = label && x + 4 + width < w ? x + 4 : x - width - (label ? 4 : 0);
    const free = taken.find(spans => spans.every(([from, to]) => at + width + 4 < from || at > to + 4));
    if (free && at >= LEFT) { g.fillText(text, at, step * taken.indexOf(free) + step / 2); free.push([at, at + width]); }
    else if (!label) g.fillRect(x - 1, h - 5, 2, 4);
  }
}
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
function showHeads(s) {
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

// ---- replay

let dragging = false;
function showReplay(s) {
  $("replay").hidden = $("help-replay").hidden = !s.replay;
  if (!s.replay) return;
  const r = s.replay;
  $("seek").max = r.duration_s;
  if (!dragging) $("seek").value = r.position_s;
  $("seek").setAttribute("aria-valuetext", `${clock(r.position_s)} of ${clock(r.duration_s)}`);
  set($("replay-at"), clock(dragging ? Number($("seek").value) : r.position_s)); set($("replay-end"), clock(r.duration_s));
  set($("replay-note"), r.note);
}
let seekTimer = 0;
function seek(to) {
  const r = newest && newest.replay;
  if (!r) return;
  to = Math.min(r.duration_s, Math.max(0, to));
  dragging = true; $("seek").value = to; set($("replay-at"), clock(to));
  clearTimeout(seekTimer);
  seekTimer = setTimeout(async () => { const why = await post("replay", {seek_s: to}); dragging = false; if (why) announce(why); }, 120);
}

// ---- page

function show(s) {
  shown = s;
  for (const part of [showKey, showReplay, showPicture, showSound, showEvents, showHeads, showStreams, showDelays, showWords, showProcesses, showLosses, showSessions]) part(s);
  shownAt = performance.now();
}
function link() {
  const silent = performance.now() - receivedAt, up = opened && silent < TIMEOUT_MS && receivedAt > 0, el = $("link");
  const held = paused() || replaying() && newest.replay.paused, gone = !up && receivedAt > 0 && !document.hidden;
  el.className = "state " + (up ? held ? "warn" : "good" : receivedAt ? "bad" : "none");
  set(el, up ? held ? "paused" : replaying() ? "replay" : "live" : receivedAt ? "lost" : "connecting");
  set($("pause"), held ? "Resume" : "Pause"); $("pause").setAttribute("aria-pressed", String(Boolean(held)));
  $("main").classList.toggle("old", gone);
  // the age changes every second: it is hidden from screen readers, which announce the event once
  set($("alert-what"), !gone ? "" : opened ? "The session sends no updates" : "Connection lost, trying again");
  if (gone) set($("alert-age"), `: the data shown is ${Math.floor(silent / 1000)} s old`);
  $("alert").hidden = !gone;
}
function togglePause() {
  if (replaying()) { post("replay", {paused: !newest.replay.paused}); return; }
  pausedAt = paused() ? 0 : performance.now();
  if (!paused() && newest) show(newest);
  link();
}
function connect() {
  if (source) source.close();
  source = new EventSource("events");
  source.onopen = () => { opened = true; link(); };
  source.onerror = () => {
    opened = false; link();
    // EventSource does not reconnect after a refusal, so do it here
    if (source && source.readyState === EventSource.CLOSED) setTimeout(() => { if (source && source.readyState === EventSource.CLOSED) connect(); }, 2000);
  };
  source.onmessage = event => {
    opened = true; receivedAt = performance.now();
    try { newest = JSON.parse(event.data); } catch { return; }
    if (replaying()) pausedAt = 0;
    if (!paused() && !(reducedMotion.matches && receivedAt - shownAt < 900)) show(newest);
    link();
  };
}

function typing(form, input, prefix, done) {
  $(form).addEventListener("submit", async event => {
    event.preventDefault();
    const text = $(input).value.trim();
    if (!text) return;
    const why = await post("text", prefix + text), note = $("typing");
    set(note, why || done(text)); note.className = "why" + (why ? " bad" : "");
    if (!why) $(input).value = "";
  });
}
const short = text => text.length > 32 ? text.slice(0, 31) + "…" : text;
typing("say", "line", "", text => `sent: ${short(text)}`);
typing("mark", "label", "/label ", text => `marked: ${short(text)}`);
$("pause").addEventListener("click", togglePause);
$("theme").addEventListener("click", nextTheme);
$("replay").addEventListener("submit", event => event.preventDefault());
$("seek").addEventListener("input", () => seek(Number($("seek").value)));
document.addEventListener("keydown", event => {
  const el = event.target, typingHere = el.matches("input[type=text]"), onRange = el.matches("input[type=range]");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typingHere) { el.blur(); return; }
  if (typingHere) return;
  if (event.key === " " && !el.matches("button")) { event.preventDefault(); togglePause(); }
  else if (event.key === "t" || event.key === "T") nextTheme();
  else if (event.key === "/" && !$("line").disabled) { event.preventDefault(); $("line").focus(); }
  else if (replaying() && !el.matches("ol") && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    event.preventDefault();
    const step = (event.shiftKey ? 10 : 1) * (event.key === "ArrowLeft" ? -1 : 1);
    seek((dragging || onRange ? Number($("seek").value) : newest.replay.position_s) + step);
  }
});
// a hidden page disconnects: browsers allow few connections, and the updates cost CPU
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { if (source) source.close(); source = null; } else { connect(); }
});
addEventListener("resize", () => { if (shown) show(shown); });
systemDark.addEventListener("change", repaint);
try { setTheme(localStorage.getItem("theme")); } catch { setTheme("auto"); }
setInterval(link, 500);
connect();
