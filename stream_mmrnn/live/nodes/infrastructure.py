"""The processes that carry a session: the broker, the clock whose ticks are on the bus, the journal of what went by.

Know nothing about samples or predictions.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from stream_mmrnn.bus import Publisher, Tap, run_broker
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.live.nodes.process import Context, Reporter

_JOURNAL_MS = 50
"""The journal takes what has come this often: woken for each message it would take a core from who is in haste."""
_JOURNAL_NICE = 5


def broker(context: Context) -> None:
    """The bus itself; where it asks for keys it says who was refused, through itself like everyone else."""
    settings = context.settings.bus
    authenticator = None
    if settings.keys:
        from stream_mmrnn.bus.keys import Folder

        authenticator = Folder(Path(settings.keys)).authenticator()
    reporter: Reporter | None = None
    publisher: Publisher | None = None

    def alive() -> bool:
        """Asked again and again by one thread, which is the one that reports."""
        nonlocal reporter, publisher
        going = not context.stop.wait(0.1) and context.alive()
        if authenticator is not None:
            if publisher is None or reporter is None:
                publisher = Publisher(context.address, settings.queue)
                reporter = Reporter(context, publisher)
                reporter.counts = lambda: {
                    "admitted": authenticator.admitted,
                    "denied": sum(authenticator.refused.values()),
                }
                reporter.detail = lambda: {"denied": dict(authenticator.refused)}
                reporter.report("ready")
            # a new reason is said at once, a further number of an old one in its turn
            reporter.report_if_new("ready", _denials(authenticator.refused))
            reporter.report_due()
            if not going:
                publisher.close(0)
        return going

    run_broker(
        context.address,
        settings.queue,
        context.ready.set,
        alive,
        bulk_queue=settings.bulk_queue,
        view_queue=settings.view_queue,
        authenticator=authenticator,
    )


_DENIED = {
    "key_not_allowed": "with a key that is not allowed",
    "no_key": "without a key",
    "wrong_server_key": "with another server's key",
    "unfinished": "that broke off before it had shown a key",
}


def _denials(refused: dict[str, int]) -> str:
    """One sentence, which changes with the reasons and not with every number."""
    reasons = [words for reason, words in _DENIED.items() if refused.get(reason)]
    return f"refused connections {', '.join(reasons)}" if reasons else ""


def clock(context: Context) -> None:
    publisher = Publisher(context.address, context.settings.bus.queue)
    period_ns = int(1e9 / context.settings.bus.clock_hz)
    context.ready.set()
    due_ns = now_ns()
    while context.alive():
        due_ns = max(due_ns + period_ns, now_ns() - period_ns)  # after a stall: no burst of old ticks
        time.sleep(max(due_ns - now_ns(), 0) / 1e9)
        at_ns = now_ns()
        publisher.publish(topics.CLOCK, topics.EVERYONE, at_ns, at_ns, b"")
    publisher.close()


def journal(context: Context) -> None:
    """What an engine needs that has to go on after a crash: the last of the bus, and checkpoints."""
    from stream_mmrnn.live.journal import Ask, Journal, Keep, read_request

    settings = context.settings
    with contextlib.suppress(OSError, AttributeError):
        os.nice(_JOURNAL_NICE)  # before the sockets' threads are there: it wakes often, and nobody shall wait for it
    publisher = Publisher(context.address, settings.bus.queue)
    tap = Tap(context.address, [topics.FEATURE, topics.SESSION, topics.TICK, topics.CLOCK], settings.bus.queue)
    kept = Journal(settings.state.journal_s, settings.state.journal_mb << 20, complete=not context.restarts)
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {"messages": len(kept), "bytes": kept.bytes, "checkpoints": kept.kept}
    asked: tuple[bytes, Ask, int] | None = None
    garbage = 0

    def take() -> None:
        nonlocal garbage
        for frames in tap.messages():
            if len(frames) == 3:
                kept.add((frames[0], frames[1], frames[2]), now_ns())
            else:
                garbage += 1

    while context.alive():
        came = tap.request(5 if asked else _JOURNAL_MS)
        take()
        if came is not None:
            try:
                message = read_request(came[1])
            except WireError:
                garbage += 1
                continue
            if isinstance(message, Keep):
                kept.save(message)
            else:
                asked = (came[0], message, now_ns() + 1_000_000_000)
        if asked is not None:
            who, ask, until_ns = asked
            if kept.heard(ask.until) or now_ns() > until_ns:
                tap.answer(who, msgspec.msgpack.encode(kept.answer(ask)))
                asked = None
        if len(kept) and not context.ready.is_set():
            # the clock is asked for last: all else is heard, too
            reporter.report("ready")
            context.ready.set()
        reporter.report_due()
    tap.close()
    publisher.close()
