// This browser as camera and microphone of the session: one WebSocket carries what they give. The server says which
// streams it takes and who gives them; its pings measure this browser's clock.
import {announce, fill, make, number, set} from "./dom.js";
import {openCamera, openMicrophone, reason} from "./sensor_devices.js";

const HEADER_BYTES = 24, VERSION = 1;
const MAX_WAITING = {vision: 2, audio: 100};  // samples here, beside those that the socket holds
const MAX_BUFFERED = {vision: 128 * 1024, audio: 1024 * 1024};  // bytes that the socket may hold for a further sample
const AGAIN_MS = 1000, FLUSH_MS = 20, GIVE_UP_MS = 60000;
const NAMES = {vision: "camera", audio: "microphone"};
// this page, so that it gets its streams back at once after a lost connection
const tab = [...crypto.getRandomValues(new Uint8Array(16))].map(b => b.toString(16).padStart(2, "0")).join("");
const sensors = new Map();
let socket = null, specs = null, lostAt = 0, flushing = 0, lock = null, wait = [];

class Sensor {
  constructor(name, kind) {
    this.name = name; this.kind = kind;
    this.device = null; this.wanted = false; this.sending = false; this.note = "";
    this.attempt = 0; this.begun = false; this.number = 0; this.dropped = 0; this.waiting = [];
  }
  async begin() {
    const mine = ++this.attempt;
    this.wanted = true; this.note = `waiting for the ${NAMES[this.kind]}`;
    draw();
    await connected();
    if (mine !== this.attempt) return;
    if (!navigator.mediaDevices) { this.end("insecure"); return; }
    const open = this.kind === "vision" ? openCamera : openMicrophone;
    let device = null;
    try {
      device = await open(specs[this.index], (clock, seconds, bytes) => this.give(clock, seconds, bytes));
    } catch (error) {
      if (mine === this.attempt) this.end(reason(error));
      return;
    }
    if (mine !== this.attempt) { device.close(); return; }
    this.device = device; this.note = "";
    device.track.onended = () => this.end("ended");
    this.start();
  }
  get index() { return specs ? specs.findIndex(spec => spec.name === this.name) : -1; }
  start() {
    if (this.device && !(this.kind === "vision" && document.hidden)) tell({op: "start", stream: this.name, tab, rate_hz: this.device.rate_hz});
  }
  pause(why) { this.sending = false; this.waiting = []; tell({op: "stop", stream: this.name, why}); }
  end(why) {
    if (this.device) this.device.close();
    this.attempt++; this.device = null; this.wanted = this.begun = this.sending = false; this.waiting = []; this.note = "";
    if (why) tell({op: "stop", stream: this.name, why});
    if (!anyWanted()) disconnect();
    draw();
  }
  // numbered here, so that the server counts what is dropped from here on as missing
  give(clock, device, bytes) {
    if (!this.begun) return;
    const mine = this.number++;
    if (!this.sending || !bytes) { this.dropped++; return; }
    const message = new Uint8Array(HEADER_BYTES + bytes.byteLength), head = new DataView(message.buffer);
    head.setUint8(0, VERSION); head.setUint8(1, this.index); head.setUint32(4, mine, true);
    head.setFloat64(8, clock, true); head.setFloat64(16, device, true);
    message.set(new Uint8Array(bytes), HEADER_BYTES);
    this.waiting.push(message);
    while (this.waiting.length > MAX_WAITING[this.kind]) { this.waiting.shift(); this.dropped++; }
    flush();
  }
}

function flush() {
  clearTimeout(flushing);
  let left = 0;
  // sound first: it is small, and words need all of it
  for (const sensor of [...sensors.values()].sort((a, b) => a.kind.localeCompare(b.kind))) {
    while (sensor.waiting.length && socket && socket.bufferedAmount < MAX_BUFFERED[sensor.kind]) socket.send(sensor.waiting.shift());
    left += sensor.waiting.length;
  }
  if (left) flushing = setTimeout(flush, FLUSH_MS);
}
const anyWanted = () => [...sensors.values()].some(sensor => sensor.wanted);
function disconnect() {
  if (socket) socket.close();
  if (lock) lock.release();
  socket = specs = lock = null; lostAt = 0; wait = [];
}
function giveUp(why) {
  for (const sensor of sensors.values()) {
    if (!sensor.wanted) continue;
    sensor.end("");
    sensor.note = `${why}, and the ${NAMES[sensor.kind]} was switched off`;
  }
}
function tell(message) { if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message)); }

function connected() {
  if (specs && socket) return Promise.resolve();
  return new Promise(done => { wait.push(done); if (!socket) connect(); });
}
function connect() {
  const address = new URL("sensors", location.href);
  address.protocol = address.protocol.replace("http", "ws");
  const mine = socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = event => receive(JSON.parse(event.data), performance.now());
  socket.onclose = () => {
    if (socket !== mine) return;
    socket = specs = null;
    for (const sensor of sensors.values()) { sensor.sending = false; sensor.waiting = []; }
    lostAt = lostAt || performance.now();
    if (performance.now() - lostAt < GIVE_UP_MS) setTimeout(() => { if (!socket && anyWanted()) connect(); }, AGAIN_MS);
    else giveUp("the session was away for a minute");
    draw();
  };
}
function receive(message, at) {
  const sensor = sensors.get(message.stream);
  if (message.op === "ping") tell({op: "pong", number: message.number, received_ms: at, replied_ms: performance.now()});
  else if (message.op === "welcome") {
    specs = message.streams; lostAt = 0;
    for (const done of wait.splice(0)) done();
    for (const each of sensors.values()) each.start();
  } else if (message.op === "started" && sensor) { sensor.sending = sensor.begun = true; keepAwake(); draw(); announce(`this browser is the ${NAMES[sensor.kind]}`); }
  else if (message.op === "refused" && sensor) { sensor.end(""); sensor.note = message.why; draw(); announce(message.why); }
}
// a phone that locks its screen ends both
async function keepAwake() {
  try { if (navigator.wakeLock && !lock) { lock = await navigator.wakeLock.request("screen"); lock.onrelease = () => { lock = null; }; } } catch { /* the battery is low */ }
}
document.addEventListener("visibilitychange", () => {
  for (const sensor of sensors.values()) {
    if (!sensor.device) continue;
    if (sensor.kind === "vision") { if (document.hidden) sensor.pause("hidden"); else sensor.start(); }
    if (!document.hidden) keepAwake();
  }
});

// ---- what a person sees

let list = null, states = {};
export function start(element) {
  if (location.pathname.startsWith("/view/")) return;  // another session, whose browsers open its own page
  element.className = "sensors"; element.setAttribute("role", "group"); element.setAttribute("aria-label", "This browser as a sensor");
  list = element;
}
export function show(state) {
  for (const {stream, kind} of state.sensors || []) if (!sensors.has(stream)) sensors.set(stream, new Sensor(stream, kind));
  states = state.streams;
  if (state.ended) giveUp("the session has ended");
  draw();
}
function draw() {
  if (!list) return;
  fill(list, [...sensors.values()], sensor => {
    const row = make("div"), button = make("button"), note = make("p", "why");
    button.type = "button"; note.setAttribute("role", "status"); note.id = `sensor-${sensor.name}`; button.setAttribute("aria-describedby", note.id);
    button.addEventListener("click", () => { if (sensor.wanted) sensor.end("stopped"); else sensor.begin(); });
    row.append(button, note);
    return row;
  }, (row, sensor) => {
    const [button, note] = row.children, named = sensor.name === sensor.kind ? "" : ` for ${sensor.name}`;
    const about = states[`feature/${sensor.name}`] || {}, taken = !sensor.wanted && ["open", "stale"].includes(about.state);
    button.disabled = taken;
    set(button, `${sensor.wanted ? "Stop" : "Use"} this ${NAMES[sensor.kind]}${named}`);
    const dropped = sensor.dropped ? `, ${number(sensor.dropped)} ${sensor.kind === "vision" ? "pictures" : "blocks"} dropped here` : "";
    set(note, sensor.sending ? `this browser is the ${NAMES[sensor.kind]}${dropped}` : sensor.note || (sensor.wanted ? "connecting to the session" : taken ? "another browser gives it" : about.reason || ""));
  });
}
