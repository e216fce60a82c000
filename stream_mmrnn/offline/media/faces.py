"""Does a camera tell that speech begins? Clips of one face that speaks, as served, with the picture and without it.

A clip counts from its beginning until the speech detector hears the voice; the targets are what the detector hears
afterwards. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.face import PRESENT
from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.capture.sources.file import streams_of
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.types import HeadSpec, Prediction
from stream_mmrnn.offline.media.served import Array
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.training import metrics
from stream_mmrnn.training.tasks.turn_taking_faces import before_speech, own_voice

HEAD = "activity"
_ENDINGS = (".mpg", ".mp4", ".mkv", ".webm", ".mov", ".avi")


def _files(media: Sequence[Path]) -> list[Path]:
    listed = [f for path in media for f in (path.iterdir() if path.is_dir() else [path])]
    found = sorted(f for f in listed if f.suffix.lower() in _ENDINGS and streams_of(f) >= {"vision", "audio"})
    if not found:
        raise UsageError(
            f"{', '.join(map(str, media))} holds no film with picture and sound; give clips of one face that speaks"
        )
    return found


def evaluate(model: Path, media: Sequence[Path], progress: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """By number of `activity` for `self`: the AUC before speech begins, with the picture and without it.

    Raises:
        UsageError: there is no clip, or the model has no head `activity` or no input `vision`.
        FileError: a clip cannot be read.

    """
    predictor = Predictor(str(model), inputs=("vision", "audio"))
    spec = predictor.spec
    head = next((h for h in spec.heads if h.name == HEAD and h.kind == "activity_projection"), None)
    if head is None or "vision" not in {m.name for m in spec.modalities}:
        raise UsageError(f"the model {spec.name} does not take `vision` and say `{HEAD}`; there is nothing to compare")
    used, faces, rows = [], 0, list[tuple[Array, Array, Array]]()
    for clip in _files(media):
        progress(clip.name)
        made = list(predictor.file(clip))
        heard = np.array([bool(p.tick.present["audio"] and p.tick.features["audio"][SPEECH] > VOICE) for p in made])
        before = before_speech(heard)
        if before.stop <= before.start:
            continue
        used.append(clip.name)
        faces += sum(bool(p.tick.features["vision"][PRESENT] > 0) for p in made[before])
        seen, unseen = (np.stack([p.heads[HEAD] for p in ps[before]]) for ps in (made, _unseen(model, made)))
        rows.append((own_voice(head, heard, spec.tick_ns / 1e9)[before], seen, unseen))
    if not rows:
        raise UsageError("in none of the clips speech begins after .2 s of silence; give clips in which it does")
    target, seen, unseen = (np.concatenate(columns) for columns in zip(*rows, strict=True))
    return {
        "name": spec.name,
        "model": str(model),
        "files": used,
        "ticks": len(target),
        "with_face": faces / len(target),
        "labels": {label: _scores(j, target, seen, unseen) for j, label in _own(head)},
    }


def _unseen(model: Path, made: Sequence[Prediction]) -> list[Prediction]:
    """The same ticks without the picture."""
    engine = StepEngine(model)
    session = made[0].tick.session
    engine.open(session)
    blind = (
        msgspec.structs.replace(
            p.tick, present=p.tick.present | {"vision": False}, age_ns=p.tick.age_ns | {"vision": -1}
        )
        for p in made
    )
    return [p for tick in blind for p in engine.step([tick])]


def _own(head: HeadSpec) -> list[tuple[int, str]]:
    return list(enumerate(head.labels[: head.size // 2]))


def _scores(j: int, target: Array, seen: Array, unseen: Array) -> dict[str, Any]:
    true = target[:, j] > 0
    found: dict[str, Any] = metrics.clean(
        {
            "share": float(true.mean()),
            "with_picture": metrics.auc(seen[:, j], true),
            "without": metrics.auc(unseen[:, j], true),
        }
    )
    return found
