// Position in a recording that is replayed.
import {$, set, make, fill, clock, post, announce} from "./dom.js";
import {view} from "./view.js";

const SUPERSEDED_MS = 1500;
let dragging = false, sought = "", soughtAt = 0, seeks = 0;
const drag = on => { dragging = on; $("replay").toggleAttribute("data-seeking", on); };
/** A seek lasts until the player is there, or another viewer's seek took its place. */
function endSeek(seek) {
  if (dragging && sought && (seek.id === sought ? seek.done : performance.now() - soughtAt > SUPERSEDED_MS)) drag(false);
}
let last = Promise.resolve();
// a label that overtook the seek before it would be given at another place
const inOrder = body => last = last.then(() => post("replay", body));
/** Send a command after all that were given before it; why it is refused, or "". */
export function send(body) { sendSeek(); return inOrder(body); }
/** Where the recording is, or will be after a seek. */
export const position = () => dragging ? Number($("seek").value) : view.newest.replay.position_s;
export function showReplay(s) {
  $("replay").hidden = $("help-replay").hidden = !s.replay;
  if (!s.replay) return;
  const r = s.replay;
  endSeek(r.seek);
  $("seek").max = r.duration_s;
  if (!dragging) $("seek").value = r.position_s;
  $("seek").setAttribute("aria-valuetext", `${clock(r.position_s)} of ${clock(r.duration_s)}`);
  set($("replay-at"), clock(dragging ? Number($("seek").value) : r.position_s)); set($("replay-end"), clock(r.duration_s));
  set($("replay-note"), r.note);
  if (document.activeElement !== $("speed")) $("speed").value = String(r.speed);
  showMarks(r); showGiven(s);
}
// labels that were given before: a press, or a number on the keyboard, gives one from here on
const given = make("div");
given.id = "given"; given.setAttribute("role", "group"); given.setAttribute("aria-label", "Labels: a press gives one from here on");
$("mark").after(given);
async function command(body) { const why = await send(body); if (why) announce(why); }
const UNDO = "Undo";
function showGiven(s) {
  const r = s.replay, known = r.labels || [], offered = [...new Set([...(s.controls ? s.controls.labels : []), ...known])];
  given.hidden = !r.labels;
  const holds = s.labels.length ? s.labels[0].text : "none";
  fill(given, r.labels ? [...offered, "none", UNDO] : [], () => {
    const el = make("button"); el.type = "button"; el.append(make("kbd"), make("span"));
    el.addEventListener("click", () => command(el.dataset.label === UNDO ? {undo: true} : {label: el.dataset.label}));
    return el;
  }, (el, text, i) => {
    el.dataset.label = text; set(el.lastChild, text);
    set(el.firstChild, text === UNDO ? "⌫" : text === "none" ? "0" : i < 9 ? String(i + 1) : ""); el.firstChild.hidden = !el.firstChild.textContent;
    if (text !== UNDO) el.setAttribute("aria-pressed", String(text === holds)); else el.removeAttribute("aria-pressed");
  });
}
/** A key that gives a label, or takes the newest one back; whether it did. */
export function labelBy(key) {
  const named = [...given.children], el = key === "Backspace" ? named.at(-1) : named.find(v => v.firstChild.textContent === key && /^\d$/.test(key));
  if (given.hidden || !el) return false;
  el.click();
  return true;
}
// what was said and labelled: a press goes there
function showMarks(r) {
  const of = r.recording + r.marks.map(v => v.at_s + v.text).join();
  if ($("marks").dataset.of === of) return;
  $("marks").dataset.of = of;
  fill($("marks"), r.marks, () => { const el = make("button"); el.type = "button"; el.addEventListener("click", () => seek(Number(el.dataset.at))); return el; }, (el, v) => {
    el.className = v.kind; el.dataset.at = v.at_s; el.title = `${clock(v.at_s)} ${v.text}`; el.ariaLabel = `${v.kind} ${v.text} at ${clock(v.at_s)}`;
    el.style.left = `${100 * v.at_s / Math.max(r.duration_s, .1)}%`;
    el.tabIndex = v.kind === "label" ? 0 : -1;
  });
}
let seekTimer = 0, target = null;
export function seek(to) {
  const r = view.newest && view.newest.replay;
  if (!r) return;
  target = Math.min(r.duration_s, Math.max(0, to));
  drag(true); sought = ""; $("seek").value = target; set($("replay-at"), clock(target));
  clearTimeout(seekTimer);
  seekTimer = setTimeout(sendSeek, 120);
}
async function sendSeek() {
  if (target === null) return;
  clearTimeout(seekTimer);
  const id = `${Math.floor(performance.timeOrigin)}-${++seeks}`, body = {seek_s: target, seek_id: id};
  target = null;
  const why = await inOrder(body);
  if (target !== null) return; // a newer one waits
  if (why) { drag(false); announce(why); } else { sought = id; soughtAt = performance.now(); }
}
$("replay").addEventListener("submit", event => event.preventDefault());
$("speed").addEventListener("change", () => command({speed: Number($("speed").value)}));
$("seek").addEventListener("input", () => seek(Number($("seek").value)));
