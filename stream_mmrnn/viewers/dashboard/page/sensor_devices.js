// A camera as JPEG pictures, a microphone as blocks of sound. Each calls give(clockMs, deviceS, buffer), with null for a
// sample that was dropped; both times are those of the sample's end.
import {make} from "./dom.js";

// the session's encoders were trained on plain sound
const PLAIN = {echoCancellation: false, noiseSuppression: false, autoGainControl: false};
const WHY = {NotAllowedError: "refused", SecurityError: "refused", NotFoundError: "none", OverconstrainedError: "none"};

// why a device cannot be used, in the words that the server knows
export const reason = error => WHY[error.name] || "busy";

export async function openCamera(spec, give) {
  const size = {width: {ideal: spec.width}, height: {ideal: spec.height}, frameRate: {ideal: spec.rate_hz}};
  const stream = await navigator.mediaDevices.getUserMedia({video: size});
  const video = make("video"), canvas = make("canvas"), g = canvas.getContext("2d");
  const period = 1000 / spec.rate_hz;
  let open = true, busy = false, next = 0;
  video.muted = video.playsInline = true;
  video.srcObject = stream;
  const jpeg = () => new Promise(done => canvas.toBlob(done, "image/jpeg", spec.quality)).then(blob => blob.arrayBuffer());
  function frame(now, about) {
    if (!open) return;
    video.requestVideoFrameCallback(frame);
    if (now < next - 4) return;  // the browser calls at the display's rate, which is not the camera's
    next = Math.max(next, now - period) + period;
    // while a picture is being encoded the next one is dropped, and counted like any other
    if (busy) { give(0, 0, null); return; }
    const taken = about.captureTime, at = taken > now - 2000 && taken <= now ? taken : performance.now();
    const scale = Math.min(1, Math.max(spec.width, spec.height) / Math.max(video.videoWidth, video.videoHeight));
    const w = Math.max(1, Math.round(scale * video.videoWidth)), h = Math.max(1, Math.round(scale * video.videoHeight));
    if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
    g.drawImage(video, 0, 0, w, h);
    busy = true;
    jpeg().then(bytes => give(at, 0, bytes), () => give(0, 0, null)).finally(() => { busy = false; });
  }
  video.requestVideoFrameCallback(frame);
  try { await video.play(); } catch (error) { stream.getTracks().forEach(track => track.stop()); throw error; }
  const [track] = stream.getVideoTracks();
  return {track, rate_hz: 16000, close() { open = false; track.stop(); video.srcObject = null; }};
}

export async function openMicrophone(spec, give) {
  const stream = await navigator.mediaDevices.getUserMedia({audio: {channelCount: 1, ...PLAIN}});
  const track = stream.getAudioTracks()[0], delayMs = 1000 * (track.getSettings().latency || 0);
  let context = null;
  try {
    const made = await contextOf(stream);
    context = made.context;
    await context.audioWorklet.addModule("sensors_worklet.js");
    const frames = Math.round(spec.block_ms * context.sampleRate / 1000);
    const blocks = new AudioWorkletNode(context, "blocks", {processorOptions: {frames}});
    blocks.port.onmessage = ({data: {end, block}}) => give(performance.now() - delayMs, end / context.sampleRate, block.buffer);
    // its output is silence, but some browsers run only what reaches the loudspeaker
    made.source.connect(blocks).connect(context.destination);
    await context.resume();
  } catch (error) {
    track.stop();
    if (context) context.close();
    throw error;
  }
  return {track, rate_hz: context.sampleRate, close() { track.stop(); context.close(); }};
}

// at 16 kHz, or at the device's own rate where the browser does not convert: the server does then
async function contextOf(stream) {
  const context = new AudioContext({sampleRate: 16000});
  try {
    return {context, source: context.createMediaStreamSource(stream)};
  } catch {
    await context.close();
    const own = new AudioContext();
    return {context: own, source: own.createMediaStreamSource(stream)};
  }
}
