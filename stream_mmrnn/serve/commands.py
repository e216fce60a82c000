"""The verb `serve`. Knows nothing about what is served, or how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stream_mmrnn import config
from stream_mmrnn.signals import ENDING
from stream_mmrnn.terminal import ConfigFile, Json, ModelName, Provider, escape, print_document, say_on


def serve(
    config_file: ConfigFile = None,
    model: ModelName = None,
    provider: Annotated[Provider | None, typer.Option(help="Where the model runs.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to bind; others than loopback need --keys.")] = None,
    port: Annotated[int | None, typer.Option(help="0 takes any free one.")] = None,
    keys: Annotated[Path | None, typer.Option(help="A folder made by `keys new`: who may connect.")] = None,
    slots: Annotated[int | None, typer.Option(help="Sessions at most.")] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", "-d", min=0.1, help="Seconds; without it until Ctrl-C.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve sessions of other programs: each opens one, sends its ticks and gets predictions."""
    settings = config.load(
        config_file,
        {
            "engine.model": model,
            "engine.provider": provider.value if provider else None,
            "serve.host": host,
            "serve.port": port,
            "serve.keys": str(keys) if keys else None,
            "serve.slots": slots,
        },
    )
    ENDING.watch()
    ENDING.in_order = lambda: True
    from stream_mmrnn.clock import now_ns
    from stream_mmrnn.serve.server import Server

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    server = Server(settings, say_on(console))
    try:
        console.print(
            f"serving {escape(server.engine.spec.name)} at {server.address}: up to {server.capacity} sessions in time"
        )
        end_ns = now_ns() + round(duration * 1e9) if duration else None
        last = 0

        def often() -> None:
            nonlocal last
            if console.is_terminal and not as_json:
                total = server.host.counts["predictions"]
                console.print(f"{len(server.sessions)} sessions, {total - last} predictions a second   ", end="\r")
                last = total

        server.run(lambda: ENDING.alive() and (end_ns is None or now_ns() < end_ns), often)
        document = server.summary()
    finally:
        server.close()
    if as_json:
        print_document(document)
        return
    counts = document["counts"]
    console.print(
        f"{counts['stepped']} ticks of {counts['opened'] + counts['resumed']} sessions in {document['seconds']:.1f} s; "
        f"{counts['busy']} were told busy; {counts['evicted']} are kept for {settings.state.ttl_s:g} s"
    )
