// A client of `stream-mmrnn serve` for Node 18 and newer. docs/serve.md describes the protocol, README.md beside this
// file the calls.
//
// npm's `zeromq` carries the messages and connects again by itself; `@msgpack/msgpack` encodes them. When the server
// comes back, each session is opened again with its token, and the ticks that the server has not seen are sent again.
// Integers beyond 2^53 are BigInt.

import { readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

export const VERSION = 1;
const MAX_BYTES = 2 ** 20; // of a message
const KEPT_TICKS = 256; // of each session: more than a server steps between two snapshots
const POLL_MS = 100;
const ASK_AGAIN_MS = 1000; // without an answer for so long, a tick may have been lost with the server
const SESSION_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;
const KEY = /^[0-9a-zA-Z.\-:+=^!/*?&<>()[\]{}@%$#]{40}$/;
const DECODE = { useBigInt64: true, maxStrLength: MAX_BYTES, maxArrayLength: 2 ** 16, maxMapLength: 2 ** 10 };

export class ServeError extends Error {
  /** `code`: busy, unknown, duplicate, evicted, bad_tick, bad_message, overrun, failed, timed_out, keys, closed. */
  constructor(code, message, more = {}) {
    super(message);
    this.name = "ServeError";
    this.code = code;
    Object.assign(this, more);
  }
}

// ---- values ---------------------------------------------------------------------------------------------------------

function vectorBytes(value) {
  const vector = value instanceof Float32Array ? value : Float32Array.from(value);
  const view = new DataView(new ArrayBuffer(4 * vector.length));
  vector.forEach((x, i) => view.setFloat32(4 * i, x, true));
  return new Uint8Array(view.buffer);
}

function vectorOf(raw) {
  const view = new DataView(raw.buffer, raw.byteOffset, raw.byteLength);
  return Float32Array.from({ length: raw.byteLength / 4 }, (_, i) => view.getFloat32(4 * i, true));
}

function byName(names, values) {
  return Object.fromEntries(names.map((name, i) => [name, values[i]]));
}

/** A 64-bit integer as a BigInt: msgpack would write `Date.now() * 1e6` as a float. */
function int64(value, what, tick) {
  if (typeof value === "bigint" || Number.isInteger(value)) {
    const big = BigInt(value);
    if (BigInt.asIntN(64, big) === big) return big;
  }
  throw new ServeError("bad_tick", `${what} of tick ${tick} is ${value}; expected a 64-bit integer`, { tick });
}

/** The same value with numbers instead of BigInts where they fit. */
function narrowed(value) {
  if (typeof value === "bigint") return Number.isSafeInteger(Number(value)) ? Number(value) : value;
  if (Array.isArray(value)) return value.map(narrowed);
  if (value === null || typeof value !== "object" || value instanceof Uint8Array) return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, narrowed(item)]));
}

// ---- keys -----------------------------------------------------------------------------------------------------------

function readKey(folder, file, kind) {
  const path = join(folder, file);
  let text;
  try {
    if (process.platform !== "win32" && statSync(path).mode & 0o077)
      throw new Error("others can read it; run chmod 600");
    text = readFileSync(path, "ascii");
  } catch (error) {
    throw new ServeError("keys", `the key ${path} cannot be used: ${error.message}`);
  }
  const found = new RegExp(`^${kind} = "(.*)"$`, "m").exec(text);
  if (!found || !KEY.test(found[1])) throw new ServeError("keys", `${path} holds no key pair; make one with stream-mmrnn keys new`);
  return found[1];
}

/** CURVE options from a folder of `stream-mmrnn keys new`; without `serverKey` the folder is the server's own. */
function curveOptions(folder, serverKey) {
  if (serverKey && !KEY.test(serverKey))
    throw new ServeError("keys", `${serverKey} is no public key; expected the 40 characters that keys new prints`);
  return {
    curvePublicKey: readKey(folder, "client.key", "public"),
    curveSecretKey: readKey(folder, "client.key", "secret"),
    curveServerKey: serverKey || readKey(folder, "server.key", "public"),
  };
}

// ---- the client -----------------------------------------------------------------------------------------------------

/** A promise with its `resolve` and `reject`, which rejects with `late()` after a time. */
class Pending {
  constructor(timeoutMs, late) {
    this.promise = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    this.timer = setTimeout(() => this.reject(late()), timeoutMs);
    this.promise.catch(() => {}).finally(() => clearTimeout(this.timer));
  }
}

/**
 * Connect to `tcp://HOST:PORT`; a Client. `keys`: a folder of `stream-mmrnn keys new`, where the server asks for keys;
 * `serverKey`: the server's public key then. Rejects with a ServeError.
 */
export async function connect(address, { timeoutMs = 5000, keys = null, serverKey = "" } = {}) {
  const client = new Client(address, timeoutMs, keys === null ? {} : curveOptions(keys, serverKey));
  try {
    await client.greet();
    return client;
  } catch (error) {
    client.close();
    throw error;
  }
}

class Client {
  constructor(address, timeoutMs, options) {
    this.address = address;
    this.timeoutMs = timeoutMs;
    this.sessions = new Map();
    this.model = null;
    this.error = null;
    this.welcome = null;
    this.out = [];
    this.isSending = false;
    this.socket = new Dealer({
      linger: 500,
      maxMessageSize: MAX_BYTES,
      reconnectInterval: 50,
      reconnectMaxInterval: 1000,
      heartbeatInterval: 2000,
      heartbeatTimeout: 6000,
      ...options,
    });
    try {
      this.socket.connect(address);
    } catch (error) {
      this.socket.close();
      throw new ServeError("closed", `${address} is no address (${error.message}); expected tcp://HOST:PORT`);
    }
    this.listen();
    this.timer = setInterval(() => this.poll(), POLL_MS);
  }

  async listen() {
    try {
      for await (const frames of this.socket) if (frames.length === 1) this.receive(frames[0]);
    } catch (error) {
      this.fail(new ServeError("closed", error.message));
    }
  }

  greet() {
    this.welcome = new Pending(this.timeoutMs, () => {
      const hint = "start one with stream-mmrnn serve, and check that it allows your key";
      return new ServeError("closed", `no server answers at ${this.address}: ${hint}`);
    });
    this.send(encode({ op: "hello", version: VERSION }));
    return this.welcome.promise;
  }

  send(content) {
    this.out.push(content);
    this.drain();
  }

  /** Hand messages to the socket, one after the other: it refuses a second one while it waits for room. */
  async drain() {
    if (this.isSending) return;
    this.isSending = true;
    try {
      while (this.out.length && !this.error) await this.socket.send(this.out.shift());
    } catch (error) {
      this.fail(new ServeError("closed", error.message));
    } finally {
      this.isSending = false;
    }
  }

  /** A session; with its `token` one that was open before, from anywhere. */
  async open(name, { token = null } = {}) {
    if (this.error) throw this.error;
    if (!SESSION_NAME.test(name))
      throw new ServeError("failed", `a session cannot be called ${name}; expected ${SESSION_NAME.source}`);
    if (token !== null && (typeof token !== "string" || token.length > 128))
      throw new ServeError("unknown", "this is no token; expected the text of session.token");
    if (this.sessions.has(name)) throw new ServeError("duplicate", `session ${name} is open in this client already`);
    const session = new Session(this, name);
    this.sessions.set(name, session);
    try {
      await session.request("open", "ready", { token });
      return session;
    } catch (error) {
      session.end(error);
      throw error;
    }
  }

  receive(raw) {
    try {
      const reply = narrowed(decode(raw, DECODE));
      if (reply?.op === "welcome") this.onWelcome(reply);
      else if (reply?.op === "refused" && !reply.session) this.fail(new ServeError(reply.error, reply.why));
      else this.sessions.get(reply?.session)?.receive(reply);
    } catch {
      // not a message of the protocol: ignored
    }
  }

  onWelcome(reply) {
    if (reply.version !== VERSION)
      this.fail(new ServeError("closed", `the server has version ${reply.version} of the protocol, not ${VERSION}`));
    else if (!Array.isArray(reply.modalities) || !Array.isArray(reply.heads) || !(reply.queue > 0))
      this.fail(new ServeError("closed", "the server's welcome does not describe a model"));
    else {
      this.model = reply;
      this.welcome.resolve();
    }
  }

  poll() {
    for (const session of [...this.sessions.values()]) session.poll();
  }

  fail(error) {
    if (this.error) return;
    this.error = error;
    clearInterval(this.timer);
    this.welcome?.reject(error);
    for (const session of [...this.sessions.values()]) session.end(error);
    this.socket.close();
  }

  /** Disconnect. Open sessions are not closed: their tokens bring them back. */
  close() {
    this.fail(new ServeError("closed", "this client is closed"));
  }
}

/** One session. `token` brings it back; `error`: why it is over here; `skipped`: ticks whose answers are lost. */
class Session {
  constructor(client, name) {
    this.client = client;
    this.name = name;
    this.token = "";
    this.nextTick = 0;
    this.resumed = false;
    this.error = null;
    this.skipped = 0;
    this.sent = new Map(); // by tick: { content, atMs }, to be sent again if the server comes back with an older state
    this.unanswered = new Map(); // by tick: { settle, askedMs }
    this.toSend = []; // [tick, bytes] until the server has room; [null, bytes]: a request that comes after them
    this.onTheWay = new Set();
    this.isReopening = false;
    this.pending = null; // { op, reply, pending } of the request that has no reply yet
    this.sending = 0; // ticks of `send` without an answer
    this.outcomes = []; // of ticks of `send`, not read yet
    this.wake = () => {};
  }

  /**
   * Send one tick; a promise of its answer, null where the session had this tick already.
   * `features`: a Float32Array by modality; one that is missing is absent. `tick`: its number, the next one if not
   * given. `eventNs`: its end by your clock, a number or BigInt, returned with the answer. `ageNs`: by modality, how
   * old the newest sample is at that end.
   */
  async step(features, { timeoutMs = this.client.timeoutMs, ...more } = {}) {
    let tick = null;
    const pending = new Pending(timeoutMs, () => {
      this.unanswered.delete(tick);
      return new ServeError("timed_out", `tick ${tick} had no answer in ${timeoutMs} ms`, { tick });
    });
    const settle = (outcome) => (outcome instanceof Error ? pending.reject(outcome) : pending.resolve(outcome));
    try {
      tick = this.put(features, more, settle);
    } catch (error) {
      pending.reject(error);
    }
    return pending.promise;
  }

  /** Send one tick and do not wait; its number. `answers` yields its answer. Throws what `step` rejects with. */
  send(features, more = {}) {
    const tick = this.put(features, more, (outcome) => {
      this.sending--;
      if (outcome !== null) this.outcomes.push(outcome);
      this.wake();
    });
    this.sending++;
    return tick;
  }

  /** Answers to ticks of `send` as they come, until all have one; throws the error that a tick got instead. */
  async *answers({ timeoutMs = this.client.timeoutMs } = {}) {
    for (;;) {
      if (this.outcomes.length) {
        const outcome = this.outcomes.shift();
        if (outcome instanceof Error) throw outcome;
        yield outcome;
      } else if (this.sending) {
        const late = () => new ServeError("timed_out", `${this.sending} ticks had no answer in ${timeoutMs} ms`);
        const pending = new Pending(timeoutMs, late);
        this.wake = pending.resolve;
        await pending.promise;
      } else return;
    }
  }

  put(features, { tick = this.nextTick, eventNs = 0, ageNs = null }, settle) {
    if (this.error) throw this.error;
    if (!Number.isSafeInteger(tick) || tick < 0)
      throw new ServeError("bad_tick", `${tick} is no number of a tick; expected an integer from 0 on`);
    if (this.unanswered.has(tick) || this.onTheWay.has(tick))
      throw new ServeError("bad_tick", `tick ${tick} was sent already and has no answer yet`, { tick });
    if (this.unanswered.size + this.outcomes.length >= KEPT_TICKS) {
      const why = `${KEPT_TICKS} ticks of session ${this.name} wait for an answer or to be read; read, and send slower`;
      throw new ServeError("overrun", why, { tick });
    }
    const content = this.encoded(features, tick, eventNs, ageNs);
    const atMs = performance.now();
    this.nextTick = Math.max(this.nextTick, tick + 1);
    this.sent.set(tick, { content, atMs });
    this.unanswered.set(tick, { settle, askedMs: atMs });
    this.toSend.push([tick, content]);
    this.trim();
    this.pump();
    return tick;
  }

  encoded(features, tick, eventNs, ageNs) {
    const { modalities } = this.client.model;
    const unknown = Object.keys(features).find((name) => !modalities.some((m) => m.name === name));
    if (unknown !== undefined) throw new ServeError("bad_tick", `the model has no modality ${unknown}`, { tick });
    const age = (name) => int64(ageNs[name] ?? (features[name] == null ? -1 : 0), `ageNs.${name}`, tick);
    const message = {
      op: "step",
      session: this.name,
      tick: BigInt(tick),
      event_ns: int64(eventNs, "eventNs", tick),
      features: modalities.map((m) => (features[m.name] == null ? null : vectorBytes(features[m.name]))),
      age_ns: ageNs ? modalities.map((m) => age(m.name)) : [],
    };
    const content = encode(message, { useBigInt64: true });
    if (content.length > MAX_BYTES) {
      const why = `tick ${tick} has ${content.length} bytes; a message has at most ${MAX_BYTES}`;
      throw new ServeError("bad_tick", why, { tick });
    }
    return content;
  }

  /** Forget the oldest ticks that were sent, beyond `KEPT_TICKS`. */
  trim() {
    const waiting = new Set(this.toSend.map(([tick]) => tick));
    for (const tick of this.sent.keys()) {
      if (this.sent.size <= KEPT_TICKS || waiting.has(tick)) return;
      this.sent.delete(tick);
    }
  }

  /** Send as many ticks as the server's queue takes: it refuses one more. */
  pump() {
    const hasRoom = () => this.toSend[0][0] === null || this.onTheWay.size < this.client.model.queue;
    while (this.toSend.length && !this.isReopening && hasRoom()) {
      const [tick, content] = this.toSend.shift();
      if (tick !== null) this.onTheWay.add(tick);
      this.client.send(content);
    }
  }

  // ---- what the server says ------------------------------------------------------------------------------------------

  receive(reply) {
    if (!this.token && !["ready", "busy", "refused"].includes(reply.op)) return; // of an earlier session of this name
    switch (reply.op) {
      case "pred": return this.settle(reply.tick, this.answer(reply));
      case "skipped": return this.settle(reply.tick, null);
      case "ready": return this.onReady(reply);
      case "busy": return this.onBusy(reply);
      case "evicted": return this.onEvicted(reply);
      case "refused": return this.onRefused(reply);
      case "flushed":
      case "done":
        if (this.pending?.reply === reply.op) this.pending.resolve(reply);
    }
  }

  answer(reply) {
    const modalities = this.client.model.modalities.map((m) => m.name);
    const heads = this.client.model.heads.map((h) => h.name);
    return {
      session: this.name,
      tick: reply.tick,
      eventNs: reply.event_ns,
      heads: byName(heads, reply.heads.map(vectorOf)),
      present: byName(modalities, reply.present),
      ageNs: byName(modalities, reply.age_ns),
      waitedNs: reply.waited_ns,
      stepNs: reply.step_ns,
      roundTripMs: performance.now() - (this.sent.get(reply.tick)?.atMs ?? NaN),
      model: reply.model,
    };
  }

  /** The server is done with a tick. A tick that was answered before the server came back is ignored. */
  settle(tick, outcome) {
    const waiting = this.unanswered.get(tick);
    this.unanswered.delete(tick);
    this.onTheWay.delete(tick);
    this.pump();
    if (waiting && outcome === null) this.skipped++;
    waiting?.settle(outcome);
  }

  onReady(reply) {
    const isFirst = !this.token;
    this.token = reply.token;
    if (isFirst) {
      this.nextTick = reply.next;
      this.resumed = reply.resumed;
      this.pending?.resolve(reply);
    } else if (this.isReopening) this.sendAgain(reply.next);
  }

  onBusy(reply) {
    // while reopening, `poll` asks again
    if (!this.isReopening) this.pending?.reject(new ServeError("busy", reply.why, { retryS: reply.retry_s }));
  }

  onEvicted(reply) {
    if (reply.reason === "taken")
      this.end(new ServeError("evicted", `another client has taken session ${this.name} over by its token`, reply));
    else if (this.unanswered.size) this.reopen();
    // else: the next tick is refused, and opens the session again
  }

  onRefused(reply) {
    const error = new ServeError(reply.error, reply.why, { tick: reply.tick });
    if (reply.tick >= 0) {
      if (reply.error === "evicted" || reply.error === "unknown") this.reopen();
      else this.settle(reply.tick, error);
    } else if (this.isReopening) this.end(error);
    else this.pending?.reject(error);
  }

  // ---- reconnect -----------------------------------------------------------------------------------------------------

  /** Open the session again, if a tick has had no answer for long: a server that was restarted never had it. */
  poll() {
    const [oldest] = this.unanswered.values();
    const nowMs = performance.now();
    if (!this.token || !oldest || nowMs - oldest.askedMs < ASK_AGAIN_MS) return;
    oldest.askedMs = nowMs;
    this.isReopening = false;
    this.reopen();
  }

  reopen() {
    if (!this.token || this.isReopening) return;
    this.isReopening = true;
    this.client.send(encode({ op: "open", session: this.name, token: this.token }));
  }

  /** The server has all ticks before `next`: send the others again, in order. */
  sendAgain(next) {
    for (const tick of [...this.unanswered.keys()]) if (tick < next) this.settle(tick, null);
    const [oldest] = this.sent.keys();
    if (this.nextTick > next && oldest > next) {
      const why = `the server has session ${this.name} as of tick ${next}, and ticks before ${oldest} are not kept here`;
      return this.end(new ServeError("evicted", `${why}; close it, or open it again and send them`));
    }
    const toSend = this.toSend.filter(([tick]) => tick === null || tick >= next);
    const queued = new Set(toSend.map(([tick]) => tick));
    const lost = [...this.sent].filter(([tick]) => tick >= next && !queued.has(tick));
    const nowMs = performance.now();
    for (const waiting of this.unanswered.values()) waiting.askedMs = nowMs;
    this.onTheWay.clear();
    this.toSend = [...lost.map(([tick, { content }]) => [tick, content]), ...toSend];
    this.isReopening = false;
    return this.pump();
  }

  // ---- requests ------------------------------------------------------------------------------------------------------

  /** Send a request after the ticks before it, and wait for its reply. One at a time. */
  async request(op, reply, more = {}) {
    if (this.error) throw this.error;
    if (this.pending) throw new ServeError("failed", `session ${this.name} waits for the reply to another request`);
    const pending = new Pending(this.client.timeoutMs, () => {
      const error = new ServeError("timed_out", `there was no reply to ${op} in ${this.client.timeoutMs} ms`);
      this.end(error); // otherwise a late reply would be taken for that of the next request
      return error;
    });
    this.pending = Object.assign(pending, { reply });
    this.toSend.push([null, encode({ op, session: this.name, ...more })]);
    this.pump();
    try {
      return await pending.promise;
    } finally {
      this.pending = null;
    }
  }

  /** Wait until every tick sent before is answered and the state is on the server's disk; the tick after that. */
  async flush() {
    return (await this.request("flush", "flushed")).next;
  }

  /** Start the state anew; tick numbers go on. */
  async reset() {
    await this.request("reset", "done");
    for (const tick of [...this.sent.keys()]) if (!this.unanswered.has(tick)) this.sent.delete(tick);
  }

  /** End the session; the server deletes its state. Does nothing where the session is over here already. */
  async close() {
    if (this.error) return;
    await this.request("close", "done", { token: this.token });
    this.end(new ServeError("closed", `session ${this.name} is closed`));
  }

  end(error) {
    if (this.error) return;
    this.error = error;
    this.toSend = [];
    this.pending?.reject(error);
    // another session may have this name by now
    if (this.client.sessions.get(this.name) === this) this.client.sessions.delete(this.name);
    for (const tick of [...this.unanswered.keys()]) this.settle(tick, error);
  }
}
