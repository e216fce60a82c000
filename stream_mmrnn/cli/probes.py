"""What is asked of devices and libraries in a process of its own, which can be killed: a driver may hang, or crash.

`ask` starts `python -m stream_mmrnn.cli.probes NAME` and waits a bounded time. What a probe says while it works and in
the end are lines of JSON on its standard output. Knows nothing about what the answers mean to whom.
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

THUMBNAIL = (32, 24)
"""Columns and rows of the small picture that `look` gives."""
SILENCE_DBFS = -96.0
"""Sound below this is called so loud: less than half the last bit."""
_WARM_UP_S = 0.7
"""The first pictures of many a camera are dark: its exposure is still to be found."""


def ask(name: str, argument: Any = None, timeout_s: float = 10.0, each: Callable[[Any], None] = lambda _: None) -> Any:
    """What the probe `name` answers; `each` is given what it says before.

    Raises:
        SourceError: what was asked for is not there.
        ProcessError: no answer in `timeout_s`, or the process died.
        StreamError: another error of ours, in its own words.

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
    # a thread, because a process that a driver holds in the kernel cannot be killed, and its pipe does not end
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
                code = process.wait(1)
                raise ProcessError(f"the process that asked {_ended(code)}")
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
    """(source, description) of each."""
    from stream_mmrnn.capture.sources.camera import list_cameras

    yield list_cameras()


def _microphones(_: Any) -> Iterator[Any]:
    from stream_mmrnn.capture.sources.microphone import list_devices

    yield list_devices()


def _portaudio(_: Any) -> Iterator[Any]:
    """Its version, as text."""
    from stream_mmrnn.capture.sources.microphone import portaudio

    yield portaudio().get_portaudio_version()[1].split(",")[0]


def _picture(spec: str) -> Iterator[Any]:
    """A picture of a camera: `jpeg` in base64, width and height, and `rgb`, a small one of THUMBNAIL."""
    import cv2
    import numpy as np

    from stream_mmrnn.capture import sources
    from stream_mmrnn.core.config import Settings

    source = sources.create_source(spec, "vision", Settings())
    source.open()
    try:
        until = time.monotonic() + _WARM_UP_S
        newest = None
        for newest in source.samples(lambda: time.monotonic() < until, time.monotonic_ns()):  # noqa: B007
            pass
        if newest is None:  # a slow one: the first that comes
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


def _level(asked: dict[str, Any]) -> Iterator[Any]:
    """How loud a microphone is, block by block, and in the end over `seconds`: `rms_dbfs` and `peak_dbfs`.

    0 dBFS is the largest number that there is; a sine as loud as can be has an rms of -3.
    """
    import numpy as np

    from stream_mmrnn.capture import sources
    from stream_mmrnn.core.config import Settings

    source = sources.create_source(asked["source"], "audio", Settings())
    source.open()
    squares, count, peak = 0.0, 0, 0
    try:
        for sample in itertools.islice(source.samples(lambda: True, time.monotonic_ns()), round(asked["seconds"] * 50)):
            block = np.asarray(sample.data, float)
            squares, count = squares + float(block @ block), count + len(block)
            peak = max(peak, int(abs(block).max()))
            yield _loud(float(block @ block) / len(block))
    finally:
        source.close()
    yield {"rms_dbfs": _loud(squares / max(count, 1)), "peak_dbfs": _loud(float(peak) ** 2), "samples": count}


def _loud(mean_square: float) -> float:
    return round(max(10 * math.log10(max(mean_square, 1e-9) / 32768**2), SILENCE_DBFS), 1)


# ---- libraries and rights ----------------------------------------------------------------------------------------


def _onnxruntime(_: Any) -> Iterator[Any]:
    from stream_mmrnn.graph import runtime

    yield {"version": runtime.version(), "cuda": runtime.cuda_built(), "gpu": runtime.gpu_in_sight()}


def _model(asked: dict[str, str]) -> Iterator[Any]:
    """Steps of a model on nobody's data: which provider ran them, and the median time of one in ms."""
    import numpy as np

    from stream_mmrnn.core.clock import now_ns
    from stream_mmrnn.core.errors import ModelError
    from stream_mmrnn.core.types import Stamps, Tick
    from stream_mmrnn.predict.engine import StepEngine

    engine = StepEngine(Path(asked["path"]), 1, asked["provider"])  # type: ignore[arg-type]
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
            raise ModelError(f"the model {asked['path']} answers zeros with what is no number; export it anew")
    yield {"provider": engine.provider, "step_ms": round(float(np.median(took)) / 1e6, 3), "model": spec.name}


def _encoder(modality: str) -> Iterator[Any]:
    """One sample of the synthetic source, encoded: the features' origin and length."""
    from stream_mmrnn.capture import encoders, sources
    from stream_mmrnn.core.config import Settings

    encoder = encoders.create_encoder(modality)
    source = sources.create_source("synthetic", modality, Settings())
    source.open()
    try:
        for sample in source.samples(lambda: True, time.monotonic_ns()):
            if made := encoder.encode(sample):
                yield {"origin": encoder.origin, "size": len(made[0].data)}
                return
    finally:
        source.close()


def _bus(_: Any) -> Iterator[Any]:
    """One message from a publisher through a broker to a reader: the way's milliseconds."""
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
        heard = subscriber.receive(5000)
        took_ns = now_ns() - at_ns
        subscriber.close()
        publisher.close(0)
    finally:
        over.set()
        broker.join(5)
        address.remove()
    if heard is None:
        raise ProcessError("a message did not come through the broker in 5 s")
    yield round(took_ns / 1e6, 3)


def _scheduling(_: Any) -> Iterator[Any]:
    """Which priorities this user may give a process; nobody else's is touched."""
    from stream_mmrnn.live.nodes import prioritise

    yield {priority: not prioritise(priority) for priority in ("nice", "fifo")}


def _sleep(_: Any) -> Iterator[Any]:
    """How much longer than asked 100 sleeps of 1 ms took, median and 99th percentile in ms, as our processes sleep."""
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
    "bus": _bus,
    "scheduling": _scheduling,
    "sleep": _sleep,
}
"""Each yields what it has to say; the last is its answer."""


def _main(name: str, argument: str) -> None:
    # what libraries write is not ours: the answer has a way of its own
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
    except Exception as e:  # a library that is broken breaks in its own way
        say("error", f"{type(e).__name__}: {str(e)[:300]}")
    os._exit(0)  # a library that hangs at its end has answered already


if __name__ == "__main__":
    _main(*sys.argv[1:])
