"""A subscriber in a process of its own, and what it was given: for those who stop it.

    python -m tools.faults.listener PUBLISH SUBSCRIBE BULK VIEW POLICY QUEUE

It listens to everything until its standard input ends, then says what it got as one JSON document. Knows nothing about
who stops it.
"""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

from stream_mmrnn.bus import Address, Gaps, Subscriber
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.settings import Policy
from stream_mmrnn.core.types import Envelope


class _Ends(Gaps):
    """Remembers, too, the first and the newest message of each stream that came, handed out or not."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[tuple[str, str], int] = {}
        self.newest: dict[tuple[str, str], int] = {}

    def observe(self, envelope: Envelope) -> None:
        key = (envelope.topic, envelope.session)
        self.first.setdefault(key, envelope.seq)
        self.newest[key] = envelope.seq
        super().observe(envelope)


def listen(address: Address, policy: Policy, queue: int) -> dict[str, Any]:
    """Messages as (topic, session, seq, read_ns, age_ns); the reader's own counts."""
    reader = Subscriber(address, [""], queue, policy)
    reader.gaps = ends = _Ends()
    print("up", flush=True)
    got: list[tuple[str, str, int, int, int]] = []
    said: list[str] = []
    going = True
    while True:
        envelope = reader.receive(50 if going else 500)
        if report := reader.report():
            said.append(report)
        if envelope is not None:
            at_ns = now_ns()
            got.append((envelope.topic, envelope.session, envelope.seq, at_ns, at_ns - envelope.publish_ns))
        elif not going:
            break
        if going and select.select([sys.stdin], [], [], 0)[0]:
            going = False
    reader.close()
    came = [(*stream, first, ends.newest[stream]) for stream, first in ends.first.items()]
    return {"got": got, "said": said, "tally": reader.tally(), "came": came}


class Listener:
    """That process, seen from the one that started it."""

    def __init__(self, address: Address, policy: Policy, queue: int) -> None:
        ends = [address.publish, address.subscribe, address.bulk, address.view]
        self.policy = policy
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tools.faults.listener", *ends, policy, str(queue)],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.process.stdout.readline()

    @property
    def pid(self) -> int:
        return self.process.pid

    def finish(self) -> dict[str, Any]:
        out, _ = self.process.communicate(timeout=60)
        found: dict[str, Any] = json.loads(out)
        return found

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    publish, subscribe, bulk, view, policy, queue = sys.argv[1:]
    ends = Address(publish, subscribe, bulk=bulk, view=view)
    print(json.dumps(listen(ends, cast(Policy, policy), int(queue))), flush=True)
