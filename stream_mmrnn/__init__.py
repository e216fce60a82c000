"""A streaming real-time sequence predictor.

Every public name is importable from here, and is loaded when it is first used: `import stream_mmrnn` alone imports
no other module. Modules below this one may move; these names do not. The distribution `stream-mmrnn-client` has only
some of the modules: the names of the others raise ImportError there.
"""

from __future__ import annotations

import os.path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stream_mmrnn.adapters.livekit import LiveKitTurnDetector as LiveKitTurnDetector
    from stream_mmrnn.adapters.pipecat import PipecatTurnAnalyzer as PipecatTurnAnalyzer
    from stream_mmrnn.adapters.pipecat import PipecatTurnStopStrategy as PipecatTurnStopStrategy
    from stream_mmrnn.adapters.turn_reader import Turn as Turn
    from stream_mmrnn.adapters.turn_reader import TurnReader as TurnReader
    from stream_mmrnn.adapters.turns import PredictorTurns as PredictorTurns
    from stream_mmrnn.adapters.turns import SessionTurns as SessionTurns
    from stream_mmrnn.bus import Address as Address
    from stream_mmrnn.bus import Publisher as Publisher
    from stream_mmrnn.bus import Subscriber as Subscriber
    from stream_mmrnn.bus.prediction_reader import Model as Model
    from stream_mmrnn.bus.prediction_reader import PredictionView as PredictionView
    from stream_mmrnn.bus.push import Push as Push
    from stream_mmrnn.bus.push import push as push
    from stream_mmrnn.bus.subscription import Subscription as Subscription
    from stream_mmrnn.bus.subscription import subscribe as subscribe
    from stream_mmrnn.capture.encoders import Encoder as Encoder
    from stream_mmrnn.capture.encoders import create_encoder as create_encoder
    from stream_mmrnn.capture.encoders.audio import AudioEncoder as AudioEncoder
    from stream_mmrnn.capture.encoders.face import FaceEncoder as FaceEncoder
    from stream_mmrnn.capture.encoders.image import ImageEncoder as ImageEncoder
    from stream_mmrnn.capture.encoders.prosody import ProsodyEncoder as ProsodyEncoder
    from stream_mmrnn.capture.encoders.signal import SignalEncoder as SignalEncoder
    from stream_mmrnn.capture.encoders.text import TextEncoder as TextEncoder
    from stream_mmrnn.capture.pipeline import Outgoing as Outgoing
    from stream_mmrnn.capture.pipeline import Pump as Pump
    from stream_mmrnn.capture.pipeline import capture as capture
    from stream_mmrnn.capture.pipeline import reencode as reencode
    from stream_mmrnn.capture.remote_clock import RemoteClock as RemoteClock
    from stream_mmrnn.capture.sources import Source as Source
    from stream_mmrnn.capture.sources import create_source as create_source
    from stream_mmrnn.capture.sources.camera import Camera as Camera
    from stream_mmrnn.capture.sources.file import FilePicture as FilePicture
    from stream_mmrnn.capture.sources.file import FileSound as FileSound
    from stream_mmrnn.capture.sources.lsl import LslSource as LslSource
    from stream_mmrnn.capture.sources.microphone import Microphone as Microphone
    from stream_mmrnn.capture.sources.synthetic import Synthetic as Synthetic
    from stream_mmrnn.core.block import Block as Block
    from stream_mmrnn.core.block import BlockPredictions as BlockPredictions
    from stream_mmrnn.core.block import StateBlock as StateBlock
    from stream_mmrnn.core.clock import now_ns as now_ns
    from stream_mmrnn.core.config import find_model as find_model
    from stream_mmrnn.core.errors import BadTick as BadTick
    from stream_mmrnn.core.errors import Busy as Busy
    from stream_mmrnn.core.errors import ConfigError as ConfigError
    from stream_mmrnn.core.errors import DuplicateSession as DuplicateSession
    from stream_mmrnn.core.errors import Evicted as Evicted
    from stream_mmrnn.core.errors import FileError as FileError
    from stream_mmrnn.core.errors import ModelError as ModelError
    from stream_mmrnn.core.errors import NotRunning as NotRunning
    from stream_mmrnn.core.errors import PluginError as PluginError
    from stream_mmrnn.core.errors import ProcessError as ProcessError
    from stream_mmrnn.core.errors import ProviderError as ProviderError
    from stream_mmrnn.core.errors import RecordingError as RecordingError
    from stream_mmrnn.core.errors import SessionError as SessionError
    from stream_mmrnn.core.errors import ShardDied as ShardDied
    from stream_mmrnn.core.errors import SnapshotError as SnapshotError
    from stream_mmrnn.core.errors import SourceError as SourceError
    from stream_mmrnn.core.errors import SourceSpecError as SourceSpecError
    from stream_mmrnn.core.errors import StreamError as StreamError
    from stream_mmrnn.core.errors import TimedOut as TimedOut
    from stream_mmrnn.core.errors import UnknownSession as UnknownSession
    from stream_mmrnn.core.errors import UsageError as UsageError
    from stream_mmrnn.core.errors import WireError as WireError
    from stream_mmrnn.core.settings import Settings as Settings
    from stream_mmrnn.core.streams import Stream as Stream
    from stream_mmrnn.core.types import Envelope as Envelope
    from stream_mmrnn.core.types import HeadSpec as HeadSpec
    from stream_mmrnn.core.types import Mark as Mark
    from stream_mmrnn.core.types import ModalitySpec as ModalitySpec
    from stream_mmrnn.core.types import ModelSpec as ModelSpec
    from stream_mmrnn.core.types import Prediction as Prediction
    from stream_mmrnn.core.types import Sample as Sample
    from stream_mmrnn.core.types import Stamps as Stamps
    from stream_mmrnn.core.types import StateSpec as StateSpec
    from stream_mmrnn.core.types import Tick as Tick
    from stream_mmrnn.core.wire import PredictionMessage as PredictionMessage
    from stream_mmrnn.core.wire import SessionMessage as SessionMessage
    from stream_mmrnn.core.wire import StatusMessage as StatusMessage
    from stream_mmrnn.offline.predictor import Predictor as Predictor
    from stream_mmrnn.predict.align import Aligner as Aligner
    from stream_mmrnn.predict.contract import write_contract as write_contract
    from stream_mmrnn.predict.engine import StepEngine as StepEngine
    from stream_mmrnn.predict.engine import move as move
    from stream_mmrnn.predict.pipeline import predict as predict
    from stream_mmrnn.predict.sharded_engine import ShardedEngine as ShardedEngine
    from stream_mmrnn.recording.mcap_file import Recording as Recording
    from stream_mmrnn.recording.recorder import Recorder as Recorder
    from stream_mmrnn.serve.async_client import AsyncClient as AsyncClient
    from stream_mmrnn.serve.async_client import AsyncRawServedSession as AsyncRawServedSession
    from stream_mmrnn.serve.async_client import AsyncServedSession as AsyncServedSession
    from stream_mmrnn.serve.client import Client as Client
    from stream_mmrnn.serve.client import RawServedSession as RawServedSession
    from stream_mmrnn.serve.client import ServedSession as ServedSession
    from stream_mmrnn.serve.client_group import AsyncGroup as AsyncGroup
    from stream_mmrnn.serve.client_group import Group as Group
    from stream_mmrnn.serve.client_groups import GroupAnswer as GroupAnswer
    from stream_mmrnn.serve.client_session import Answer as Answer
    from stream_mmrnn.serve.cluster.client import ClusterClient as ClusterClient
    from stream_mmrnn.serve.protocol import Welcome as Welcome
    from stream_mmrnn.serve.sessions import Sessions as Sessions

_PUBLIC = {
    "adapters.livekit": ("LiveKitTurnDetector",),
    "adapters.pipecat": ("PipecatTurnAnalyzer", "PipecatTurnStopStrategy"),
    "adapters.turn_reader": ("Turn", "TurnReader"),
    "adapters.turns": ("PredictorTurns", "SessionTurns"),
    "bus": ("Address", "Publisher", "Subscriber"),
    "bus.prediction_reader": ("Model", "PredictionView"),
    "bus.push": ("Push", "push"),
    "bus.subscription": ("Subscription", "subscribe"),
    "capture.encoders": ("Encoder", "create_encoder"),
    "capture.encoders.audio": ("AudioEncoder",),
    "capture.encoders.face": ("FaceEncoder",),
    "capture.encoders.image": ("ImageEncoder",),
    "capture.encoders.prosody": ("ProsodyEncoder",),
    "capture.encoders.signal": ("SignalEncoder",),
    "capture.encoders.text": ("TextEncoder",),
    "capture.pipeline": ("Outgoing", "Pump", "capture", "reencode"),
    "capture.remote_clock": ("RemoteClock",),
    "capture.sources": ("Source", "create_source"),
    "capture.sources.camera": ("Camera",),
    "capture.sources.file": ("FilePicture", "FileSound"),
    "capture.sources.lsl": ("LslSource",),
    "capture.sources.microphone": ("Microphone",),
    "capture.sources.synthetic": ("Synthetic",),
    "core.block": ("Block", "BlockPredictions", "StateBlock"),
    "core.clock": ("now_ns",),
    "core.config": ("find_model",),
    "core.settings": ("Settings",),
    "core.errors": (
        *("BadTick", "Busy", "ConfigError", "DuplicateSession", "Evicted", "FileError", "ModelError", "NotRunning"),
        *("PluginError", "ProcessError", "ProviderError", "RecordingError", "SessionError", "ShardDied"),
        *("SnapshotError", "SourceError", "SourceSpecError", "StreamError", "TimedOut", "UnknownSession"),
        *("UsageError", "WireError"),
    ),
    "core.streams": ("Stream",),
    "core.types": (
        *("Envelope", "HeadSpec", "Mark", "ModalitySpec", "ModelSpec", "Prediction", "Sample", "Stamps", "StateSpec"),
        "Tick",
    ),
    "core.wire": ("PredictionMessage", "SessionMessage", "StatusMessage"),
    "offline.predictor": ("Predictor",),
    "predict.align": ("Aligner",),
    "predict.contract": ("write_contract",),
    "predict.engine": ("StepEngine", "move"),
    "predict.pipeline": ("predict",),
    "predict.sharded_engine": ("ShardedEngine",),
    "recording.mcap_file": ("Recording",),
    "recording.recorder": ("Recorder",),
    "serve.async_client": ("AsyncClient", "AsyncRawServedSession", "AsyncServedSession"),
    "serve.client": ("Client", "RawServedSession", "ServedSession"),
    "serve.client_group": ("AsyncGroup", "Group"),
    "serve.client_groups": ("GroupAnswer",),
    "serve.client_session": ("Answer",),
    "serve.cluster.client": ("ClusterClient",),
    "serve.protocol": ("Welcome",),
    "serve.sessions": ("Sessions",),
}
"""Module -> its public names."""
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}
_ROOMS = ("capture", "predict")
"""Functions with the name of their own subpackage. Importing any module of the subpackage makes Python set the
attribute `stream_mmrnn.predict` to the package, so the attribute cannot reliably be the function. It is always the
package, and the package can be called: see `core.callable_package`."""

_HERE = os.path.dirname(__file__)  # noqa: PTH120  # os is loaded already, pathlib is not


def _is_here(module: str) -> bool:
    path = os.path.join(_HERE, *module.split("."))  # noqa: PTH118
    return os.path.exists(f"{path}.py") or os.path.exists(path)  # noqa: PTH110


__all__ = sorted(name for module, names in _PUBLIC.items() if _is_here(module) for name in names)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name != "__version__" and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stream_mmrnn.core import distribution, extras

    if name == "__version__":
        return distribution.version()
    distribution.warn_of_both()
    home = f"{__name__}.{_HOMES[name]}"
    if extras.missing([home]) and distribution.CLIENT in distribution.installed():
        raise ImportError(distribution.not_in_client(name), name=home)
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name == "ClusterClient":
        extras.need("a cluster", "cluster", "nats")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
