// The picture and the sound: each is fetched separately, one request at a time.
import {$, set, age} from "./dom.js";
import {paint, ramp} from "./theme.js";
import {HISTORY_MS, LEFT, context} from "./plot.js";
const BANDS = 64, COLUMNS = 750;

const picture = {shown: 0, busy: false};
export function showPicture(s) {
  $("main").classList.toggle("no-camera", !s.picture.number && !s.inputs.some(v => v.kind === "vision" && v.connected));
  set($("camera-age"), s.picture.age_ms == null ? "\u00a0" : age(s.picture.age_ms) + " old");
  if (picture.busy || !s.picture.number || s.picture.number === picture.shown) return;
  const image = new Image(), wanted = s.picture.number;
  picture.busy = true;
  image.src = "picture.jpg?" + wanted;
  image.decode().then(() => {
    const canvas = $("picture");
    if (canvas.width !== image.naturalWidth || canvas.height !== image.naturalHeight) {
      canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
      canvas.parentElement.style.aspectRatio = `${canvas.width} / ${canvas.height}`;
    }
    canvas.getContext("2d").drawImage(image, 0, 0);
    canvas.hidden = false; $("no-picture").hidden = true; picture.shown = wanted;
  }).catch(() => {}).finally(() => { picture.busy = false; });
}
const sound = {columns: new Map(), newest: -1, busy: false, image: new OffscreenCanvas(COLUMNS, BANDS)};
function fetchSound(s) {
  if (s.sound.newest < sound.newest || s.sound.newest - sound.newest > COLUMNS) { sound.columns.clear(); sound.newest = -1; }
  if (sound.busy || s.sound.newest <= sound.newest) return;
  sound.busy = true;
  fetch("sound?since=" + Math.max(0, sound.newest + 1)).then(async answer => {
    if (!answer.ok) return;
    const first = Number(answer.headers.get("X-First")), bytes = new Uint8Array(await answer.arrayBuffer());
    for (let i = 0; i * BANDS < bytes.length; i++) sound.columns.set(first + i, bytes.subarray(i * BANDS, (i + 1) * BANDS));
    if (bytes.length) sound.newest = first + bytes.length / BANDS - 1;
    for (const key of sound.columns.keys()) if (key <= sound.newest - COLUMNS) sound.columns.delete(key);
  }).catch(() => {}).finally(() => { sound.busy = false; });
}
export function showSound(s) {
  $("lane-sound").hidden = s.sound.level_db == null && !s.inputs.some(v => v.kind === "audio" && v.connected);
  fetchSound(s);
  const v = s.sound, current = v.level_db != null && v.age_ms < 1500;
  set($("level-db"), v.level_db == null ? "–" : String(Math.round(v.level_db)).replace("-", "−"));
  set($("level-what"), v.level_db == null ? "no sound yet" : current ? `peak ${String(Math.round(v.peak_db)).replace("-", "−")} dB` : "silent for " + age(v.age_ms));
  const part = db => Math.min(100, Math.max(0, (db + 72) / 72 * 100));
  $("level-bar").style.width = (current ? part(v.level_db) : 0) + "%"; $("level-peak").style.left = (current ? part(v.peak_db) : -9) + "%";
  const c = context($("spectrogram"));
  if (!c) return;
  const {g, w, h} = c, colours = ramp(), image = new ImageData(COLUMNS, BANDS), pixels = new Uint32Array(image.data.buffer), words = new Uint32Array(colours.buffer);
  pixels.fill(words[0]);
  // the image ends at the newest column of the state; columns that were not fetched yet stay empty
  const last = v.newest;
  for (let i = 0; i < COLUMNS; i++) {
    const column = sound.columns.get(last - COLUMNS + 1 + i);
    if (column) for (let b = 0; b < BANDS; b++) pixels[(BANDS - 1 - b) * COLUMNS + i] = words[column[b]];
  }
  sound.image.getContext("2d").putImageData(image, 0, 0);
  const width = w - LEFT, shift = Math.min(width, (v.age_ms || 0) / HISTORY_MS * width);
  g.fillStyle = `rgb(${colours[0]},${colours[1]},${colours[2]})`; g.fillRect(LEFT, 0, width, h);
  g.save(); g.beginPath(); g.rect(LEFT, 0, width, h); g.clip(); g.imageSmoothingEnabled = true;
  g.drawImage(sound.image, LEFT - shift, 0, width, h); g.restore();
  g.strokeStyle = paint("line"); g.strokeRect(LEFT + .5, .5, width - 1, h - 1);
  g.fillStyle = paint("quiet"); g.textAlign = "right";
  g.textBaseline = "top"; g.fillText("high", LEFT - 4, 0); g.textBaseline = "bottom"; g.fillText("low", LEFT - 4, h);
}
