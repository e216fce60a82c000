"""Probe devices and libraries in a separate process that can be killed, because a driver may hang or crash.

`ask` starts `python -m stream_mmrnn.cli.probes NAME` and waits for a limited time. A probe writes its progress and its
result as lines of JSON to standard output.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream_mmrnn.core.errors import ProcessError, SourceError, StreamError
from stream_mmrnn.core.streams import FURTHER_ENCODERS, Stream

THUMBNAIL = (32, 24)
"""Columns and rows of the thumbnail of `look`."""
SILENCE_DBFS = -96.0
"""The lowest level that is reported: less than half of the last bit."""
_WARM_UP_S = 0.7
"""The first pictures of many cameras are dark, until their exposure is adjusted."""


def ask(name: str, argument: Any = None, timeout_s: float = 10.0, each: Callable[[Any], None] = lambda _: None) -> Any:
    """The result of the probe `name`; `each` is called with its progress.

    Raises:
        SourceError: the device or library is missing.
        ProcessError: no answer in `timeout_s`, or the process died.
        StreamError: the probe's own error.

    """
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, name, json.dumps(argument)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    # a thread, because a process that a driver blocks in the kernel cannot be killed, and its pipe stays open
    reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
    reader.start()
    deadline = time.monotonic() + timeout_s
    try:
        while True:
            try:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.001))
            except queue.Empty:
                raise ProcessError(f"there was no answer in {timeout_s:g} s") from None
            if not line:
                try:
                    how = _ended(process.wait(1))
                except subprocess.TimeoutExpired:
                    how = "does not end; a driver may hold it"
                raise ProcessError(f"the probe's process {how}")
            kind, value = json.loads(line)
            if kind == "done":
                return value
            if kind == "not there":
                raise SourceError(value)
            if kind == "error":
                raise StreamError(value)
            each(value)
    finally:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
            reader.join(1)
            process.stdout.close()


def _read(pipe: Any, lines: queue.SimpleQueue[bytes]) -> None:
    with contextlib.suppress(OSError, ValueError):
        for line in pipe:
            lines.put(line)
    lines.put(b"")


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


# ---- devices -----------------------------------------------------------------------------------------------------


def _cameras(_: Any) -> Iterator[Any]:
    """(source, description) of each camera."""
    from stream_mmrnn.capture.sources.camera import list_cameras

    yield list_cameras()


def _microphones(_: Any) -> Iterator[Any]:
    from stream_mmrnn.capture.sources.microphone import list_devices

    yield list_devices()


def _portaudio(_: Any) -> Iterator[Any]:
    """PortAudio's version, as text."""
    from stream_mmrnn.capture.sources.microphone import portaudio

    yield portaudio().get_portaudio_version()[1].split(",")[0]


def _picture(spec: str) -> Iterator[Any]:
    """A picture of a camera: `jpeg` (base64), width and height, and `rgb`, a thumbnail (base64)."""
    import cv2
    import numpy as np

    from stream_mmrnn.capture import sources
    from stream_mmrnn.core.settings import Settings

    source = sources.create_source(Stream.of("vision", source=spec), Settings())
    source.open()
    try:
        until = time.monotonic() + _WARM_UP_S
        newest = None
        for newest in source.samples(lambda: time.monotonic() < until, time.monotonic_ns()):  # noqa: B007
            pass
        if newest is None:  # a slow camera: take its first picture
            newest = next(iter(source.samples(lambda: True, time.monotonic_ns())))
    finally:
        source.close()
    picture = cv2.imdecode(np.frombuffer(newest.data, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise SourceError(f"{spec} gives no picture that can be decoded")
    small = cv2.cvtColor(cv2.resize(picture, THUMBNAIL, interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
    height, width = picture.shape[:2]
    yield {
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(bytes(newest.data)).decode(),
        "rgb": base64.b64encode(small.tobytes()).decode(),
    }


def _level(argument: dict[str, Any]) -> Iterator[Any]:
    """A microphone's level, block by block, and at the end over all `seconds`: `rms_dbfs` and `peak_dbfs`.

    0 dBFS is the largest sample value; a sine of full amplitude has an rms of -3 dBFS.
    """
    import numpy as np

    from stream_mmrnn.capture import sources
    from stream_mmrnn.core.settings import Settings

    source = sources.create_source(Stream.of("audio", source=argument["source"]), Settings())
    source.open()
    squares, count, peak = 0.0, 0, 0
    try:
        blocks = round(argument["seconds"] * 50)
        for sample in itertools.islice(source.samples(lambda: True, time.monotonic_ns()), blocks):
            block = np.asarray(sample.data, float)
            squares, count = squares + float(block @ block), count + len(block)
            peak = max(peak, int(abs(block).max()))
            yield _dbfs(float(block @ block) / len(block))
    finally:
        source.close()
    yield {"rms_dbfs": _dbfs(squares / max(count, 1)), "peak_dbfs": _dbfs(float(peak) ** 2), "samples": count}


def _dbfs(mean_square: float) -> float:
    return round(max(10 * math.log10(max(mean_square, 1e-9) / 32768**2), SILENCE_DBFS), 1)


# ---- libraries and rights ----------------------------------------------------------------------------------------


def _onnxruntime(_: Any) -> Iterator[Any]:
    from stream_mmrnn.graph import runtime

    yield {"version": runtime.version(), "cuda": runtime.cuda_built(), "gpu": runtime.gpu_in_sight()}


def _model(argument: dict[str, str]) -> Iterator[Any]:
    """Steps of a model on dummy data: the provider that ran them, the median step time in ms, and what it takes."""
    import msgspec
    import numpy as np

    from stream_mmrnn.core.clock import now_ns
    from stream_mmrnn.core.errors import ModelError
    from stream_mmrnn.core.types import Stamps, Tick
    from stream_mmrnn.predict.engine import StepEngine

    engine = StepEngine(Path(argument["path"]), 1, argument["provider"])  # type: ignore[arg-type]
    spec = engine.spec
    engine.open("probe")
    names = [m.name for m in spec.modalities]
    features = {m.name: np.zeros(m.size, np.float32) for m in spec.modalities}
    took = []
    for i in range(1, 21):
        at_ns = i * spec.tick_ns
        tick = Tick(
            "probe",
            i,
            at_ns,
            features,
            dict.fromkeys(names, True),
            dict.fromkeys(names, 0),
            Stamps(at_ns, at_ns, at_ns, at_ns, "clock"),
        )
        before_ns = now_ns()
        prediction = engine.step([tick])[0]
        took.append(now_ns() - before_ns)
        if not all(np.isfinite(values).all() for values in prediction.heads.values()):
            raise ModelError(f"the model {argument['path']} gives NaN or infinity for zeros; export it again")
    modalities = msgspec.to_builtins(spec.modalities)
    step_ms = round(float(np.median(took)) / 1e6, 3)
    yield {"provider": engine.provider, "step_ms": step_ms, "model": spec.name, "modalities": modalities}


def _encoder(name: str) -> Iterator[Any]:
    """Encode samples of the synthetic source, up to the first vector: the features' origin and length."""
    from stream_mmrnn.capture import encoders, sources
    from stream_mmrnn.core.settings import Settings

    encoder = encoders.create_encoder(name)
    kind = FURTHER_ENCODERS.get(name, name)
    source = sources.create_source(Stream.of(kind, source="synthetic"), Settings())
    source.open()
    try:
        for sample in source.samples(lambda: True, time.monotonic_ns()):
            if made := encoder.encode(sample):
                yield {"origin": encoder.origin, "size": len(made[0].data)}
                return
    finally:
        source.close()


def _plugin(argument: dict[str, Any]) -> Iterator[Any]:
    """Load a plug-in."""
    import msgspec

    from stream_mmrnn.core import plugins

    plugins.load(msgspec.convert(argument, plugins.Plugin))
    yield True


def _bus(_: Any) -> Iterator[Any]:
    """Send one message from a publisher through a broker to a subscriber: its latency in ms."""
    from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
    from stream_mmrnn.core import topics
    from stream_mmrnn.core.clock import now_ns

    address = Address.create("tcp" if sys.platform == "win32" else "ipc")
    ready, over = threading.Event(), threading.Event()
    broker = threading.Thread(target=run_broker, args=(address, 100, ready.set, lambda: not over.wait(0.02)))
    broker.start()
    try:
        ready.wait(5)
        subscriber, publisher = Subscriber(address, [topics.CLOCK], 100), Publisher(address, 100)
        publisher.wait_for_reader(topics.CLOCK, 5)
        at_ns = now_ns()
        publisher.publish(topics.CLOCK, topics.EVERYONE, at_ns, at_ns, b"")
        received = subscriber.receive(5000)
        took_ns = now_ns() - at_ns
        subscriber.close()
        publisher.close(0)
    finally:
        over.set()
        broker.join(5)
        address.remove()
    if received is None:
        raise ProcessError("a message did not pass the broker in 5 s")
    yield round(took_ns / 1e6, 3)


def _scheduling(_: Any) -> Iterator[Any]:
    """The priorities that this user may set, tried on this process only."""
    from stream_mmrnn.live.nodes import prioritise

    yield {priority: not prioritise(priority) for priority in ("nice", "fifo")}


def _sleep(_: Any) -> Iterator[Any]:
    """How late 100 sleeps of 1 ms ended, median and p99 in ms, with the timer settings of our processes."""
    import numpy as np

    from stream_mmrnn.live.nodes import sharpen_sleep

    sharpen_sleep()
    over = []
    for _i in range(100):
        before_ns = time.monotonic_ns()
        time.sleep(0.001)
        over.append(time.monotonic_ns() - before_ns - 1_000_000)
    p50, p99 = np.percentile(over, (50, 99)) / 1e6
    yield {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


_PROBES: dict[str, Callable[[Any], Iterator[Any]]] = {
    "cameras": _cameras,
    "microphones": _microphones,
    "portaudio": _portaudio,
    "look": _picture,
    "listen": _level,
    "onnxruntime": _onnxruntime,
    "model": _model,
    "encoder": _encoder,
    "plugin": _plugin,
    "bus": _bus,
    "scheduling": _scheduling,
    "sleep": _sleep,
}
"""Each yields its progress; the last value is its result."""


def _main(name: str, argument: str) -> None:
    # libraries may write to standard output: the answers use a copy of it, and theirs goes to the null device
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(kind: str, value: Any) -> None:
        answers.write(json.dumps([kind, value]) + "\n")
        answers.flush()

    try:
        value: Any = None
        for number, following in enumerate(_PROBES[name](json.loads(argument))):
            if number:
                say("each", value)
            value = following
        say("done", value)
    except SourceError as e:
        say("not there", str(e))
    except StreamError as e:
        say("error", str(e))
    except Exception as e:  # a broken library may raise anything
        say("error", f"{type(e).__name__}: {str(e)[:300]}")
    os._exit(0)  # at once, because a library may hang in its clean-up


if __name__ == "__main__":
    _main(*sys.argv[1:])
