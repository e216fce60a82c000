// A client of `stream-mmrnn serve` for Node 18 and newer: one file, no dependencies. docs/serve.md has the protocol.
//
// It speaks ZMTP 3.1 (https://rfc.zeromq.org/spec/37/) as a DEALER without security, and msgpack as far as it is
// needed. Whole numbers beyond 2^53 come as BigInt. It does not connect again by itself: whoever connects anew opens
// the sessions by their tokens. README.md beside it says how to use it, and what it does not do.

import net from "node:net";

export const VERSION = 1;
const QUIET_MS = 10_000; // the server says something every 2 s
const MAX_BYTES = 2 ** 20; // of a message; a server hangs up on a longer one
const KEPT = 256; // ticks of a session that may have been sent and not read
const SESSION_NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/;

export class ServeError extends Error {
  /** `code`: busy, unknown, duplicate, evicted, bad_tick, bad_message, overrun, failed, timed_out, closed. */
  constructor(code, message, more = {}) {
    super(message);
    this.name = "ServeError";
    this.code = code;
    Object.assign(this, more);
  }
}

// ---- msgpack --------------------------------------------------------------------------------------------------------

export function encode(value) {
  const parts = [];
  write(value, parts);
  return Buffer.concat(parts);
}

function bytes(...numbers) {
  return Buffer.from(numbers);
}

function sized(tag8, tag16, tag32, length) {
  if (tag8 !== null && length < 1 << 8) return bytes(tag8, length);
  const head = Buffer.alloc(length < 1 << 16 ? 3 : 5);
  head[0] = length < 1 << 16 ? tag16 : tag32;
  if (length < 1 << 16) head.writeUInt16BE(length, 1);
  else head.writeUInt32BE(length, 1);
  return head;
}

function write(value, parts) {
  if (value === null || value === undefined) parts.push(bytes(0xc0));
  else if (value === true || value === false) parts.push(bytes(value ? 0xc3 : 0xc2));
  else if (typeof value === "bigint" || Number.isSafeInteger(value)) writeInteger(BigInt(value), parts);
  else if (typeof value === "number") {
    const head = Buffer.alloc(9);
    head[0] = 0xcb;
    head.writeDoubleBE(value, 1);
    parts.push(head);
  } else if (typeof value === "string") {
    const raw = Buffer.from(value, "utf8");
    parts.push(raw.length < 32 ? bytes(0xa0 | raw.length) : sized(0xd9, 0xda, 0xdb, raw.length), raw);
  } else if (value instanceof Uint8Array) parts.push(sized(0xc4, 0xc5, 0xc6, value.length), value);
  else if (Array.isArray(value)) {
    parts.push(value.length < 16 ? bytes(0x90 | value.length) : sized(null, 0xdc, 0xdd, value.length));
    for (const item of value) write(item, parts);
  } else if (typeof value === "object") {
    const entries = Object.entries(value);
    parts.push(entries.length < 16 ? bytes(0x80 | entries.length) : sized(null, 0xde, 0xdf, entries.length));
    for (const [key, item] of entries) {
      write(key, parts);
      write(item, parts);
    }
  } else throw new TypeError(`a ${typeof value} cannot be sent`);
}

function writeInteger(value, parts) {
  if (value >= 0n && value < 128n) return parts.push(bytes(Number(value)));
  if (value < 0n && value >= -32n) return parts.push(bytes(Number(value) + 256));
  const head = Buffer.alloc(9);
  head[0] = value < 0n ? 0xd3 : 0xcf;
  if (value < 0n) head.writeBigInt64BE(value, 1);
  else head.writeBigUInt64BE(value, 1);
  return parts.push(head);
}

export function decode(raw) {
  const reader = { raw, at: 0 };
  const value = read(reader, 0);
  if (reader.at !== raw.length) throw new RangeError("bytes follow the message");
  return value;
}

function take(reader, length) {
  const from = reader.at;
  if (length > reader.raw.length - from) throw new RangeError("the message ends in the middle");
  reader.at += length;
  return reader.raw.subarray(from, reader.at);
}

function number(big) {
  return big >= BigInt(Number.MIN_SAFE_INTEGER) && big <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(big) : big;
}

function count(reader, width) {
  return take(reader, width).readUIntBE(0, width);
}

function read(reader, depth) {
  if (depth > 32) throw new RangeError("the message is too deep");
  const tag = take(reader, 1)[0];
  if (tag < 0x80) return tag;
  if (tag < 0x90) return map(reader, tag & 0x0f, depth);
  if (tag < 0xa0) return list(reader, tag & 0x0f, depth);
  if (tag < 0xc0) return take(reader, tag & 0x1f).toString("utf8");
  if (tag >= 0xe0) return tag - 256;
  switch (tag) {
    case 0xc0: return null;
    case 0xc2: return false;
    case 0xc3: return true;
    case 0xc4: return take(reader, count(reader, 1));
    case 0xc5: return take(reader, count(reader, 2));
    case 0xc6: return take(reader, count(reader, 4));
    case 0xca: return take(reader, 4).readFloatBE(0);
    case 0xcb: return take(reader, 8).readDoubleBE(0);
    case 0xcc: return count(reader, 1);
    case 0xcd: return count(reader, 2);
    case 0xce: return count(reader, 4);
    case 0xcf: return number(take(reader, 8).readBigUInt64BE(0));
    case 0xd0: return take(reader, 1).readInt8(0);
    case 0xd1: return take(reader, 2).readInt16BE(0);
    case 0xd2: return take(reader, 4).readInt32BE(0);
    case 0xd3: return number(take(reader, 8).readBigInt64BE(0));
    case 0xd9: return take(reader, count(reader, 1)).toString("utf8");
    case 0xda: return take(reader, count(reader, 2)).toString("utf8");
    case 0xdb: return take(reader, count(reader, 4)).toString("utf8");
    case 0xdc: return list(reader, count(reader, 2), depth);
    case 0xdd: return list(reader, count(reader, 4), depth);
    case 0xde: return map(reader, count(reader, 2), depth);
    case 0xdf: return map(reader, count(reader, 4), depth);
    default: throw new RangeError(`0x${tag.toString(16)} is nothing that a server sends`);
  }
}

function list(reader, length, depth) {
  if (length > reader.raw.length - reader.at) throw new RangeError("the message ends in the middle");
  return Array.from({ length }, () => read(reader, depth + 1));
}

function map(reader, length, depth) {
  if (length > reader.raw.length - reader.at) throw new RangeError("the message ends in the middle");
  const found = Object.create(null);
  for (let i = 0; i < length; i++) {
    const key = read(reader, depth + 1);
    if (typeof key !== "string") throw new RangeError("a key is no text");
    found[key] = read(reader, depth + 1);
  }
  return found;
}

// ---- ZMTP -----------------------------------------------------------------------------------------------------------

const MORE = 1, LONG = 2, COMMAND = 4;
const GREETING = Buffer.alloc(64);
GREETING[0] = 0xff;
GREETING[9] = 0x7f;
GREETING[10] = 3; // version 3.1
GREETING[11] = 1;
GREETING.write("NULL", 12, "latin1");

function frame(flags, body) {
  if (body.length < 256) return Buffer.concat([bytes(flags, body.length), body]);
  const head = Buffer.alloc(9);
  head[0] = flags | LONG;
  head.writeBigUInt64BE(BigInt(body.length), 1);
  return Buffer.concat([head, body]);
}

function property(name, value) {
  const size = Buffer.alloc(4);
  size.writeUInt32BE(value.length);
  return Buffer.concat([bytes(name.length), Buffer.from(name), size, Buffer.from(value)]);
}

const READY = Buffer.concat([
  bytes(5),
  Buffer.from("READY"),
  property("Socket-Type", "DEALER"),
  property("Identity", ""),
]);

/** One connection: bytes in, whole messages out. */
class Dealer {
  constructor(socket, hear, fail) {
    this.socket = socket;
    this.hear = hear;
    this.fail = fail;
    this.left = Buffer.alloc(0);
    this.greeted = this.ready = this.inParts = false;
    this.waiting = [];
    socket.write(GREETING);
    socket.setNoDelay(true);
    // not socket.setTimeout: what is written counts there as well, and a client that steps would never notice
    let heardMs = performance.now();
    const watch = setInterval(() => {
      if (performance.now() - heardMs > QUIET_MS)
        fail(new ServeError("closed", "the server has said nothing for long"));
    }, 1000);
    socket.on("data", (data) => {
      heardMs = performance.now();
      try {
        this.take(data);
      } catch (error) {
        fail(new ServeError("closed", `this is no server of ours: ${error.message}`));
      }
    });
    socket.on("error", (error) => fail(new ServeError("closed", error.message)));
    socket.on("close", () => {
      clearInterval(watch);
      fail(new ServeError("closed", "the server has closed the connection"));
    });
  }

  take(data) {
    this.left = this.left.length ? Buffer.concat([this.left, data]) : data;
    if (!this.greeted) {
      if (this.left.length < 64) return;
      if (this.left[0] !== 0xff || this.left[9] !== 0x7f || this.left[10] < 3) throw new Error("no ZMTP 3");
      if (this.left.toString("latin1", 12, 32).replace(/\0+$/, "") !== "NULL") throw new Error("it asks for keys");
      this.left = this.left.subarray(64);
      this.greeted = true;
      this.socket.write(frame(COMMAND, READY));
    }
    for (;;) {
      const flags = this.left[0];
      const head = flags & LONG ? 9 : 2;
      if (this.left.length < head) return;
      const size = flags & LONG ? Number(this.left.readBigUInt64BE(1)) : this.left[1];
      if (size > 1 << 24) throw new Error("a message is too long");
      if (this.left.length < head + size) return;
      const body = this.left.subarray(head, head + size);
      this.left = this.left.subarray(head + size);
      if (flags & COMMAND) this.command(body);
      else {
        // what has more parts than one is not of our protocol
        if (!(flags & MORE) && !this.inParts) this.hear(body);
        this.inParts = Boolean(flags & MORE);
      }
    }
  }

  command(body) {
    const name = body.toString("latin1", 1, 1 + body[0]);
    if (name === "READY") {
      this.ready = true;
      for (const content of this.waiting.splice(0)) this.send(content);
    } else if (name === "PING") {
      this.socket.write(frame(COMMAND, Buffer.concat([bytes(4), Buffer.from("PONG"), body.subarray(7)])));
    } else if (name === "ERROR") throw new Error("it does not let us in");
  }

  send(content) {
    if (this.ready) this.socket.write(frame(0, content));
    else this.waiting.push(content);
  }
}

// ---- the client -----------------------------------------------------------------------------------------------------

function vectorBytes(value) {
  const vector = value instanceof Float32Array ? value : Float32Array.from(value);
  const raw = Buffer.alloc(4 * vector.length);
  vector.forEach((x, i) => raw.writeFloatLE(x, 4 * i));
  return raw;
}

function vectorOf(raw) {
  return Float32Array.from({ length: raw.length / 4 }, (_, i) => raw.readFloatLE(4 * i));
}

function named(names, values) {
  return Object.fromEntries(names.map((name, i) => [name, values[i]]));
}

/** A whole number of 64 bits, as msgpack wants it: `Date.now() * 1e6` is one, and JavaScript would send a float. */
function whole(value, what, tick) {
  if (typeof value === "bigint" || Number.isInteger(value)) {
    const big = BigInt(value);
    if (BigInt.asIntN(64, big) === big) return big;
  }
  throw new ServeError("bad_tick", `${what} of tick ${tick} is ${value}; expected a whole number of 64 bits`, { tick });
}

/** Connect to `tcp://HOST:PORT`; a Client. Rejects with a ServeError. */
export async function connect(address, { timeoutMs = 5000 } = {}) {
  const match = /^tcp:\/\/\[?([^\]]+)\]?:(\d+)$/.exec(address);
  if (!match || match[2] > 65535) throw new ServeError("closed", `${address} is no address; expected tcp://HOST:PORT`);
  const client = new Client(net.connect(Number(match[2]), match[1]), timeoutMs);
  try {
    await client.ask({ op: "hello", version: VERSION }, "", "welcome");
    return client;
  } catch (error) {
    client.close();
    throw error;
  }
}

class Client {
  constructor(socket, timeoutMs) {
    this.timeoutMs = timeoutMs;
    this.sessions = new Map();
    this.asked = new Map(); // what is asked of a session, or of the server (""), one at a time
    this.over = null;
    this.model = null;
    this.dealer = new Dealer(socket, (raw) => this.hear(raw), (error) => this.fail(error));
  }

  /** Send a request and wait for its reply, a message that is called `reply`. `send` takes the bytes. */
  ask(request, session, reply, send = (content) => this.dealer.send(content)) {
    if (this.over) return Promise.reject(this.over);
    if (this.asked.has(session)) return Promise.reject(new ServeError("failed", "it is being asked already"));
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        const error = new ServeError("timed_out", `there was no reply to ${request.op} in ${this.timeoutMs} ms`);
        this.asked.get(session)?.reject(error);
        this.sessions.get(session)?.end(error); // else the late reply would be taken for another's
      }, this.timeoutMs);
      const end = (settle) => (value) => {
        clearTimeout(timer);
        this.asked.delete(session);
        settle(value);
      };
      this.asked.set(session, { reply, resolve: end(resolve), reject: end(reject) });
      send(encode(request));
    });
  }

  /** A session; with its `token` one that was open before, from anywhere. */
  async open(name, { token = null } = {}) {
    if (!SESSION_NAME.test(name))
      throw new ServeError("failed", `a session cannot be called ${name}; expected ${SESSION_NAME.source}`);
    if (token !== null && (typeof token !== "string" || token.length > 128))
      throw new ServeError("unknown", "this is no token; expected the text that session.token was");
    if (this.sessions.has(name)) throw new ServeError("duplicate", `session ${name} is open here already`);
    const session = new Session(this, name);
    this.sessions.set(name, session);
    try {
      await this.ask({ op: "open", session: name, token }, name, "ready");
      return session;
    } catch (error) {
      session.end(error);
      throw error;
    }
  }

  hear(raw) {
    let said;
    try {
      said = decode(raw);
    } catch {
      return; // nothing of ours: as if it had not come
    }
    const asked = this.asked.get(said?.session ?? "");
    const opening = this.sessions.get(said?.session);
    // what comes before `ready` is of a session that was called so before
    const session = opening?.token ? opening : undefined;
    switch (said?.op) {
      case "welcome":
        if (said.version !== VERSION) throw new Error(`it speaks version ${said.version}, not ${VERSION}`);
        if (!Array.isArray(said.modalities) || !Array.isArray(said.heads) || !(said.queue > 0))
          throw new Error("its welcome does not say what the model takes");
        this.model = said;
        break;
      case "ready":
        if (opening) Object.assign(opening, { token: said.token, nextTick: said.next, resumed: said.resumed });
        break;
      case "busy":
        asked?.reject(new ServeError("busy", said.why, { retryS: said.retry_s }));
        break;
      case "refused": {
        const error = new ServeError(said.error, said.why, { tick: said.tick });
        if (said.tick >= 0) {
          session?.settle(said.tick, error);
          if (said.error === "evicted" || said.error === "unknown") session?.end(error);
        } else if (asked) asked.reject(error);
        else if (!said.session) this.fail(error); // whose message it was cannot be known
        break;
      }
      case "pred":
        session?.missed(said.tick);
        session?.answer(said);
        break;
      case "skipped":
        session?.missed(said.tick);
        session?.settle(said.tick, null);
        break;
      case "evicted":
        session?.end(new ServeError("evicted", `session ${said.session} is not open any more (${said.reason})`, said));
        break;
    }
    if (asked && asked.reply === said?.op) asked.resolve(said);
  }

  fail(error) {
    if (this.over) return;
    this.over = error;
    for (const { reject } of [...this.asked.values()]) reject(error);
    for (const session of [...this.sessions.values()]) session.end(error);
    this.dealer?.socket.destroy();
  }

  /** Sessions that are open are not closed: their tokens bring them back. */
  close() {
    this.fail(new ServeError("closed", "this client is closed"));
  }
}

/** One session. `token` brings it back; `error` is why it is over here; `skipped`: ticks of `send` it had seen. */
class Session {
  constructor(client, name) {
    this.client = client;
    this.name = name;
    this.token = "";
    this.nextTick = 0;
    this.resumed = false;
    this.error = null;
    this.skipped = 0;
    this.waiting = new Map(); // by tick: who waits for its answer
    this.toSend = []; // [tick, bytes] until the server has room, [null, bytes] of what is asked after them
    this.onTheWay = new Set();
    this.sent = 0; // by `send`, and not answered
    this.came = []; // what came of those, and was not read
    this.wake = () => {};
  }

  /**
   * Send one tick; a promise of its answer, null where the session has seen it already.
   * `features`: a Float32Array by modality; one that is missing is absent. `tick`: its number, the next one if not
   * given. `eventNs`: its end by a clock of yours, a number or BigInt; it comes back. `ageNs`: by modality, how old the
   * newest sample is at that end.
   */
  async step(features, { timeoutMs = this.client.timeoutMs, ...more } = {}) {
    return new Promise((resolve, reject) => {
      const tick = this.put(features, more, (outcome) => {
        clearTimeout(timer);
        if (outcome instanceof Error) reject(outcome);
        else resolve(outcome);
      });
      const timer = setTimeout(() => {
        const error = new ServeError("timed_out", `tick ${tick} had no answer in ${timeoutMs} ms`, { tick });
        this.waiting.get(tick)?.settle(error);
        this.waiting.delete(tick);
      }, timeoutMs);
    });
  }

  /** Send one tick and do not wait; its number. `answers` has what comes of it. Throws what `step` rejects with. */
  send(features, more = {}) {
    const tick = this.put(features, more, (outcome) => {
      this.sent--;
      if (outcome === null) this.skipped++;
      else this.came.push(outcome);
      this.wake();
    });
    this.sent++;
    return tick;
  }

  /** Answers to ticks of `send`, as they come, until none is awaited; throws the error that a tick got instead. */
  async *answers({ timeoutMs = this.client.timeoutMs } = {}) {
    for (;;) {
      if (!this.came.length) {
        if (!this.sent) return;
        const found = await new Promise((resolve) => {
          const timer = setTimeout(resolve, timeoutMs, false);
          this.wake = () => {
            clearTimeout(timer);
            resolve(true);
          };
        });
        if (!found) throw new ServeError("timed_out", `${this.sent} ticks had no answer in ${timeoutMs} ms`);
        continue;
      }
      const outcome = this.came.shift();
      if (outcome instanceof Error) throw outcome;
      yield outcome;
    }
  }

  put(features, { tick = this.nextTick, eventNs = 0, ageNs = null }, settle) {
    const { modalities } = this.client.model;
    if (this.error) throw this.error;
    if (!Number.isSafeInteger(tick) || tick < 0)
      throw new ServeError("bad_tick", `a tick cannot be called ${tick}; expected a whole number from 0 on`);
    const unknown = Object.keys(features).find((name) => !modalities.some((m) => m.name === name));
    if (unknown !== undefined) throw new ServeError("bad_tick", `the model has no ${unknown}`, { tick });
    if (this.waiting.has(tick) || this.onTheWay.has(tick))
      throw new ServeError("bad_tick", `tick ${tick} was sent and is not answered`, { tick });
    if (this.waiting.size + this.came.length >= KEPT) {
      const why = `${KEPT} ticks of session ${this.name} wait for an answer, or to be read; read, and send no faster`;
      throw new ServeError("overrun", why, { tick });
    }
    const content = encode({
      op: "step",
      session: this.name,
      tick,
      event_ns: whole(eventNs, "eventNs", tick),
      features: modalities.map((m) => (features[m.name] == null ? null : vectorBytes(features[m.name]))),
      age_ns: ageNs
        ? modalities.map((m) => whole(ageNs[m.name] ?? (features[m.name] == null ? -1 : 0), `ageNs.${m.name}`, tick))
        : [],
    });
    if (content.length > MAX_BYTES) {
      const why = `tick ${tick} has ${content.length} bytes; a message has at most ${MAX_BYTES}`;
      throw new ServeError("bad_tick", why, { tick });
    }
    this.nextTick = Math.max(this.nextTick, tick + 1);
    this.waiting.set(tick, { settle, atMs: performance.now() });
    this.toSend.push([tick, content]);
    this.pump();
    return tick;
  }

  /** Send as many ticks as the server lets wait: one more would be refused, and be missing between the others. */
  pump() {
    while (this.toSend.length && (this.toSend[0][0] === null || this.onTheWay.size < this.client.model.queue)) {
      const [tick, content] = this.toSend.shift();
      if (tick !== null) this.onTheWay.add(tick);
      this.client.dealer.send(content);
    }
  }

  answer(said) {
    const { modalities, heads } = this.client.model;
    const of = modalities.map((m) => m.name);
    this.settle(said.tick, {
      session: this.name,
      tick: said.tick,
      eventNs: said.event_ns,
      heads: named(heads.map((h) => h.name), said.heads.map(vectorOf)),
      present: named(of, said.present),
      ageNs: named(of, said.age_ns),
      waitedNs: said.waited_ns,
      stepNs: said.step_ns,
      roundTripMs: performance.now() - (this.waiting.get(said.tick)?.atMs ?? NaN),
      model: said.model,
    });
  }

  /** The server answers a session in order: what was sent before this tick will have no answer any more. */
  missed(tick) {
    if (!this.onTheWay.has(tick)) return;
    for (const earlier of this.onTheWay) {
      if (earlier === tick) return;
      const why = `the answer to tick ${earlier} of session ${this.name} was dropped: it was not read in time here`;
      this.settle(earlier, new ServeError("timed_out", why, { tick: earlier }));
    }
  }

  settle(tick, outcome) {
    const waits = this.waiting.get(tick);
    this.waiting.delete(tick);
    this.onTheWay.delete(tick);
    this.pump();
    waits?.settle(outcome);
  }

  end(error) {
    this.error = error;
    if (this.toSend.some(([tick]) => tick === null)) this.client.asked.get(this.name)?.reject(error);
    this.toSend = [];
    // another session may be called so by now
    if (this.client.sessions.get(this.name) === this) this.client.sessions.delete(this.name);
    for (const tick of [...this.waiting.keys()]) this.settle(tick, error);
  }

  /** Ask something of the server that comes after the ticks that were sent before. */
  async ask(op, reply, more = {}) {
    if (this.error) throw this.error;
    return this.client.ask({ op, session: this.name, ...more }, this.name, reply, (content) => {
      this.toSend.push([null, content]);
      this.pump();
    });
  }

  /** Until everything that was sent is answered and the state is on the server's disk; the tick after that. */
  async flush() {
    return (await this.ask("flush", "flushed")).next;
  }

  /** Start the state anew; ticks count on. */
  async reset() {
    await this.ask("reset", "done");
  }

  /** The session is over, and nothing of it is kept. Where it is over here already, this does nothing. */
  async close() {
    if (this.error) return;
    await this.ask("close", "done", { token: this.token });
    this.end(new ServeError("closed", `session ${this.name} is closed`));
  }
}
