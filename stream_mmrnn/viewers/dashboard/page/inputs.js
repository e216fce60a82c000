// The session's inputs, each with a plain word about how it is, and what is not connected or not used.
import {$, set, make, fill, age} from "./dom.js";

export function showInputs(s) {
  const here = s.inputs.filter(v => v.connected), off = s.inputs.filter(v => !v.connected);
  const bad = here.filter(v => v.tone === "bad" || v.tone === "warn");
  set($("inputs-note"), bad.length ? `${bad.length} of ${here.length} with problems` : here.length ? "all working" : "none");
  if (!bad.length && here.some(v => v.word !== "working")) set($("inputs-note"), "");
  fill($("l-inputs"), here, () => { const li = make("li"); li.append(make("span"), make("span"), make("span", "n")); return li; }, (li, v) => {
    const [name, state, rate] = li.children;
    li.dataset.stream = v.name;
    set(name, v.label); li.title = v.why;
    state.className = "state " + v.tone; set(state, v.word);
    set(rate, v.tone === "bad" || v.word === "ended" || v.rate_hz == null ? v.age_ms == null ? "" : age(v.age_ms) + " ago" : v.rate_hz >= 1 ? `${v.rate_hz.toFixed(0)} Hz` : v.age_ms == null ? "–" : age(v.age_ms) + " ago");
  });
  set($("inputs-off"), off.length ? "Not connected: " + off.map(v => v.label.toLowerCase()).join(", ") : "\u00a0");
  // one line for the reasons, always there: nothing moves
  const whys = here.filter(v => v.why);
  set($("inputs-why"), whys.length ? whys.map(v => `${v.label}: ${v.why}`).join("; ") : "\u00a0"); $("inputs-why").title = $("inputs-why").textContent;
  const camera = s.inputs.find(v => v.kind === "vision" && v.connected), why = $("camera-why");
  why.hidden = !(camera && (camera.tone === "bad" || camera.word === "silent"));
  if (!why.hidden) set(why, `${camera.word}${camera.why ? ": " + camera.why : ""}`);
}
