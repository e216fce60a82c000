// What can be done on the page: start, stop, record, label, open a recording; and the sessions of this machine.
import {$, set, make, fill, post, announce, clock} from "./dom.js";

const SOURCES = {vision: "Camera", audio: "Microphone", text: "Text"};
let now = null, waitingFor = "", earlier = new Set();
const view = key => key ? `/view/${encodeURIComponent(key)}/` : "/";
const button = (text, cls) => { const el = make("button", cls); el.type = "button"; set(el, text); return el; };
const link = (text, href) => { const el = make("a"); el.href = href; set(el, text); return el; };
const said = make("p", "why");
said.id = "c-said"; said.setAttribute("role", "status");

/** Post a change; a refusal is shown where it was asked for. Everyone sees a change in the next state. */
async function change(path, body, note = said) {
  const why = await post("/controls/" + path, body);
  set(note, why); note.className = "why" + (why ? " bad" : ""); note.hidden = !why;
  if (why) announce(why);
  return !why;
}

// ---- in the header: sessions, record, stop

const menu = make("details"), summary = make("summary"), list = make("ul"), compare = link("Compare two side by side", "#"), home = link("Start another, or open a recording", "/");
const record = button("Record", "record"), stop = button("Stop");
menu.id = "c-menu"; list.id = "c-sessions"; record.id = "c-record"; stop.id = "c-stop"; compare.id = "c-compare"; home.id = "c-home";
const panel = make("div", "panel-menu");
panel.append(list, compare, home);
menu.append(summary, panel);
function row() {
  const li = make("li");
  li.append(make("a"), make("span"));
  return li;
}
function sessions(el, items, own) {
  fill(el, items, row, (li, v) => {
    const [a, span] = li.children;
    set(a, v.name); a.href = v.home ? "/" : view(v.key);
    if (v.key === own) a.setAttribute("aria-current", "page"); else a.removeAttribute("aria-current");
    set(span, clock(v.seconds));
  });
}
function showMenu(c) {
  set(summary, c.sessions.length > 1 ? `${c.sessions.length} sessions` : c.sessions.length ? "1 session" : "Sessions");
  sessions(list, c.sessions, c.session);
  const other = c.sessions.find(v => v.key !== c.session), mine = c.sessions.find(v => v.key === c.session);
  compare.hidden = !(mine && other);
  if (mine && other) compare.href = `/compare.html?a=${encodeURIComponent(mine.key)}&b=${encodeURIComponent(other.key)}`;
  home.hidden = !c.offers || c.idle;
  menu.hidden = !c.sessions.length && home.hidden;
}
function showButtons(c, replaying) {
  const r = c.recording, none = c.idle || replaying || !r;
  record.hidden = stop.hidden = none;
  record.disabled = stop.disabled = c.over;
  if (none) return;
  record.setAttribute("aria-pressed", String(r.on));
  set(record, r.on ? "Recording" : "Record");
  record.title = r.on ? `into ${r.file}; press to end the recording` : "Record from now on";
  if (r.why) note(`Not recorded: ${r.why}`);
}
function note(text) { set(said, text); said.hidden = !text; said.className = "why"; }
record.addEventListener("click", () => change("record", {session: now.session, on: !now.recording.on}));
stop.addEventListener("click", () => change("stop", {session: now.session}));

const again = button("Replay it here");
async function open(key, where) { if (await change("open", {recording: key}, where)) location.href = view(key); }
again.addEventListener("click", () => open(again.dataset.key, said));
/** At a session's end, its recording can be played where recordings can be opened. */
function showEnd(s) {
  const path = s.ended && s.ended.recording || "", mine = path && (now.recordings || []).find(v => path === v.path);
  again.hidden = !mine;
  if (mine) again.dataset.key = mine.key;
}

// ---- labels with buttons, beside the box to type one

const labels = make("div");
labels.id = "c-labels"; labels.setAttribute("role", "group"); labels.setAttribute("aria-label", "Labels: the pressed one holds from now on");
function showLabels(s) {
  const holds = s.labels.length ? s.labels[0].text : "";
  labels.hidden = !now.labels.length || Boolean(s.replay);
  fill(labels, [...now.labels, "none"], () => {
    const el = button("");
    el.addEventListener("click", async () => { const why = await post("text", "/label " + el.textContent); if (why) { set($("typing"), why); $("typing").className = "why bad"; } });
    return el;
  }, (el, text) => { set(el, text); el.disabled = !s.typing.possible; el.setAttribute("aria-pressed", String(text === holds && text !== "none")); });
}

// ---- without a session: start one, open a recording

const start = make("div"), form = make("form"), choices = {}, running = make("ul"), files = make("ul"), answer = make("p", "why"), problem = make("p", "why");
function field(text, input, id) {
  const label = make("label");
  label.htmlFor = input.id = id; set(label, text);
  form.append(label, input);
  return input;
}
function build() {
  start.id = "c-start"; form.id = "c-form"; form.autocomplete = "off"; running.id = "c-running"; files.id = "c-files"; answer.id = "c-answer";
  answer.setAttribute("role", "status"); answer.hidden = true;
  choices.name = field("Name", make("input"), "c-name");
  choices.name.type = "text"; choices.name.maxLength = 64; choices.name.value = "live"; choices.name.required = true;
  for (const [name, text] of Object.entries(SOURCES)) choices[name] = field(text, make("select"), "c-" + name);
  choices.model = field("Model", make("select"), "c-model");
  choices.record = field("Record from the start", make("input"), "c-from-start");
  choices.record.type = "checkbox";
  const begin = button("Start", "main"), look = button("Look for devices again"), line = make("p", "line");
  begin.type = "submit"; begin.id = "c-begin"; look.id = "c-look";
  look.addEventListener("click", () => change("look", {}, answer));
  line.append(begin, look);
  form.append(line, problem, answer);
  form.addEventListener("submit", async event => {
    event.preventDefault();
    const body = {name: choices.name.value.trim(), record: choices.record.checked};
    for (const name of [...Object.keys(SOURCES), "model"]) body[name] = choices[name].value;
    const known = new Set(now.started.map(v => v.number));
    if (await change("start", body, answer)) { earlier = known; waitingFor = body.name; set(answer, `starting ${body.name} …`); answer.hidden = false; }
  });
  for (const [title, el] of [["Start a session", form], ["Sessions", running], ["Recordings", files]]) {
    const section = make("section"), h2 = make("h2");
    set(h2, title); section.append(h2, el); start.append(section);
  }
  $("main").before(start);
}
function options(select, offered) {
  const before = select.value, known = offered.map(v => v.value).join("\n");
  if (select.dataset.known === known) return;
  select.dataset.known = known;
  fill(select, offered, () => make("option"), (el, v) => { el.value = v.value; set(el, v.value === v.is || ["none", "synthetic", "page", "microphone"].includes(v.value) ? v.is : `${v.value}, ${v.is}`); el.title = v.value; });
  if (offered.some(v => v.value === before)) select.value = before;
}
function showStart(c) {
  start.hidden = !c.idle; $("main").hidden = c.idle; document.documentElement.classList.toggle("idle", c.idle);
  if (!c.idle) return;
  for (const name of Object.keys(SOURCES)) options(choices[name], c.offers[name]);
  options(choices.model, c.offers.models);
  $("c-look").disabled = c.offers.looking;
  set(problem, c.offers.looking ? "looking for cameras and microphones …" : c.offers.problem); problem.hidden = !problem.textContent;
  const others = c.sessions.filter(v => !c.started.some(w => w.key === v.key)).map(v => ({...v, state: "running", why: "", file: ""}));
  fill(running, [...c.started, ...others].reverse(), () => { const li = row(); li.append(make("p", "why")); return li; }, (li, v) => {
    const [a, span, why] = li.children;
    set(a, v.name); set(span, v.state); span.className = "state " + ({running: "good", failed: "bad"}[v.state] || "none");
    if (v.key) a.href = view(v.key); else a.removeAttribute("href");
    set(why, v.why || (v.file ? `recorded: ${v.file}` : "")); why.hidden = !why.textContent;
  });
  running.dataset.empty = running.children.length ? "" : "no session is running";
  fill(files, c.recordings, () => {
    const li = make("li"), el = button("Open");
    li.append(make("span", "name"), make("span", "note"), el);
    el.addEventListener("click", () => open(el.dataset.key, answer));
    return li;
  }, (li, v) => {
    const [name, about, el] = li.children;
    set(name, v.name); set(about, v.being_written ? "being recorded" : size(v.bytes)); el.dataset.key = v.key; el.disabled = v.being_written;
    el.ariaLabel = `Open ${v.name}`;
  });
  files.dataset.empty = c.recordings.length ? "" : "no recording yet";
  if (!waitingFor) return;
  const mine = c.started.findLast(v => v.name === waitingFor && !earlier.has(v.number));
  if (mine && mine.key) location.href = view(mine.key);
  else if (mine && mine.state !== "starting") { set(answer, mine.why || `${mine.name} has ended`); answer.className = "why bad"; waitingFor = ""; }
}
const size = bytes => bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;

function begin(element) {
  element.append(menu, record, stop);
  document.querySelector("header").after(said); said.hidden = true;
  $("mark").after(labels);
  $("ended-actions").append(again);
  build(); start.hidden = true;
}
export {begin as start};
export function show(s) {
  now = s.controls;
  if (!now) return;
  showMenu(now); showButtons(now, Boolean(s.replay)); showLabels(s); showEnd(s); showStart(now);
}
