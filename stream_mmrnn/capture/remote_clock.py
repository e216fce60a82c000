"""Convert time stamps of another program's or host's clock to the local clock, for devices that stamp their own data.

Pure: the caller reads both clocks. Publish the result as the envelope's `event_ns`, and the stamp itself, unchanged, as
its `device_ns`.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import NamedTuple

_BUCKET_NS = 1_000_000_000
_BUCKETS = 60
_RATE_FROM = 8
"""Buckets needed to estimate the rate; before, both clocks are taken to run equally fast."""
_MAX_RATE = 1e-3
_STEADY_NS = 250_000_000
"""Late readings must agree for this long (remote time) before their lateness is taken for a jump of the clock."""


class _Pair(NamedTuple):
    remote_ns: int
    offset_ns: int
    """Add it to a remote time to get local time."""
    delay_ns: int
    """Pairs with less delay are more exact. For a one-way pair it is the offset, which is the delay plus a constant:
    enough to compare pairs that are close in time."""


class RemoteClock:
    """Estimates offset and rate of a remote clock. The local times that it gives always increase.

    A network delay can only make a reading late. So only the pair with the least delay of each second is kept, as NTP
    does (D. Mills, RFC 5905, section 10, the clock filter) and Lab Streaming Layer (C. Kothe et al., "The Lab Streaming
    Layer for synchronized multimodal recording", Imaging Neuroscience 2025; `time_correction`). A Theil-Sen line (the
    median of all slopes) through the pairs of the last minute is robust against pairs that were late all the same
    (H. Theil, "A rank-invariant method of linear and polynomial regression analysis", 1950; P. K. Sen, "Estimates of
    the regression coefficient based on Kendall's tau", 1968). A reading that no delay can explain is a jump of the
    remote clock: the estimate then starts again.

    Use one of the two, never both: `exchange` if the other side replies (error: half the asymmetry of the least delay),
    `arrived` if it only sends (error: the whole least delay).
    """

    def __init__(self, jump_ns: int = 50_000_000) -> None:
        """`jump_ns`: a reading further than this from the line is a jump, unless a delay can explain it."""
        self.jump_ns = jump_ns
        self.jumps = 0
        self._forget()
        self._last_ns: int | None = None

    def _forget(self) -> None:
        self._best: deque[_Pair] = deque(maxlen=_BUCKETS)
        """The pair with the least delay of each second."""
        self._bucket: int | None = None
        self._late: deque[_Pair] = deque()
        """The newest consecutive readings that were too late to be used."""
        self._from_ns, self._base_ns = 0, 0
        """Origin of the line: remote time, and the integer part of the offset, too large for the digits of a float."""
        self._more_ns, self._rate = 0.0, 0.0

    @property
    def rate_ppm(self) -> float:
        """How much faster the local clock runs than the remote one."""
        return self._rate * 1e6

    def exchange(self, sent_ns: int, remote_ns: int, received_ns: int, replied_ns: int | None = None) -> None:
        """A request and its reply: sent and received (local time), received and replied to (remote time)."""
        replied_ns = remote_ns if replied_ns is None else replied_ns
        offset_ns = ((sent_ns - remote_ns) + (received_ns - replied_ns)) // 2
        delay_ns = max((received_ns - sent_ns) - (replied_ns - remote_ns), 0)
        pair = _Pair((remote_ns + replied_ns) // 2, offset_ns, delay_ns)
        if self._best and abs(self._off_ns(pair)) > delay_ns / 2 + self.jump_ns:
            # the error of an offset is at most half the delay
            self._jump()
        self._accept(pair, received_ns)

    def arrived(self, remote_ns: int, received_ns: int) -> int:
        """A message stamped `remote_ns` has arrived at `received_ns`, local time; returns the same as `stamp`."""
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
        return self._later(min(self._local(remote_ns), received_ns))  # a message is stamped before it arrives

    def _stays_late(self, pair: _Pair) -> bool:
        """Whether readings have been late by the same amount for a while. While a queue drains, lateness shrinks."""
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
        """The offset at `remote_ns` without its integer part."""
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
            # too short to estimate a rate: use the best pair of the last seconds
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
        """The local time of `remote_ns`, but later than any time returned before."""
        return self._later(self._local(remote_ns))

    def _local(self, remote_ns: int) -> int:
        return remote_ns + self._base_ns + round(self._beyond(remote_ns))

    def _later(self, at_ns: int) -> int:
        self._last_ns = at_ns if self._last_ns is None else max(at_ns, self._last_ns + 1)
        return self._last_ns
