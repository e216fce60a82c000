"""Connections to NATS servers: with credentials, and which servers are open to everybody.

Knows nothing about streams and subjects.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError

from stream_mmrnn.core.config import is_loopback
from stream_mmrnn.core.errors import FileError, NotRunning
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.settings import LOOPBACK


def without_secrets(url: str) -> str:
    """The addresses in a URL, without user names and passwords."""
    return ",".join(re.sub(r"\A([a-z]+://)?.*@", r"\1", one.strip()) for one in url.split(","))


def is_exposed(connection: Nats) -> str:
    """Where the server says that it listens, if others can reach that and it asks nobody for credentials; else ""."""
    said = connection._server_info
    host = str(said.get("host") or LOOPBACK)
    asks = said.get("auth_required") or said.get("tls_verify")
    return "" if asks or is_loopback(host) else host


def _login(path: Path) -> dict[str, Any]:
    """Options of the client for a file of credentials: a JWT with its seed, or the seed of an nkey alone."""
    need("a credentials file", "cluster", "nkeys")
    import nkeys

    try:
        text = path.read_text(encoding="ascii").strip()
        seed = re.search(r"^S[A-Z2-7]{57}$", text, re.MULTILINE)
        if seed is None:
            raise ValueError
        nkeys.from_seed(bytearray(seed[0].encode())).wipe()
    except OSError as e:
        raise FileError(f"the credentials {path} cannot be read: {e.strerror}; give the path of a file") from e
    except (ValueError, nkeys.NkeysError):
        raise FileError(f"{path} holds no credentials of NATS; give a file made by nsc, or one with an nkey") from None
    return {"nkeys_seed_str": seed[0]} if text == seed[0] else {"user_credentials": str(path)}


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
        FileError: the credentials cannot be read.
        UsageError: the package that reads them is not installed.

    """
    options = _login(Path(credentials).expanduser()) if credentials else {}
    said: deque[str] = deque(maxlen=64)  # it goes on for as long as the connection lives

    async def nothing() -> None:
        pass

    async def on_error(error: Exception) -> None:
        said.append(str(error) or type(error).__name__)

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
        why, at = str(e) or (said[-1] if said else type(e).__name__), without_secrets(url)
        # it tries again and again, and a server may reset a connection before it has said why
        if any("authorization" in one.lower() for one in (why, *said)):
            raise NotRunning(
                f"the NATS server at {at} does not accept these credentials; give a user and a password in the URL, or "
                "a credentials file"
            ) from e
        raise NotRunning(f"no NATS server answers at {at} ({why}); start one with JetStream") from e
