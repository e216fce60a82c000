"""Documents of the benches -> docs/performance.md. Every figure in it comes from a document; the rest is why.

Knows nothing about how a bench measures or where its document lies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]
AVX2 = Path(__file__).parent / "avx2.json"

MEANING = {
    r"engine_over_bare_(\d+)": "`StepEngine.step` over the same graph bound by hand, hidden {0}, hot",
    r"slots_16384_over_64_(\d+)": "a step of one session with 16,384 slots taken over one with 64, hidden {0}",
    r"session_run_over_engine_(\d+)": "`session.run` with numpy states over the engine, hidden {0}",
    r"torch_gru_over_engine_(\d+)": "torch eager with `nn.GRU` over the engine, hidden {0}",
    r"torch_cells_over_engine_(\d+)": "torch eager with a `GRUCell` a layer over the engine, hidden {0}",
    r"numpy_over_engine_(\d+)": "the step in numpy over the engine, hidden {0}",
    r"engine_over_memory_roofline_(\d+)": "the engine over the time to read the weights from memory once, hidden {0}"
    " (below 1: they come from a cache)",
    r"torch_gru_over_bare_(\d+)": "the same over the bare graph: the value for an engine without any cost, hidden {0}",
    r"int8_over_fp32_(\d+)": "8-bit weights (`int8`) over fp32, hidden {0}, hot",
    r"int8_batch_over_fp32_(\d+)": "8-bit weights for many sessions (`int8_batch`) over fp32, one session, hidden {0},"
    " hot",
    r"int8_bare_over_fp32_bare_(\d+)": "8-bit weights over fp32, both graphs bare, hidden {0}",
    r"int8_reading_over_fp32_reading_(\d+)": "the time to read 8-bit weights again and again over that for fp32,"
    " hidden {0}",
    r"int8_batch_drift_rms_(\d+)": "RMS of the states' difference, `int8_batch` against fp32, 10,000 steps in"
    " closed loop,"
    " hidden {0}",
    r"int8_batch_drift_rms_last_tenth_(\d+)": "the same over the last 1,000 steps, hidden {0}",
    r"int8_drift_rms_(\d+)": "RMS of the states' difference, 8-bit weights against fp32, 10,000 steps in closed loop,"
    " hidden {0}",
    r"int8_drift_rms_last_tenth_(\d+)": "the same over the last 1,000 steps, hidden {0}",
    r"paced_prewarmed_over_cold_(\d+)": "a step 25 times a second after a prewarm over one without, hidden {0}",
    r"cold_start_s": "a fresh process until its first prediction, seconds",
    r"engine_rss_mb": "resident memory of that process, MB",
    r"silero_wrapper_over_engine": "silero VAD's own onnx wrapper over the same file in the engine",
    r"silero_iterator_over_engine": "silero VAD's own VADIterator (onnx) over the same file in the engine",
    r"in_graph_over_copied_(\d+)": "gather and scatter inside the graph over copying with numpy, {0} of 1,024 rows",
    r"silero_wrapper_over_graph": "its onnx wrapper over the graph alone, bound once: what an engine that takes no time"
    " would be measured at",
    r"silero_jit_over_graph": "its jit model over the graph alone",
    r"silero_jit_over_engine": "silero VAD's own jit model over the engine",
    r"sessions_per_core_(\w+)": "sessions a core at 25 Hz with p99 below the tick, {0}, 2 layers of 256",
    r"sessions_of_the_graph_alone_(\w+)": "sessions a core if nothing but the graph took time, in its largest"
    " batch, {0}",
    r"sessions_block_(\w+)": "the same with columns in and out (`step_block`) in place of an object for each tick, {0}",
    r"step_over_step_block": "one call of the engine for 256 sessions with Tick objects over one with a block",
    r"step_block_us": "one block of 256 sessions, us",
    r"loop_over_batched": "256 single runs of the bound graph over one call of the engine for 256 sessions",
    r"triton_p50_over_ours_(\d+)": "Triton's Python backend over the engine in the caller's process, {0} sessions",
    r"triton_p50_over_ours_bus_(\d+)": "Triton's Python backend over ours across processes, {0} sessions",
    r"triton_p50_over_bare_hops_(\d+)": "Triton's Python backend over two hops through ZeroMQ's own proxy,"
    " which neither"
    " align nor step, {0} sessions",
    r"pytriton_p50_over_ours_(\d+)": "the same with pytriton's own way of binding, {0} sessions",
    r"pytriton_p50_over_ours_bus_(\d+)": "pytriton over ours across processes, {0} sessions",
    r"serve_p99_over_tick_(\d+)": "{0} clients of `serve`: p99 of answers, from the intended time,"
    " over the tick of 40 ms",
    r"cluster_p99_over_tick_(\d+)": "the same with {0} clients over NATS with JetStream",
    r"cluster_p50_over_serve_(\d+)": "over NATS, where every tick and answer is kept, over ZeroMQ, {0} clients",
    r"triton_p50_over_serve_(\d+)": "Triton's Python backend over `serve`, {0} clients",
    r"triton_p50_over_cluster_(\d+)": "Triton's Python backend over ours over NATS, {0} clients",
    r"pytriton_p50_over_serve_(\d+)": "pytriton over `serve`, {0} clients",
    r"pytriton_p50_over_cluster_(\d+)": "pytriton over ours over NATS, {0} clients",
    r"serve_groups_sessions_per_core": "sessions of `turn_taking` that `serve` carries on one core in groups of 64, p99"
    " below the tick",
    r"serve_singles_sessions_per_core": "the same with a connection for each session",
    r"serve_groups_over_engine": "sessions in groups over those that the engine alone steps on that core",
    r"busy_p99_ms": "until a client beyond the capacity gets `busy`, with 200 active clients, ms",
    r"audio_to_prediction_(p\d+)_ms": "from an audio block's end to a readable prediction, {0}, ms: worker, broker,"
    " engine",
    r"audio_to_prediction_(p\d+)_busy(\d)_ms": "the same beside {1} busy processes, {0}, ms",
    r"audio_to_prediction_(p\d+)_(nice|fifo)_ms": "the same with supervisor.priority = {1}, {0}, ms",
    r"audio_to_prediction_(p\d+)_busy(\d)_(nice|fifo)_ms": "beside {1} busy processes with supervisor.priority = {2},"
    " {0}, ms",
    r"audio_bare_hops_(p\d+)\w*_ms": "the same way without our code: a sleep, two hops through ZeroMQ's own"
    " proxy, {0}, ms",
    r"all_to_prediction_(p\d+)_ms": "the same with camera and words, {0}, ms; the picture's encoder is most of it",
    r"(\w+?)_stages_residual\w*": "what the stages' sum lacks of the whole, {0}",
    r"ours_(\w+?)_over_(\w+)_(2kb|30kb|1mb)_(hot|paced)": "our bus over {0} against {1}, {2}, {3}",
    r"zmq_proxy_(\w+?)_over_(\w+)_(2kb|30kb|1mb)_(hot|paced)": "ZeroMQ's own proxy with nothing of ours against {1},"
    " {2}, {3}",
    r"camera_features_transport_share": "share of the bus in the way from a frame's event to its prediction",
    r"camera_picture_transport_share": "share that carrying the JPEG itself would have",
    r"replay_times_real_time": "replay of one session from features, times real time, compared with the recording",
    r"replay_times_real_time_(\d+)": "{0} sessions in lock step, session-seconds a second, files read",
    r"replay_times_real_time_step_alone": "the same if nothing but the step took time",
    r"replay_times_real_time_(\d+)_step_alone": "the same if nothing but stepping {0} sessions together took time",
    r"replay_times_real_time_identical|replay_times_real_time_\d+_identical": "1: every prediction is the recorded one",
    r"training_data_times_real_time": "a recording read as training data of its model, times real time",
    r"train_(\w+)_times_nn_gru": "training: `{0}` over torch's `nn.GRU`, ticks a second at 1,024 ticks",
}
"""What each stable name says; names are matched whole."""


def meaning(name: str) -> str:
    for pattern, words in MEANING.items():
        if found := re.fullmatch(pattern, name):
            return words.format(*found.groups())
    return ""


def _number(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float) and abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def ratios(document: Document, names: Sequence[str] = ()) -> str:
    """The table of the figures that have stable names."""
    rows = ["| figure | what | value | bound | holds |", "| --- | --- | --- | --- | --- |"]
    for name, r in document["ratios"].items():
        if names and name not in names:
            continue
        sign = {"less": "≤", "more": "≥"}[r["better"]]
        bound = "" if r["bound"] is None else f"{sign} {_number(r['bound'])}"
        holds = r["why"] or {True: "yes", False: "**no**", None: ""}[r["held"]]
        rows.append(f"| `{name}` | {meaning(name)} | {_number(r['value'])} | {bound} | {holds} |")
    return "\n".join(rows)


def latencies(document: Document, keys: Sequence[str], having: str = "") -> str:
    """The rows that have a latency (and the key `having`), with p50, p99 and what others used meanwhile."""
    rows = [f"| {' | '.join(keys)} | p50, ms | p99, ms | others' CPU |", "| " + "--- | " * (len(keys) + 3)]
    for row in document["rows"]:
        found = next((row[k] for k in ("service_ms", "latency_ms", "event_to_prediction_ms") if row.get(k)), None)
        if isinstance(found, dict) and "p50" in found and (not having or having in row):
            said = " | ".join(
                _number(row.get(k)) if isinstance(row.get(k), float | int) else str(row.get(k, "")) for k in keys
            )
            other = row.get("other_cpu")
            other = "–" if other is None else f"{other:.2f}"
            rows.append(f"| {said} | {found['p50']:.4g} | {found['p99']:.4g} | {other} |")
    return "\n".join(rows)


def stages(document: Document) -> str:
    """Of each set of modalities, the stages, the processes' CPU, and what others used meanwhile."""
    out = []
    for row in document["rows"]:
        lines = [
            f"`{row['modalities']}`, {row['predictions']} predictions, {row['late']} late, {row['lost']} lost:",
            "",
        ]
        lines += ["| stage | p50, ms | p95 | p99 | max |", "| --- | --- | --- | --- | --- |"]
        whole = {"event to reader": row["event_to_reader_ms"]}
        for name, s in {**row["stages_ms"], **whole}.items():
            lines.append(f"| {name} | {s['p50']:.3f} | {s['p95']:.3f} | {s['p99']:.3f} | {s['max']:.3f} |")
        cpu = ", ".join(f"{name} {share:.3f}" for name, share in row["cpu"].items())
        rss = ", ".join(f"{name} {mb:.0f}" for name, mb in row["rss_mb"].items())
        lines += ["", f"Cores: {cpu}; all others on the machine {_number(row['other_cpu'])}. Resident MB: {rss}."]
        out.append("\n".join(lines))
    return "\n\n".join(out)


def parts(document: Document) -> str:
    """What a replay is made of, each part alone."""
    rows = [
        "| sessions | read, us a tick and session | align | make blocks | step |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in document["rows"]:
        if us := row.get("us_a_tick"):
            # documents of before blocks lack it, and one session needs none
            blocks = f"{us['interleave']:.1f}" if "interleave" in us else ""
            rows.append(f"| {row['sessions']} | {us['read']:.1f} | {us['align']:.1f} | {blocks} | {us['step']:.1f} |")
    return "\n".join(rows)


def _where(document: Document) -> str:
    m = document["machine"]
    ort = m.get("onnxruntime-gpu") or m.get("onnxruntime") or "?"
    cpu = f"{m['cpu']} ({m['instructions']})" if m.get("instructions") else m["cpu"]
    return (
        f"{m['date'][:10]}, {cpu}, {m['usable_cores']} cores, {m['kernel']}, Python {m['python']},"
        f" onnxruntime {ort}, numpy {m.get('numpy')}, pyzmq {m.get('pyzmq')}"
    )


def _section(title: str, name: str, told: Mapping[str, Document], commands: Mapping[str, str], *parts: str) -> str:
    if name not in told:
        return f"## {title}\n\nNot run: `{commands[name]}`."
    command = f"    {commands[name]}"
    return "\n\n".join([f"## {title}", command, f"{_where(told[name])}.", *(p for p in parts if p)])


def _avx2() -> str:
    """The figures of a CPU with AVX2 alone: measured once, kept as a file."""
    kept = json.loads(AVX2.read_text(encoding="utf-8"))
    lines = [
        "## On a CPU with AVX2 alone",
        "",
        f"{kept['measured']}. A busier machine than the one above; only figures with a bound, and the main latencies.",
        "",
        "| run | figure | what | value | bound | holds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run, name, value, bound, holds in kept["rows"]:
        lines.append(f"| {run} | `{name}` | {meaning(name)} | {value} | {bound} | {holds} |")
    return "\n".join(lines)


def _missed(told: Mapping[str, Document]) -> str:
    """Every bound that did not hold or could not be judged, with the reason if it is known."""
    lines = []
    for document in told.values():
        for name, r in document["ratios"].items():
            if r["bound"] is None or r["held"]:
                continue
            sign = {"less": "≤", "more": "≥"}[r["better"]]
            why = next((w for pattern, w in REASONS.items() if re.fullmatch(pattern, name)), r["why"] or "")
            lines.append(f"- `{name}`: {_number(r['value'])}, asked {sign} {_number(r['bound'])}. {why}".rstrip())
    return "\n".join(dict.fromkeys(lines)) or "All bounds hold."


REASONS: dict[str, str] = {
    r"torch_gru_over_engine_256": "The limit is the graph: `torch_gru_over_bare_256` is what an engine that"
    " takes no time"
    " would be measured at. Why torch's eager step (0.1 ms here) is nearer than when the bound was set is not known.",
    r"int8_over_fp32_(512|1024)": "The limit is the graph: without any engine the ratio is `int8_bare_over_fp32_bare`."
    " fp32 takes less than reading its weights from memory would (`engine_over_memory_roofline` below 1), so it reads"
    " them from a cache, and 8 bits have less to save. Not measured on a machine with a smaller cache.",
    r"silero_(wrapper|jit)_over_engine": "The limit is the graph: `silero_wrapper_over_graph` and"
    " `silero_jit_over_graph`"
    " are the value for an engine without any cost.",
    r"triton_p50_over_ours_bus_16": "`triton_p50_over_bare_hops_16` is what a server that computes nothing"
    " behind the same"
    " two ways over a proxy would be measured at; the aligner, the step and our messages come on top of it. In the"
    " caller's own process the engine is several times as fast (`triton_p50_over_ours`).",
    r"audio_to_prediction_(p50|p99)(_fifo)?_ms": "`audio_bare_hops` is the part of it that a sleep and two ways over"
    " ZeroMQ's own proxy take with nothing of ours on them, in the same run. The rest are the stages above. p99"
    " moves from run to run between 1.2 and 2.8 ms; with `supervisor.priority` it holds (further below).",
    r"audio_to_prediction_p99_busy2_ms": "At normal priority; with `supervisor.priority` it holds: the two"
    " sections after"
    " this one.",
    r"ours_ipc_over_dora_2kb_paced": "`zmq_proxy_ipc_over_dora_2kb_paced` is the part that one order for all"
    " readers costs"
    " with nothing of ours on it: ZeroMQ's own proxy between plain sockets. Ours adds numbers, stamps, types"
    " and checks in Python,"
    " which cost little from hot caches and much from cold ones: compare `ours_ipc` with `zmq_proxy_ipc`, hot"
    " and paced.",
    r"replay_times_real_time": "The limit is the step: each step waits for the one before it, so"
    " `replay_times_real_time_step_alone` is the most that this model can reach on this machine.",
    r"replay_times_real_time_16": "The parts, each alone, are in the table above. The step alone would allow"
    " `replay_times_real_time_16_step_alone`. Of reading, most is decompressing: a chunk holds raw pictures and sound,"
    " too, and is decompressed as a whole; a thread does that beside the steps, where a core is free.",
}
"""By the stable name: what is known of the limit where a bound is not reached; what was measured by hand is called
so."""


def write(told: Mapping[str, Document], commands: Mapping[str, str], plots: Sequence[str]) -> str:
    def shown(*beginnings: str) -> str:
        return "\n\n".join(f"![{p[:-4].replace('_', ' ')}](performance/{p})" for p in plots if p.startswith(beginnings))

    def of(name: str, tell: Any, *more: Any) -> str:
        return tell(told[name], *more) if name in told else ""

    sections = [
        _INTRODUCTION,
        _section(
            "One step",
            "step",
            told,
            commands,
            of("step", ratios),
            _STEP,
            _INT8,
            of("step", latencies, ("what", "contender", "mode")),
            shown("step_"),
        ),
        _section(
            "Many sessions",
            "sessions",
            told,
            commands,
            of("sessions", ratios),
            _SESSIONS,
            _BLOCKS,
            of("sessions", latencies, ("what", "contender", "sessions", "steps_per_s", "late")),
            shown("sessions_"),
        ),
        _section("All sessions due at once", "sessions-together", told, commands, of("sessions-together", ratios)),
        _section("Over two processes", "sessions-2", told, commands, of("sessions-2", ratios), _SHARDS),
        _section(
            "Sessions of other programs",
            "serve",
            told,
            commands,
            of("serve", ratios),
            _SERVE,
            of("serve", latencies, ("what", "contender", "sessions", "late", "lost", "admitted", "busy"), "contender"),
            of("serve", latencies, ("what", "sessions", "holds", "server_cpu", "client_cpu"), "holds"),
        ),
        _section(
            "From an event to its prediction",
            "end-to-end",
            told,
            commands,
            of("end-to-end", ratios),
            of("end-to-end", stages),
            shown("end-to-end_"),
            _BLOCKS_END_TO_END,
        ),
        _section(
            "The same beside two busy processes", "end-to-end-busy", told, commands, of("end-to-end-busy", ratios)
        ),
        _section("With nice, beside two", "end-to-end-nice", told, commands, of("end-to-end-nice", ratios)),
        _section("With SCHED_FIFO, beside two", "end-to-end-fifo", told, commands, of("end-to-end-fifo", ratios)),
        _section(
            "With SCHED_FIFO, alone",
            "end-to-end-alone-fifo",
            told,
            commands,
            of("end-to-end-alone-fifo", ratios),
            _PRIORITY,
        ),
        _section(
            "Transport",
            "transport",
            told,
            commands,
            of("transport", ratios),
            of("transport", latencies, ("contender", "size", "mode")),
            _RING,
        ),
        _section("Replay", "replay", told, commands, of("replay", ratios), of("replay", parts), _REPLAY),
        _section("Training", "train", told, commands, of("train", ratios)),
        _avx2(),
        _GPU,
        "## Bounds that do not hold\n\n" + _missed(told),
    ]
    return "\n\n".join(sections) + "\n"


_INTRODUCTION = """# Performance

Every figure here is written by `python -m tools.bench`, which runs the verbs below one after the other; `--compare`
of each verb prints the ratios of a new run to an old document. What is compared takes turns in one run, so a ratio
holds where a time moves with the machine. Latency counts from the intended time of an open loop (no coordinated
omission); `hot` is as fast as it goes, `paced` at the real rate. A bound is judged only where other processes used
less than 15 % of a core meanwhile. Names in `code` are those of the JSON document's `ratios`: they stay the same."""

_STEP = """`bare` is the engine's own graph bound once by hand with its state in place, the newest features copied in,
and run as onnxruntime documents it. The engine adds finding the slot, the masks, stamps and the prediction; it calls
onnxruntime past the checks of its Python layer, which `bare` goes through. Over another copy of the graph the same call
was between 1 % faster and 7 % slower (six pairs, by hand): where weights come to lie matters more than the engine, and
before `bare` shared the engine's copy, `engine_over_bare_512` was 1.035 in two runs. A session's numbers are the same
bits in every bucket, in place or copied (tests/predict/test_cpu_batches.py); buckets whose bits differ are not used
(8-bit weights: the
single row).

On the CPU the rows of the arena are copied beside it and back with numpy, or worked on in place where they are the
first ones in order. That is no slower than Gather and ScatterND inside the graph (`in_graph_over_copied`, whose way
copies inputs and outputs, too), and the file is served as it is. A GPU runs those
(`stream_mmrnn/graph/gather_scatter.py`)."""

_SESSIONS = """Each session has its own phase and is due 25 times a second; what is due is stepped in one call.
`late` counts steps that ended more than a tick after their intended time."""

_SERVE = """All on the same two cores: server, engine, and all clients in one process. `serve` is loaded by a minimal
loop, the others by their own clients in an event loop (ours over NATS) or threads (Triton's). `cluster` writes every
tick to a log before it is stepped; beyond some hundred single clients these two cores are not enough for NATS, engine
and clients together, and answers come later and later. Groups are carried by far more: `python -m
tools.bench.cluster_groups --sessions 1024 --engines 2 --seconds 8` (a gateway, NATS and two engines on these two
cores, 2026-11-29, Intel Xeon, twice): p50 11.1 and 11.2 ms, p99 24.5 and 25.7 ms, 0 of 230,400 ticks lost; of CPU a
tick takes 18 us in the client, 7 in NATS and 20 in its engine. `late` counts answers after more than the tick.
`groups` and `singles` are sessions of `turn_taking` on a server of one core: in groups of 64 over one connection by
the public client, and with a connection each by a minimal loop; the clients are one process on the other core, and
the CPU of both is said."""

_BLOCKS = """**Blocks.** `step_block` takes columns and gives matrices, `step` an object for each tick. Measured on
2026-11-29 on two cores of an Intel Xeon that six other programs kept busy, so as CPU time of the engine's thread, the
code before blocks beside this one in turns (31 rounds), sessions of `turn_taking`; 2 layers of 256; the same with 8-bit
weights:

| call | over the old `step`, 64 sessions | 256 sessions |
| --- | --- | --- |
| `step` of one tick | 1.01; 0.99; 1.03 | 0.98; 0.99; 1.00 |
| `step` of all | 0.84; 1.01; 1.01 | 1.00; 1.02; 1.03 |
| `step_block` | 0.61; 0.83; 0.81 | 0.71; 0.84; 0.80 |
| `step_block`, features as float16 | 0.64; 0.85; 0.82 | 0.76; 0.86; 0.82 |

Beside the graph's run and the copies of states a block of 64 sessions of `turn_taking` takes 0.04 ms, 64 ticks 0.25 ms;
a block of one takes 14 us, a tick 5. Over two processes (64 sessions, CPU time of the parent alone) `step_block` takes
0.62 of the old `step`, `step` of all 1.03 and of one tick 0.87."""

_SHARDS = """Figures are sessions a core: twice as many in all. Blocks and heads cross in shared memory, a pipe
says when."""

_BLOCKS_END_TO_END = """One session as it was before columns and blocks (2026-11-28) and as it is now: six rounds of
12 s, in turn, with the same file of the default model; medians of the rounds' ratios, now over before, on 2026-11-29
(Intel Xeon, 2 cores, nothing beside it). The goal was at most 1.02:

| streams | p50 of event to reader | p99 | CPU time of all processes |
| --- | --- | --- | --- |
| sound alone (2.8 ms before) | 0.92 | 1.01 | 0.96 |
| all (8.1 ms before; most is the picture's encoder) | 1.03 | 0.96 | 0.99 |

The rounds of one code differ by 0.97 to 1.06 among themselves."""

_PRIORITY = """`supervisor.priority` lifts workers, broker, clock and engine (and here the reader) above other programs;
it wants the right to it."""

_RING = """**No shared-memory ring was built or tried.** The camera's frame crosses as the JPEG that was captured
(about 30 kB), and only to who shows or records it; the prediction waits for its 1,280 features (5 kB). The shares above
say what a perfect transport could gain of the whole way: about a tenth. No raw frame crosses processes."""

_INT8 = """Two kinds of 8-bit weights (`export --int8` writes both). `int8` is MatMulNBits, the fastest for one session;
its bits differ with the size of the batch. `int8_batch` multiplies integers where a matrix meets a state or what a tanh
says, so its products are exact, a session's bits are the same in every batch, and many sessions take about half the
time where the CPU has VNNI: it is what `bench sessions` measures. Its weights have 7 of the 8 bits since 2026-11-25:
with 8, CPUs without VNNI cut what two products add up to (`stream_mmrnn/graph/int8.py`), and states were 3 % off.
Figures of before are of 8 bits: the same products in the same time, the drift a little smaller."""

_REPLAY = """One session is one chain of steps: nothing can be batched, and a step's own time bounds it. Many sessions
in lock step are blocks: messages stay columns from the file to the graph.

CPU time a tick and session in turn with the code before columns, on 2026-11-29 (2 cores, AMD EPYC; the machine was busy
with a dozen other programs, so only the ratio says something; medians of six rounds of a minute of the default model):

| what | before, us | now, us | ratio |
| --- | --- | --- | --- |
| 16 sessions in lock step: read, align, step | 103 | 97 | 0.93 |
| the same from a file without raw streams | 91 | 88 | 0.97 |
| training data of the default model | 105 | 53 | 0.50 |
| the same from a file without raw streams | 76 | 41 | 0.54 |
| training data of ten minutes of a signal at 100 Hz, six numbers | 30 | 5.4 | 0.18 |

All results were the same, bit for bit. The goals, 2,000 times real time in lock step and training data five times as
fast, were reached for the signal alone: in the default model's files a tick is 17 kB, of which reading the file,
decompressing and the checksum take 19 us of the 34 of reading, and the step takes about 40. A thread decompresses
meanwhile, so where a core is free the wall time falls by that; this was not measured, for want of a free core."""

_GPU = """## On a GPU

Measured on one NVIDIA H100 on 2026-11-26: `docs/gpu.md` has the tables. All twelve checks hold: CUDA computes what the
CPU computes (2e-7 in outputs, 8e-7 in states, over 1,000 steps), with CUDA graphs and without; making the graphs moves
no state (onnxruntime issue 32243: they are captured on unused rows); host buffers are page-locked; a step by another
thread than the engine's is refused (it went wrong before it was). By rows the GPU holds 131,072 sessions at 25 Hz
(2 layers of 256); `StepEngine.step`, with Python objects for each tick, holds 14,336. `StepEngine.step_block`
writes its columns into the page-locked inputs, which cross in one copy, as the heads do back; it, a live session and a
server on the GPU are in the tool since 2026-11-29, when no GPU was there: **not run**.

It does **not** beat a hand-written implementation for a GPU: torch's CUDA graph of the same step, with its fused GRU
cell, takes 0.71 to 0.86 times ours from 1 to 1,024 rows of 256, and 0.63 at 16,384. The rest is the graph: it is made
of plain operators (Gemm, Split, Sigmoid), 47 kernels a step where torch has 24. The first run of the day was slower,
with 0.32 to 0.65: onnxruntime's ScatterND on CUDA copies a row by one thread (194 of 306 us of kernels at 256 rows,
seen with torch's profiler), and each input had a copy of its own (12 us). States are scattered by number now, and
inputs copied at once.

    python -m tools.gpu_check --out docs/gpu.md      # right within 1e-4 over 1,000 steps; 1 to 16,384 rows
    python -m tools.gpu_check --provider cpu         # tries the tool itself where there is no GPU

It needs onnxruntime-gpu, numpy and msgspec; torch with CUDA for the baseline (its CUDA-graph replay of the same
step). Exit code 0: all holds, 1: something does not, 2: usage, or CUDA was not active."""
