// Receives the newest state from the server, draws it, and says how current it is.
import {$, set, post} from "./dom.js";
import {nextTheme, onRepaint, setTheme} from "./theme.js";
import {view} from "./view.js";
import {position, seek, showReplay} from "./replay.js";
import {showPicture, showSound} from "./media.js";
import {showHeads} from "./heads.js";
import {showEvents, showWords} from "./words.js";
import {showDelays, showKey, showLosses, showProcesses, showSessions, showStreams} from "./health.js";

const TIMEOUT_MS = 2500;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const parts = [showKey, showReplay, showPicture, showSound, showEvents, showHeads, showStreams, showDelays, showWords, showProcesses, showLosses, showSessions];
let source = null, opened = false, receivedAt = 0, shownAt = 0, pausedAt = 0;
const paused = () => pausedAt > 0;
const replaying = () => Boolean(view.newest && view.newest.replay);

function show(s) {
  view.shown = s;
  for (const part of parts) part(s);
  shownAt = performance.now();
}
function link() {
  const silent = performance.now() - receivedAt, up = opened && silent < TIMEOUT_MS && receivedAt > 0, el = $("link");
  const held = paused() || replaying() && view.newest.replay.paused, gone = !up && receivedAt > 0 && !document.hidden;
  el.className = "state " + (up ? held ? "warn" : "good" : receivedAt ? "bad" : "none");
  set(el, up ? held ? "paused" : replaying() ? "replay" : view.newest?.controls?.idle ? "no session" : "live" : receivedAt ? "lost" : "connecting");
  set($("pause"), held ? "Resume" : "Pause"); $("pause").setAttribute("aria-pressed", String(Boolean(held)));
  $("main").classList.toggle("old", gone);
  // the age changes every second: it is hidden from screen readers, which announce the event once
  set($("alert-what"), !gone ? "" : opened ? "The session sends no updates" : "Connection lost, trying again");
  if (gone) set($("alert-age"), `: the data shown is ${Math.floor(silent / 1000)} s old`);
  $("alert").hidden = !gone;
}
function togglePause() {
  if (replaying()) { post("replay", {paused: !view.newest.replay.paused}); return; }
  pausedAt = paused() ? 0 : performance.now();
  if (!paused() && view.newest) show(view.newest);
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
    try { view.newest = JSON.parse(event.data); } catch { return; }
    if (replaying()) pausedAt = 0;
    if (!paused() && !(reducedMotion.matches && receivedAt - shownAt < 900)) show(view.newest);
    link();
  };
}
$("pause").addEventListener("click", togglePause);
$("theme").addEventListener("click", nextTheme);
document.addEventListener("keydown", event => {
  const el = event.target, typingHere = el.matches("input[type=text]"), onRange = el.matches("input[type=range]");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && typingHere) { el.blur(); return; }
  if (typingHere) return;
  if (event.key === " " && !el.matches("button, summary, select, a, input[type=checkbox]")) { event.preventDefault(); togglePause(); }
  else if (event.key === "t" || event.key === "T") nextTheme();
  else if (event.key === "/" && !$("line").disabled) { event.preventDefault(); $("line").focus(); }
  else if (replaying() && !el.matches("ol, select") && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    event.preventDefault();
    const step = (event.shiftKey ? 10 : 1) * (event.key === "ArrowLeft" ? -1 : 1);
    seek((onRange ? Number($("seek").value) : position()) + step);
  }
});
// a hidden page disconnects: browsers allow few connections, and the updates cost CPU
document.addEventListener("visibilitychange", () => {
  if (document.hidden) { if (source) source.close(); source = null; } else { connect(); }
});
const again = () => { if (view.shown) show(view.shown); };
addEventListener("resize", again);
onRepaint(again);
// what the server says is on has a module of its own: start(element) once, show(state) with each state
for (const name of (document.documentElement.dataset.features || "").split(" ").filter(Boolean)) {
  import(`./${name}.js`).then(module => {
    module.start($(name));
    $(name).hidden = false;
    if (module.show) { parts.push(module.show); again(); }
  });
}
try { setTheme(localStorage.getItem("theme")); } catch { setTheme("auto"); }
setInterval(link, 500);
connect();
