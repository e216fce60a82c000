"""The bus, and the only room that speaks ZeroMQ: one broker gives all readers the same order of messages.

It has a socket with its own queue for each kind of reader: `subscribe` for those that must lose nothing, `bulk` for
those that also read pictures and sound, `view` for those that want the newest.
"""

from stream_mmrnn.bus.address import Address, Keys, Right, new_pair, public_of
from stream_mmrnn.bus.broker import Authenticator, run_broker
from stream_mmrnn.bus.journal_socket import JournalClient, JournalSocket
from stream_mmrnn.bus.line_socket import LineSocket
from stream_mmrnn.bus.publisher import Numbers, Publisher
from stream_mmrnn.bus.request_reply import AsyncDealer, Dealer, Dealers, Router
from stream_mmrnn.bus.subscriber import Gaps, GapsState, Subscriber

__all__ = [
    "Address",
    "AsyncDealer",
    "Authenticator",
    "Dealer",
    "Dealers",
    "Gaps",
    "GapsState",
    "JournalClient",
    "JournalSocket",
    "Keys",
    "LineSocket",
    "Numbers",
    "Publisher",
    "Right",
    "Router",
    "Subscriber",
    "new_pair",
    "public_of",
    "run_broker",
]
