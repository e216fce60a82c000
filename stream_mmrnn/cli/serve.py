"""The verb `serve`, as one server or as an engine of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_mmrnn.cli.terminal import ConfigFile, Console, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core import config
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.signals import ENDING


def serve(
    config_file: ConfigFile = None,
    model: ModelName = None,
    provider: Annotated[Provider | None, typer.Option(help="Where the model runs.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to bind; others than loopback need --keys.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free port.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A folder made by `keys new`; only its keys may connect.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="nats://HOST:PORT: run as an engine of a cluster; binds no port.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="The most sessions.")] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", min=0.1, help="Seconds; without it until Ctrl-C.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve sessions of other programs: each client opens sessions, sends ticks and gets predictions."""
    settings = config.load(
        config_file,
        {
            "engine.model": model,
            "engine.provider": provider.value if provider else None,
            "serve.host": host,
            "serve.port": port,
            "serve.keys": str(keys) if keys else None,
            "serve.slots": slots,
            "cluster.url": cluster,
        },
    )
    ENDING.watch()
    ENDING.in_order, ENDING.at_once = lambda: True, _kill_children
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    run = _run_in_cluster if settings.cluster.url else _run_server
    document = run(settings, console, duration, console.is_terminal and not as_json)
    if as_json:
        print_document(document)
    else:
        _print_summary(console, document, settings.state.ttl_s)
    if document.get("unsaved_sessions"):
        raise typer.Exit(3)


def _kill_children() -> None:
    """Kill the engine's processes: one in an endless loop does not notice that this process is gone."""
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()


def _print_summary(console: Console, document: dict[str, Any], ttl_s: float) -> None:
    counts, unsaved = document["counts"], document.get("unsaved_sessions", 0)
    console.print(
        f"{counts['stepped']} ticks of {counts['opened'] + counts['resumed']} sessions in {document['seconds']:.1f} s; "
        f"{counts['busy']} were refused as busy; "
        f"{counts['evicted']} were evicted and are kept for {ttl_s:g} s"
    )
    if unsaved:
        console.print(f"the states of {unsaved} sessions are lost: {shown(document['last_problem'])}")


class _Alive:
    """True until a signal arrives, or the duration is over."""

    def __init__(self, duration_s: float | None) -> None:
        from stream_mmrnn.core.clock import now_ns

        self._now_ns, self.began_ns = now_ns, now_ns()
        self._end_ns = self.began_ns + round(duration_s * 1e9) if duration_s else None

    def __call__(self) -> bool:
        return ENDING.alive() and (self._end_ns is None or self._now_ns() < self._end_ns)

    @property
    def seconds(self) -> float:
        return round((self._now_ns() - self.began_ns) / 1e9, 3)


def _run_server(settings: Settings, console: Console, duration_s: float | None, is_terminal: bool) -> dict[str, Any]:
    from stream_mmrnn.serve.server import Server

    server = Server(settings, say_on(console))
    try:
        console.print(
            f"serving {shown(server.engine.spec.name)} at {server.address}: up to {server.capacity} sessions in time"
        )
        alive = _Alive(duration_s)
        line = _line(console, lambda: (len(server.sessions), server.host.counts["predictions"]))
        server.run(alive, line if is_terminal else lambda: None)
        return {**server.summary(), "seconds": alive.seconds}
    finally:
        server.close()


def _run_in_cluster(
    settings: Settings, console: Console, duration_s: float | None, is_terminal: bool
) -> dict[str, Any]:
    import asyncio

    from stream_mmrnn.core.extras import need

    need("a cluster", "cluster", "nats")
    from stream_mmrnn.serve.cluster.connection import without_secrets
    from stream_mmrnn.serve.cluster.node import ClusterNode

    node = ClusterNode(settings, say_on(console))
    alive = _Alive(duration_s)
    announced = False

    def often() -> None:
        nonlocal announced
        if not announced and node.parts:
            console.print(
                f"engine {node.name} serves {shown(node.engine.spec.name)} in the cluster at "
                f"{shown(without_secrets(settings.cluster.url))}"
            )
            announced = True
        if is_terminal:
            line()

    line = _line(console, lambda: node.figures)
    asyncio.run(node.run(alive, often))
    return {**node.summary(), "seconds": alive.seconds}


def _line(console: Console, figures: Callable[[], tuple[int, int]]) -> Callable[[], None]:
    """A function that overwrites one line of the terminal once a second, with sessions and predictions."""
    from stream_mmrnn.core.clock import RateLimiter, now_ns

    rate_limiter, before = RateLimiter(), 0

    def often() -> None:
        nonlocal before
        if rate_limiter("line", now_ns()):
            sessions, total = figures()
            console.print(f"{sessions} sessions, {total - before} predictions a second   ", end="\r")
            before = total

    return often
