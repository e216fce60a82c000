"""A streaming real-time sequence predictor.

`subscribe` reads the predictions of a running session; `Client` and `AsyncClient` have sessions of their own on a
server. Importing this opens and imports nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_mmrnn.bus.subscription import PredictionView as PredictionView
    from stream_mmrnn.bus.subscription import Subscription as Subscription
    from stream_mmrnn.bus.subscription import subscribe as subscribe
    from stream_mmrnn.serve.async_client import AsyncClient as AsyncClient
    from stream_mmrnn.serve.client import Client as Client
    from stream_mmrnn.serve.cluster.client import ClusterClient as ClusterClient

__all__ = ["AsyncClient", "Client", "ClusterClient", "PredictionView", "Subscription", "subscribe"]


def __getattr__(name: str) -> Any:
    if name == "Client":
        from stream_mmrnn.serve.client import Client

        return Client
    if name == "AsyncClient":
        from stream_mmrnn.serve.async_client import AsyncClient

        return AsyncClient
    if name == "ClusterClient":
        from stream_mmrnn.core.extras import need

        need("a cluster", "cluster", "nats")
        from stream_mmrnn.serve.cluster.client import ClusterClient

        return ClusterClient
    if name in __all__:
        from stream_mmrnn.bus import subscription

        return getattr(subscription, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
