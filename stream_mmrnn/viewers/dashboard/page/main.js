// Receives the newest state from the server, draws it, and says how current and how sound it is.
import {$, set, announce, clock} from "./dom.js";
import {nextTheme, onRepaint, setTheme} from "./theme.js";
import {view} from "./view.js";
import {position, seek, send, showReplay, labelBy} from "./replay.js";
import {showPicture, showSound} from "./media.js";
import {showNext} from "./next.js";
import {showInputs} from "./inputs.js";
import {showHeads} from "./heads.js";
import {showEvents, showWords} from "./words.js";
import {showHealth} from "./health.js";

const TIMEOUT_MS = 2500;
const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const parts = [showAbout, showReplay, showNext, showPicture, showInputs, showSound, showEvents, showHeads, showWords, showHealth];
let source = null, opened = false, receivedAt = 0, shownAt = 0, pausedAt = 0, announced = "", gone = "";
const paused = () => pausedAt > 0;
const replaying = () => Boolean(view.newest && view.newest.replay);

function showAbout(s) {
  const model = s.model.name || "model " + s.model.sha256.slice(0, 12);
  set($("about"), [s.replay && s.replay.recording, s.session && "session " + s.session, s.model.sha256 || s.model.name ? model : ""].filter(Boolean).join(" · ") || "\u00a0");
  $("about").title = s.model.sha256;
  set($("elapsed"), s.seconds == null ? "–" : clock(s.seconds));
}
function show(s) {
  view.shown = s;
  for (const part of parts) part(s);
  shownAt = performance.now();
}
/** The worst of the page's connection, the engine, the inputs and the other processes: [tone, word, problem]. */
function verdict() {
  const silent = performance.now() - receivedAt, up = opened && silent < TIMEOUT_MS && receivedAt > 0, s = view.newest;
  if (s && s.ended) return s.ended.why ? ["bad", "Ended", s.ended.why] : ["none", "Ended", ""];
  if (gone) return ["bad", "Ended", gone];
  if (!receivedAt) return ["none", "Connecting", ""];
  if (!up && !document.hidden) {
    const what = opened ? "The session sends no updates" : "Connection lost, trying again";
    return ["bad", "Lost", `${what}: the data shown is ${Math.floor(silent / 1000)} s old`];
  }
  if (s.controls && s.controls.idle) return ["none", "No session", ""];
  const {tone, what} = s.overall, problem = tone === "good" ? "" : what;
  if (paused() || replaying() && s.replay.paused) return [tone === "bad" ? "bad" : "warn", "Paused", problem];
  return [tone, tone === "bad" ? "Trouble" : replaying() ? "Replay" : "Live", problem];
}
function link() {
  const [tone, word, problem] = verdict(), held = paused() || replaying() && view.newest.replay.paused;
  $("link").className = "state " + tone;
  set($("link"), word);
  set($("pause"), held ? "Resume" : "Pause"); $("pause").setAttribute("aria-pressed", String(Boolean(held)));
  $("pause").disabled = word === "Ended";
  $("main").classList.toggle("old", word === "Lost" || word === "Ended");
  // it takes the place of the line about the session, so that nothing moves
  $("about").hidden = Boolean(problem); $("problem").hidden = !problem;
  $("problem").className = tone; $("problem").title = problem;
  set($("problem"), problem.charAt(0).toUpperCase() + problem.slice(1));
  // the seconds in it change: it is announced once
  const kind = problem.replace(/\d+/g, "");
  if (kind && kind !== announced) announce(problem);
  announced = kind;
  showEnd();
}
function showEnd() {
  const s = view.newest, ended = s && s.ended;
  $("ended").hidden = !ended;
  if (!ended) return;
  set($("ended-what"), `${s.replay ? "The replay" : "The session"} ended${s.seconds == null ? "" : ` after ${clock(s.seconds)}`}. ` + (ended.recording ? `Recording: ${ended.recording}` : "It was not recorded."));
  $("ended-how").hidden = !ended.recording || Boolean(s.replay);
  set($("ended-how"), `stream-mmrnn replay ${/[^\w./-]/.test(ended.recording) ? `'${ended.recording}'` : ended.recording} --speed 1`);
}
function togglePause() {
  if (replaying()) { send({paused: !view.newest.replay.paused}); return; }
  pausedAt = paused() ? 0 : performance.now();
  if (!paused() && view.newest) show(view.newest);
  link();
}
/** Why what this page shows is not there any more; "" if it may come back. */
async function whyGone() {
  try { const answer = await fetch("healthz"); return answer.status === 404 ? (await answer.text()).trim() : ""; } catch { return ""; }
}
function connect() {
  if (source) source.close();
  const mine = source = new EventSource("events");
  source.onopen = () => { opened = true; gone = ""; link(); };
  source.onerror = async () => {
    opened = false; link();
    if (mine.readyState !== EventSource.CLOSED) return;
    const why = await whyGone();
    if (source !== mine) return;
    gone = why; link();
    // EventSource does not reconnect after a refusal, so do it here
    if (!gone) setTimeout(() => { if (source === mine) connect(); }, 2000);
  };
  source.onmessage = event => {
    opened = true; receivedAt = performance.now();
    try { view.newest = JSON.parse(event.data); } catch { return; }
    if (replaying() || view.newest.ended) pausedAt = 0;
    if (!paused() && (view.newest.ended || !(reducedMotion.matches && receivedAt - shownAt < 900))) show(view.newest);
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
  else if (event.key === "/" && replaying() && !$("label").disabled) { event.preventDefault(); $("label").focus(); }
  else if (replaying() && !el.matches("select") && labelBy(event.key)) event.preventDefault();
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
