// What happens next, in words: a line for each thing that a head predicts, its probability, and that over time.
import {$, set, make, fill} from "./dom.js";

const percent = p => p == null ? "–" : `${Math.round(100 * p)} %`;
const seconds = v => String(+v.toFixed(2)).replace(/^0(?=\.)/, "");
export function showNext(s) {
  const lines = s.next, {state, why} = s.forecast, box = $("next");
  box.dataset.state = s.ended ? "old" : state;
  $("no-heads").hidden = lines.length > 0;
  const ends = lines.flatMap(l => l.steps.map(step => step.end_s));
  set($("next-span"), ends.length ? `next ${seconds(Math.max(...ends))} s` : "");
  const said = s.ended ? "the session has ended" : why;
  set($("next-why"), !said || !lines.length && state === "good" ? "\u00a0" : state === "doubtful" && !s.ended ? `Less sure: ${said}` : `Old prediction: ${said}`);
  $("next-why").title = said || "";
  fill($("l-next"), lines, () => {
    const li = make("li"), words = make("p", "says"), bars = make("span", "steps");
    words.append(make("span"), make("span", "why"));
    bars.ariaHidden = "true";
    li.append(words, make("b"), bars);
    return li;
  }, (li, line) => {
    const [words, value, bars] = li.children;
    const number = line.p == null && !line.steps.length && s.heads[line.head]?.kind === "regression";
    li.className = number ? "number" : line.p != null && line.p >= .5 ? "likely" : "";
    li.dataset.head = line.head;
    set(words.firstChild, line.text); set(words.lastChild, line.why ? ` (${line.why})` : ""); words.title = words.textContent;
    set(value, percent(line.p));
    fill(bars, line.steps, () => { const cell = make("span"), tube = make("i"); tube.append(make("u")); cell.append(tube, make("small")); return cell; }, (cell, step, i) => {
      cell.firstChild.firstChild.style.height = (100 * (step.p || 0)).toFixed(0) + "%";
      set(cell.lastChild, seconds(step.end_s) + (i === line.steps.length - 1 ? " s" : ""));
    });
  });
}
