"""Connections to NATS servers: with credentials, and which servers are open to everybody.

Knows nothing about streams and subjects.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError

from stream_mmrnn.core.config import LOOPBACK, is_loopback
from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.core.extras import need


def without_secrets(url: str) -> str:
    """The addresses in a URL, without user names and passwords."""
    return ",".join(re.sub(r"\A([a-z]+://)?.*@", r"\1", one.strip()) for one in url.split(","))


def is_exposed(connection: Nats) -> str:
    """Where the server says that it listens, if others can reach that and it asks nobody for credentials; else ""."""
    said = connection._server_info
    host = str(said.get("host") or LOOPBACK)
    asks = said.get("auth_required") or said.get("tls_verify")
    return "" if asks or is_loopback(host) else host


async def connect(
    url: str,
    credentials: str = "",
    on_return: Callable[[], Awaitable[None]] | None = None,
    timeout_s: float = 5.0,
    on_loss: Callable[[], Awaitable[None]] | None = None,
) -> Nats:
    """A connection that reconnects by itself, without a limit.

    Raises:
        NotRunning: no server answers there, or it does not accept these credentials.

    """
    options: dict[str, Any] = {}
    if credentials:
        need("a credentials file", "cluster", "nkeys")
        options["user_credentials"] = str(Path(credentials).expanduser())
    said: list[Exception] = []

    async def nothing() -> None:
        pass

    async def on_error(error: Exception) -> None:
        said[:] = [error]

    try:
        return await asyncio.wait_for(
            nats.connect(
                url,
                connect_timeout=2,
                allow_reconnect=True,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.05,
                ping_interval=1,
                max_outstanding_pings=3,
                error_cb=on_error,
                reconnected_cb=on_return or nothing,
                disconnected_cb=on_loss or nothing,
                **options,
            ),
            timeout_s,
        )
    except (TimeoutError, NatsError, OSError, ValueError) as e:
        why, at = str(e) or (str(said[0]) if said else type(e).__name__), without_secrets(url)
        if "authorization" in why.lower():
            raise NotRunning(
                f"the NATS server at {at} does not accept these credentials; give a user and a password in the URL, or "
                "a credentials file"
            ) from e
        raise NotRunning(f"no NATS server answers at {at} ({why}); start one with JetStream") from e
