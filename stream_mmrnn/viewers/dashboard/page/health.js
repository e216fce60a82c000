// Engineering figures, folded: messages, stages of latency, losses, processes, sessions.
import {$, set, make, fill, ms, age, number, announce} from "./dom.js";

const GOOD = ["open", "ready"], BAD = ["missing", "restarting", "failed"], DONE = ["ended", "closed"];
const VIEWERS = ["dashboard", "this view"];
const PLAIN = {stale: "late (stale)", missing: "not there", restarting: "starts again", failed: "given up", open: "working", ready: "working", closed: "ended"};
function state(el, name, silent) {
  const quiet = silent && !DONE.includes(name) && !BAD.includes(name);
  const tone = BAD.includes(name) ? "bad" : quiet || name === "starting" || name === "stale" ? "warn" : GOOD.includes(name) || !name ? "good" : "none";
  el.className = "state " + tone;
  set(el, quiet && name !== "starting" ? "silent" : PLAIN[name] || name || "live");
}
const row = kinds => () => { const tr = make("tr"); kinds.forEach(k => tr.append(make("td", k))); return tr; };
function showStreams(s) {
  const shown = Object.keys(s.streams).filter(n => !n.startsWith("raw/"));
  fill($("t-streams"), shown, row(["", "", "n", "n"]), (tr, name) => {
    const v = s.streams[name], [a, b, c, d] = tr.children;
    if (!a.firstChild) { a.append(make("span"), make("span", "why")); b.append(make("span")); }
    set(a.firstChild, (v.modality || name).replaceAll("_", " ")); set(a.lastChild, BAD.includes(v.state) ? v.reason : "");
    state(b.firstChild, s.replay ? "" : v.state, v.silent);
    set(c, v.rate_hz.toFixed(1) + " Hz"); set(d, age(v.age_ms));
  });
}
function showDelays(s) {
  const stages = Object.entries(s.latency), top = s.latency.total ? Math.max(s.latency.total.p99, .001) : 1;
  set($("delays-what"), s.replay ? "As recorded, except the step, which is measured now; a replay has no bus." : "The stages of one prediction add up to its total; percentiles do not. Bars: median, with p99 behind it. The part \u201cwait\u201d is the time until a tick is complete.");
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
    if (lastStates.get(name) !== v.state && (BAD.includes(v.state) || BAD.includes(lastStates.get(name)))) announce(`${name}: ${PLAIN[v.state] || v.state}`);
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
function showKey(s) {
  const total = s.latency.total, nodes = Object.values(s.nodes);
  // messages that only a viewer missed are in the table, not in this sum
  const lost = s.losses.reduce((n, l) => n + (VIEWERS.includes(l.node) ? 0 : l.count), 0);
  set($("k-rate"), s.ticks == null ? "–" : s.predictions_per_s.toFixed(1));
  set($("k-p50"), total ? ms(total.p50) + " ms" : "–"); set($("k-p99"), total ? ms(total.p99) + " ms" : "–");
  set($("k-tick"), s.ticks ? number(s.ticks) : "–"); set($("k-sessions"), number(s.sessions.count));
  set($("k-losses"), number(lost));
  const away = nodes.filter(v => BAD.includes(v.state) || v.silent).length;
  set($("health-line"), [
    s.ticks == null ? "no engine" : `${s.predictions_per_s.toFixed(0)} predictions/s`,
    s.latency.step && `step ${ms(s.latency.step.p50)} ms`, total && `in all ${ms(total.p50)} ms`, `${number(lost)} lost or late`,
    !s.replay && nodes.length && (away ? `${away} of ${nodes.length} processes with problems` : `${nodes.length} process${nodes.length === 1 ? "" : "es"} running`),
  ].filter(Boolean).join(" · "));
}
export function showHealth(s) {
  showKey(s);
  for (const part of [showStreams, showDelays, showProcesses, showLosses, showSessions]) part(s);
}
