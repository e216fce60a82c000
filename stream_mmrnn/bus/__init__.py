"""The bus: one broker, so that all readers see one order; publishers and subscribers that count.

The broker binds the socket of the readers three times, with a queue for each kind of reader: `subscribe` for those who
must lose nothing, `bulk` for those of them that read pictures and sound, and `view` for those who want the newest. A
reader that stops fills its own short queue and nobody else's; on its return it passes over what is old.

The only package that speaks ZeroMQ. Knows nothing about what messages mean, beyond a clock that says we are heard, nor
where keys are kept: who may come in is asked of a function.
"""

from stream_mmrnn.bus.address import Address, Keys, Right, new_pair, public_of
from stream_mmrnn.bus.broker import Authenticator, run_broker
from stream_mmrnn.bus.journal_socket import Caller, Tap
from stream_mmrnn.bus.line_socket import LineSocket
from stream_mmrnn.bus.publisher import Numbers, Publisher
from stream_mmrnn.bus.request_reply import AsyncDealer, Dealer, Dealers, Router
from stream_mmrnn.bus.subscriber import Gaps, GapsState, Subscriber

__all__ = [
    "Address",
    "AsyncDealer",
    "Authenticator",
    "Caller",
    "Dealer",
    "Dealers",
    "Gaps",
    "GapsState",
    "Keys",
    "LineSocket",
    "Numbers",
    "Publisher",
    "Right",
    "Router",
    "Subscriber",
    "Tap",
    "new_pair",
    "public_of",
    "run_broker",
]
