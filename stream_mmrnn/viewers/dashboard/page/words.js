// Lines of text and labels: as turns of a conversation, on the timeline, and typed by the reader.
import {$, set, make, fill, clock, post} from "./dom.js";
import {paint} from "./theme.js";
import {view} from "./view.js";
import {send} from "./replay.js";
import {HISTORY_MS, LEFT, context, grid, pastX} from "./plot.js";

const PAUSE_MS = 2000, MOST_TURNS = 40;
/** Lines of one person without a pause between them are one turn; newest first. */
export function turns(s) {
  const lines = [
    ...s.texts.map(v => ({...v, who: "you"})), ...s.other_texts.map(v => ({...v, who: "other"})), ...s.labels.map(v => ({...v, who: "label"})),
  ].sort((a, b) => b.age_ms - a.age_ms);
  const found = [];
  let last = null;
  for (const v of lines) {
    if (last && v.who === last.who && v.who !== "label" && last.until_ms - v.age_ms <= PAUSE_MS) { last.text += " " + v.text; last.until_ms = v.age_ms; continue; }
    last = {who: v.who, text: v.text, age_ms: v.age_ms, until_ms: v.age_ms};
    found.push(last);
  }
  return found.reverse().slice(0, MOST_TURNS);
}
const WHO = {you: "You", other: "Other", label: "Label"};
export function showWords(s) {
  const text = s.inputs.some(v => v.kind === "text" && v.connected);
  $("l-words").hidden = !text && !turns(s).length;
  const marked = s.replay ? Boolean(s.replay.labels) : text;
  $("say").hidden = Boolean(s.replay) || !text; $("mark").hidden = !marked;
  fill($("l-words"), turns(s), () => { const li = make("li"); li.append(make("span", "tag"), make("span", "said"), make("span")); return li; }, (li, v) => {
    const [tag, text, at] = li.children;
    li.className = v.who; set(tag, WHO[v.who]); set(text, v.text);
    set(at, s.seconds == null ? "" : clock(Math.max(0, s.seconds - v.age_ms / 1000)));
  });
  for (const id of ["line", "label"]) { $(id).disabled = !(s.typing.possible || s.replay && id === "label") || Boolean(s.ended); $(id).form.lastElementChild.disabled = $(id).disabled; }
  if (!s.typing.possible) { set($("typing"), s.typing.why); $("typing").className = "why"; $("typing").dataset.off = "1"; }
  else if ($("typing").dataset.off) { set($("typing"), "\u00a0"); delete $("typing").dataset.off; }
}
export function showEvents(s) {
  $("lane-words").hidden = ![s.texts, s.other_texts, s.labels].some(v => v.length) && !s.inputs.some(v => v.kind === "text" && v.connected);
  const c = context($("events"));
  if (!c) return;
  const {g, w, h} = c, taken = [[], [], []], step = (h - 6) / taken.length;
  grid(g, w, h);
  g.strokeStyle = paint("line"); g.beginPath(); g.moveTo(LEFT, h - .5); g.lineTo(w, h - .5); g.stroke();
  const all = [...s.texts.map(v => [v, "c0"]), ...s.other_texts.map(v => [v, "c1"]), ...s.labels.map(v => [v, "c3"])];
  g.textBaseline = "middle"; g.textAlign = "left";
  // labels first, then words from the newest on; a word without room becomes a tick mark
  for (const [v, colour] of all.filter(([v]) => v.age_ms <= HISTORY_MS).sort(([a, x], [b, y]) => (y === "c3") - (x === "c3") || a.age_ms - b.age_ms)) {
    const x = pastX(v.age_ms, w), label = colour === "c3", text = v.text.length > 26 ? v.text.slice(0, 25) + "…" : v.text, width = g.measureText(text).width;
    g.fillStyle = g.strokeStyle = paint(colour);
    if (label) { g.beginPath(); g.moveTo(x, 0); g.lineTo(x, h); g.stroke(); }
    // a word ends at its time; a label begins at its time
    const at = label && x + 4 + width < w ? x + 4 : x - width - (label ? 4 : 0);
    const free = taken.find(spans => spans.every(([from, to]) => at + width + 4 < from || at > to + 4));
    if (free && at >= LEFT) { g.fillText(text, at, step * taken.indexOf(free) + step / 2); free.push([at, at + width]); }
    else if (!label) g.fillRect(x - 1, h - 5, 2, 4);
  }
}
function typing(form, input, prefix, done) {
  $(form).addEventListener("submit", async event => {
    event.preventDefault();
    const text = $(input).value.trim();
    if (!text) return;
    const replayed = view.newest && view.newest.replay, note = $("typing");
    const why = replayed ? await send({label: text}) : await post("text", prefix + text);
    if (why || !replayed) { set(note, why || done(text)); note.className = "why" + (why ? " bad" : ""); }
    if (!why) $(input).value = "";
  });
}
const short = text => text.length > 32 ? text.slice(0, 31) + "…" : text;
typing("say", "line", "", text => `sent: ${short(text)}`);
typing("mark", "label", "/label ", text => `marked: ${short(text)}`);
