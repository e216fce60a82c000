// What the session's parts do: streams, stages of latency, processes, losses, sessions, key figures.
import {$, set, make, fill, ms, age, number, announce} from "./dom.js";

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
export function showStreams(s) {
  fill($("t-streams"), Object.keys(STREAMS).filter(n => n in s.streams), row(["", "", "n", "n"]), (tr, name) => {
    const v = s.streams[name], [a, b, c, d] = tr.children;
    if (!a.firstChild) { a.append(make("span"), make("span", "why")); b.append(make("span")); }
    set(a.firstChild, STREAMS[name]); set(a.lastChild, BAD.includes(v.state) ? v.reason : "");
    state(b.firstChild, s.replay ? "" : v.state, v.silent);
    set(c, v.rate_hz.toFixed(1) + " Hz"); set(d, age(v.age_ms));
  });
}
export function showDelays(s) {
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
export function showProcesses(s) {
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
export function showLosses(s) {
  $("no-losses").hidden = s.losses.length > 0;
  set($("losses-note"), s.replay ? "when it was recorded" : "since the start");
  fill($("t-losses"), s.losses, row(["", "", "n"]), (tr, v) => {
    set(tr.children[0], v.node); set(tr.children[1], v.what.replaceAll("_", " ")); set(tr.children[2], number(v.count));
  });
}
export function showSessions(s) {
  set($("sessions-note"), s.sessions.count > s.sessions.names.length ? `${s.sessions.names.length} of ${number(s.sessions.count)}` : "");
  fill($("l-sessions"), s.sessions.names.length ? s.sessions.names : ["none yet"], () => make("li"), (li, name) => {
    set(li, name);
    if (name === s.session) li.setAttribute("aria-current", "true"); else li.removeAttribute("aria-current");
  });
}
const VIEWERS = ["dashboard", "this view"];
export function showKey(s) {
  const total = s.latency.total, model = s.model.name || "model " + s.model.sha256.slice(0, 12);
  set($("about"), [s.replay && s.replay.recording, s.session && "session " + s.session, s.model.sha256 || s.model.name ? model : ""].filter(Boolean).join(" · "));
  $("about").title = s.model.sha256;
  set($("k-rate"), s.ticks == null ? "–" : s.predictions_per_s.toFixed(1));
  set($("k-p50"), total ? ms(total.p50) + " ms" : "–"); set($("k-p99"), total ? ms(total.p99) + " ms" : "–");
  set($("k-tick"), s.ticks ? number(s.ticks) : "–"); set($("k-sessions"), number(s.sessions.count));
  // messages that only a viewer missed are in the table, not in this sum
  set($("k-losses"), number(s.losses.reduce((n, l) => n + (VIEWERS.includes(l.node) ? 0 : l.count), 0)));
}
