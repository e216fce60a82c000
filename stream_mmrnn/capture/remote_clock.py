"""Our time of what another program's or host's clock has stamped: for publishers whose devices bring their own stamps.

Pure: it is told readings of both clocks. Knows nothing about sockets, nor what was stamped. The stamp itself is for the
envelope's `device_ns`, which nobody changes; what comes from here is its `event_ns`.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import NamedTuple

_BUCKET_NS = 1_000_000_000
_BUCKETS = 60
_RATE_FROM = 8
"""So many buckets say how fast the clock goes; before, it goes as ours."""
_MAX_RATE = 1e-3
_STEADY_NS = 250_000_000
"""For so long of the remote clock's time later readings must agree before their lateness is taken for a jump."""


class _Pair(NamedTuple):
    remote_ns: int
    offset_ns: int
    """To add to the remote clock's reading."""
    delay_ns: int
    """The less, the better it is. Of a pair that went one way it is the offset: delay and a constant, for so short a
    time as the pairs span that are compared."""


class RemoteClock:
    """A line through readings of both clocks: offset and rate, and never back.

    Readings travel, and travelling only makes them late. So of each second only the pair with the least delay is kept,
    as NTP does (D. Mills, RFC 5905, section 10, the clock filter) and Lab Streaming Layer (C. Kothe et al., "The Lab
    Streaming Layer for synchronized multimodal recording", Imaging Neuroscience 2025; `time_correction`); the
    line through these of the last minute is robust against those that were late all the same: the median of all slopes
    (H. Theil, "A rank-invariant method of linear and polynomial regression analysis", 1950; P. K. Sen, "Estimates of
    the regression coefficient based on Kendall's tau", 1968). A reading that no delay can explain is a jump of the
    remote clock, and what was known before is forgotten.

    Use one of the two, never both: `exchange` where the other side answers, which leaves an error of half the least
    delay's asymmetry; `arrived` where it only sends, which leaves the whole of the least delay.
    """

    def __init__(self, jump_ns: int = 50_000_000) -> None:
        """`jump_ns`: readings further than this from the line are a jump, unless they may just be late."""
        self.jump_ns = jump_ns
        self.jumps = 0
        self._forget()
        self._last_ns: int | None = None

    def _forget(self) -> None:
        self._best: deque[_Pair] = deque(maxlen=_BUCKETS)
        """The pair with the least delay of each second."""
        self._bucket: int | None = None
        self._late: deque[_Pair] = deque()
        """The newest readings in a row that came too late to be believed."""
        self._from_ns, self._base_ns = 0, 0
        """Where the line begins: remote time, and the whole part of what to add; a float has no digits for a date."""
        self._more_ns, self._rate = 0.0, 0.0

    @property
    def rate_ppm(self) -> float:
        """How much faster our clock goes than the remote one."""
        return self._rate * 1e6

    def exchange(self, sent_ns: int, remote_ns: int, received_ns: int, replied_ns: int | None = None) -> None:
        """A question and its answer: sent and received by our clock; got (and replied, if later) by the remote one."""
        replied_ns = remote_ns if replied_ns is None else replied_ns
        offset_ns = ((sent_ns - remote_ns) + (received_ns - replied_ns)) // 2
        delay_ns = max((received_ns - sent_ns) - (replied_ns - remote_ns), 0)
        pair = _Pair((remote_ns + replied_ns) // 2, offset_ns, delay_ns)
        if self._best and abs(self._off_ns(pair)) > delay_ns / 2 + self.jump_ns:
            # half the delay is the most that a path can add
            self._jump()
        self._accept(pair, received_ns)

    def arrived(self, remote_ns: int, received_ns: int) -> int:
        """What was stamped `remote_ns` came at `received_ns` by our clock; its event time, as `stamp` has it."""
        offset_ns = received_ns - remote_ns
        pair = _Pair(remote_ns, offset_ns, offset_ns)
        if self._best:
            late_ns = self._off_ns(pair)
            if late_ns < -self.jump_ns or (late_ns > self.jump_ns and self._stays_late(pair)):
                self._jump()
            elif late_ns <= self.jump_ns:
                self._late.clear()
        if not self._late:
            self._accept(pair, received_ns)
        return self._later(min(self._local(remote_ns), received_ns))  # nothing is stamped after it came

    def _stays_late(self, pair: _Pair) -> bool:
        """Whether readings have been late by the same for a while; those of a queue that is let go are ever less so."""
        while self._late and abs(self._late[0].offset_ns - pair.offset_ns) > self.jump_ns // 2:
            self._late.popleft()
        self._late.append(pair)
        return len(self._late) >= 4 and pair.remote_ns - self._late[0].remote_ns >= _STEADY_NS

    def _jump(self) -> None:
        self.jumps += 1
        self._forget()

    def _off_ns(self, pair: _Pair) -> float:
        return (pair.offset_ns - self._base_ns) - self._beyond(pair.remote_ns)

    def _beyond(self, remote_ns: int) -> float:
        """What to add to `remote_ns` beside the whole part."""
        return self._more_ns + self._rate * (remote_ns - self._from_ns)

    def _accept(self, pair: _Pair, received_ns: int) -> None:
        bucket = received_ns // _BUCKET_NS
        if bucket != self._bucket:
            self._bucket = bucket
            if len(self._best) >= _RATE_FROM:
                self._fit()
            self._best.append(pair)
        elif pair.delay_ns < self._best[-1].delay_ns:
            self._best[-1] = pair
        else:
            return
        if len(self._best) <= _RATE_FROM:
            # too short for a rate: the best of the last seconds
            chosen = min(list(self._best)[-3:], key=lambda p: p.delay_ns)
            self._from_ns, self._base_ns = chosen.remote_ns, chosen.offset_ns

    def _fit(self) -> None:
        pairs = list(self._best)
        slopes = [
            (b.offset_ns - a.offset_ns) / (b.remote_ns - a.remote_ns)
            for i, a in enumerate(pairs)
            for b in pairs[i + 1 :]
            if b.remote_ns > a.remote_ns
        ]
        if not slopes:
            return
        self._rate = min(max(median(slopes), -_MAX_RATE), _MAX_RATE)
        self._from_ns, self._base_ns = pairs[-1].remote_ns, pairs[-1].offset_ns
        rate, from_ns, base_ns = self._rate, self._from_ns, self._base_ns
        self._more_ns = median((p.offset_ns - base_ns) - rate * (p.remote_ns - from_ns) for p in pairs)

    def stamp(self, remote_ns: int) -> int:
        """Our time of `remote_ns`, but later than any that was given before."""
        return self._later(self._local(remote_ns))

    def _local(self, remote_ns: int) -> int:
        return remote_ns + self._base_ns + round(self._beyond(remote_ns))

    def _later(self, at_ns: int) -> int:
        self._last_ns = at_ns if self._last_ns is None else max(at_ns, self._last_ns + 1)
        return self._last_ns
