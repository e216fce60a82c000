"""Push: samples of your program into a stream of a running session, as if they came from a device.

    with stream_mmrnn.push("audio") as sound:
        sound.send(pcm, rate_hz=24_000)

The stream has the source `push` (`--audio push`, `--stream mood:signal=push`). Its worker queues, encodes, counts and
publishes what is sent.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from stream_mmrnn.bus import registry
from stream_mmrnn.bus.publisher import Publisher
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, UsageError
from stream_mmrnn.core.sound import mono

_LOOK_S = 0.05
_READER_S = 5.0
"""How long the worker of the stream may take to appear, once its session is there."""
_LIVES_NS = 1_000_000_000
"""How often it is checked whether the session still runs."""


class Push:
    """A stream of a session, to send samples to. Sending never waits. Not for several threads."""

    def __init__(
        self,
        stream: str,
        session: str | None = None,
        *,
        address: str = "",
        keys: Path | str | None = None,
        server_key: str = "",
        wait: float | None = None,
        queue: int = 256,
    ) -> None:
        """Connect to a stream.

        `session`: its name or process id; None means this user's only running session. `address`: instead, HOST:PORT
        of a bus over tcp (its `bus.port`); then `session` is the session's name. `keys`, `server_key`: as for
        `subscribe`. `wait`: seconds to wait for the session to appear. `queue`: samples that may wait for the bus.

        Raises:
            NotRunning: no such session is running, or it has no such stream with the source `push`.
            UsageError: several sessions are running, or the address or the name is not valid.
            FileError: the folder of keys does not exist.

        """
        if not topics.is_known(topics.push(stream)):
            raise UsageError(f"{stream!r} is no name of a stream; expected 1 to 32 letters, digits, `_` or `-`")
        if address and session is None:
            raise UsageError("at an address, say which session: push(stream, session, address=...)")
        self.stream = stream
        self.sent = 0
        """Samples given to the bus."""
        self.refused = 0
        """Samples that were not, because the queue was full or the stream's worker was away."""
        self._topic = topics.push(stream)
        self._origin = f"push:{secrets.token_hex(4)}"
        own = Path(keys) if keys else None
        search = registry.SessionSearch(lambda: registry.reach(session, address, own, server_key), wait or 0)
        while (found := search.poll()) is None:
            time.sleep(_LOOK_S)
        place, self._entry = found
        self.session = self._entry.session if self._entry is not None else str(session)
        """The session's name."""
        self._looked_ns = now_ns()
        self._publisher: Publisher | None = Publisher(place, queue)
        publisher = self._publisher
        until_ns = now_ns() + round(_READER_S * 1e9)
        while not publisher.has_reader(self._topic) and now_ns() < until_ns:
            time.sleep(_LOOK_S)
        if not publisher.has_reader(self._topic):
            self.close()
            raise NotRunning(
                f"the session {self.session!r} has no stream {stream!r} that takes samples from programs; start it "
                f'with --stream {stream}:KIND=push, or source = "push"'
            )

    def send(
        self, data: str | bytes | npt.ArrayLike, event_ns: int | None = None, *, rate_hz: int | None = None
    ) -> bool:
        """Send one sample.

        Args:
            data: for a stream of sound int16, or floats in -1 to 1 with `rate_hz`, of shape [samples] or [samples,
                channels]; of pictures JPEG bytes; of text one line; of a signal numbers of shape [size].
            event_ns: when it happened, of sound when its last sample was taken, by `stream_mmrnn.now_ns()`; unless
                given, now.
            rate_hz: of sound; 16 kHz unless given, any other is converted.

        Returns:
            Whether it was sent; if not, it is counted in `refused`.

        Raises:
            NotRunning: the session has ended.
            UsageError: the data is none of these.

        """
        message = wire.pack_push(_message(data, rate_hz))
        if len(message) > wire.MAX_PAYLOAD_BYTES:
            raise UsageError(f"a sample has at most {wire.MAX_PAYLOAD_BYTES} bytes; send sound in shorter pieces")
        at_ns = now_ns()
        publisher = self._running(at_ns)
        if not publisher.has_reader(self._topic):
            self.refused += 1
            return False
        refused = publisher.refused.get(self._topic, 0)
        publisher.publish(
            self._topic, self.session, at_ns if event_ns is None else event_ns, at_ns, message, self._origin
        )
        sent = publisher.refused.get(self._topic, 0) == refused
        self.sent, self.refused = self.sent + sent, self.refused + (not sent)
        return sent

    def _running(self, at_ns: int) -> Publisher:
        """The publisher. Raises NotRunning where the session has ended, or this was closed."""
        if self._publisher is None:
            raise NotRunning(f"the push to {self.stream!r} was closed; make another one")
        if self._entry is not None and at_ns - self._looked_ns > _LIVES_NS:
            self._looked_ns = at_ns
            if not self._entry.alive():
                raise NotRunning(f"the session {self.session!r} has ended; make another push when it runs again")
        return self._publisher

    def close(self) -> None:
        """Disconnect, after what was sent has gone out."""
        if self._publisher is not None:
            self._publisher.close()
            self._publisher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _message(data: str | bytes | npt.ArrayLike, rate_hz: int | None) -> wire.PushMessage:
    if isinstance(data, str):
        return wire.PushMessage(data.encode())
    if isinstance(data, bytes | bytearray | memoryview):
        return wire.PushMessage(bytes(data))
    values: npt.NDArray[Any] = np.asarray(data)
    if values.dtype == np.int16 or rate_hz is not None:
        return wire.PushMessage(mono(values).astype("<i2").tobytes(), _rate(rate_hz))
    if values.ndim != 1 or values.dtype.kind not in "fiub":
        raise UsageError(
            f"a sample is text, JPEG bytes, int16 sound or numbers of shape [size]; this is {values.dtype} "
            f"{list(values.shape)} (float sound needs rate_hz)"
        )
    return wire.PushMessage(values.astype("<f4").tobytes())


def _rate(rate_hz: int | None) -> int:
    if rate_hz is None:
        return topics.AUDIO_RATE_HZ
    if not 1000 <= rate_hz <= 384_000:
        raise UsageError(f"rate_hz is {rate_hz!r}: expected 1000 to 384000 samples a second")
    return int(rate_hz)


push = Push
"""For programs: `with stream_mmrnn.push("audio") as sound: ...`."""
