// A client of `stream-mmrnn serve` for Node 18 and newer: one file, no dependencies. docs/serve.md has the protocol.
//
// It speaks ZMTP 3.1 (https://rfc.zeromq.org/spec/37/) as a DEALER without security, and msgpack as far as it is needed.
// Whole numbers beyond 2^53 come as BigInt. It does not connect again by itself: open sessions go on by their tokens.

import net from "node:net";

export const VERSION = 1;
const QUIET_MS = 10_000; // the server says something every 2 s

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

const READY = Buffer.concat([bytes(5), Buffer.from("READY"), property("Socket-Type", "DEALER"), property("Identity", "")]);

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
    socket.setTimeout(QUIET_MS, () => fail(new ServeError("closed", "the server has said nothing for long")));
    socket.on("data", (data) => {
      try {
        this.take(data);
      } catch (error) {
        fail(new ServeError("closed", `this is no server of ours: ${error.message}`));
      }
    });
    socket.on("error", (error) => fail(new ServeError("closed", error.message)));
    socket.on("close", () => fail(new ServeError("closed", "the server has closed the connection")));
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

/** Connect to `tcp://HOST:PORT`; a Client. Rejects with a ServeError. */
export function connect(address, { timeoutMs = 5000 } = {}) {
  const match = /^tcp:\/\/\[?([^\]]+)\]?:(\d+)$/.exec(address);
  if (!match) return Promise.reject(new ServeError("closed", `${address} is no address; expected tcp://HOST:PORT`));
  const client = new Client(net.connect(Number(match[2]), match[1]), timeoutMs);
  return client.ask({ op: "hello", version: VERSION }, "").then(
    () => client,
    (error) => {
      client.close();
      throw error;
    },
  );
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

  /** Send a request and wait for its reply. */
  ask(request, session) {
    if (this.over) return Promise.reject(this.over);
    if (this.asked.has(session)) return Promise.reject(new ServeError("failed", "it is being asked already"));
    return new Promise((resolve, reject) => {
      const timer = setTimeout(() => {
        this.asked.delete(session);
        reject(new ServeError("timed_out", `there was no reply to ${request.op} in time`));
      }, this.timeoutMs);
      const end = (settle) => (value) => {
        clearTimeout(timer);
        this.asked.delete(session);
        settle(value);
      };
      this.asked.set(session, { resolve: end(resolve), reject: end(reject) });
      this.dealer.send(encode(request));
    });
  }

  async open(name, { token = null } = {}) {
    if (this.sessions.has(name)) throw new ServeError("duplicate", `session ${name} is open here already`);
    const session = new Session(this, name);
    this.sessions.set(name, session);
    try {
      const ready = await this.ask({ op: "open", session: name, token }, name);
      Object.assign(session, { token: ready.token, nextTick: ready.next, resumed: ready.resumed });
      return session;
    } catch (error) {
      this.sessions.delete(name);
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
    const session = this.sessions.get(said?.session);
    switch (said?.op) {
      case "welcome":
        this.model = said;
        asked?.resolve(said);
        break;
      case "ready":
      case "flushed":
      case "done":
        asked?.resolve(said);
        break;
      case "busy":
        asked?.reject(new ServeError("busy", said.why, { retryS: said.retry_s }));
        break;
      case "refused": {
        const error = new ServeError(said.error, said.why, { tick: said.tick });
        if (session && said.tick >= 0) session.settle(said.tick, error);
        else asked?.reject(error);
        break;
      }
      case "pred":
        session?.answer(said);
        break;
      case "skipped":
        session?.settle(said.tick, null);
        break;
      case "evicted":
        session?.end(new ServeError("evicted", `session ${said.session} is not open any more (${said.reason})`, said));
        break;
    }
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

class Session {
  constructor(client, name) {
    this.client = client;
    this.name = name;
    this.token = "";
    this.nextTick = 0;
    this.resumed = false;
    this.error = null;
    this.waiting = new Map(); // by tick
  }

  /**
   * Send one tick; a promise of its answer, null where the session has seen it already.
   * `features`: a Float32Array by modality; one that is missing is absent.
   */
  step(features, { tick = this.nextTick, eventNs = 0, ageNs = null } = {}) {
    const { modalities } = this.client.model;
    if (this.error) return Promise.reject(this.error);
    const unknown = Object.keys(features).find((name) => !modalities.some((m) => m.name === name));
    if (unknown !== undefined) return Promise.reject(new ServeError("bad_tick", `the model has no ${unknown}`, { tick }));
    if (this.waiting.has(tick)) return Promise.reject(new ServeError("bad_tick", `tick ${tick} was sent`, { tick }));
    const request = {
      op: "step",
      session: this.name,
      tick,
      event_ns: eventNs,
      features: modalities.map((m) => (features[m.name] == null ? null : vectorBytes(features[m.name]))),
      age_ns: ageNs ? modalities.map((m) => ageNs[m.name] ?? (features[m.name] == null ? -1 : 0)) : [],
    };
    this.nextTick = Math.max(this.nextTick, tick + 1);
    return new Promise((resolve, reject) => {
      this.waiting.set(tick, { resolve, reject, atMs: performance.now() });
      this.client.dealer.send(encode(request));
    });
  }

  answer(said) {
    const waits = this.waiting.get(said.tick);
    if (!waits) return;
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
      roundTripMs: performance.now() - waits.atMs,
      model: said.model,
    });
  }

  settle(tick, outcome) {
    const waits = this.waiting.get(tick);
    this.waiting.delete(tick);
    if (outcome instanceof Error) waits?.reject(outcome);
    else waits?.resolve(outcome);
  }

  end(error) {
    this.error = error;
    this.client.sessions.delete(this.name);
    for (const tick of [...this.waiting.keys()]) this.settle(tick, error);
  }

  /** Until everything that was sent is answered and the state is on the server's disk; the tick after that. */
  async flush() {
    return (await this.client.ask({ op: "flush", session: this.name }, this.name)).next;
  }

  /** Start the state anew; ticks count on. */
  async reset() {
    await this.client.ask({ op: "reset", session: this.name }, this.name);
  }

  /** The session is over, and nothing of it is kept. */
  async close() {
    await this.client.ask({ op: "close", session: this.name, token: this.token }, this.name);
    this.client.sessions.delete(this.name);
  }
}
