"""A new recording with all messages of another one, and labels among them."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.recording.label_file import LabelFile, Merge
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.message_counts import MessageCounts
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.settings import streams_of

_OF_THE_FILE = ("format", "session", "wall_offset_ns", "checksum")
"""Metadata that the recorder writes itself."""


def copy_with(path: Path, labels: LabelFile, out: Path) -> Path:
    """Write the new recording `out`; `path` is not changed.

    Raises:
        FileError: `out` exists already or cannot be written; nothing is left of it then.

    """
    recording = Recording(path, labels_beside=False)
    metadata = {key: text for key, text in recording.metadata.items() if key not in _OF_THE_FILE}
    recorder = Recorder(
        out,
        recording.session,
        metadata,
        wall_offset_ns=int(recording.metadata["wall_offset_ns"]),
        table=streams_of(recording.metadata),
    )
    try:
        merge, seq = Merge(recording.session, labels), 0
        for batch in (*map(merge.into, recording.columns()), *merge.rest()):
            for e in batch.envelopes():
                if e.topic == topics.LABEL:
                    e, seq = msgspec.structs.replace(e, seq=seq), seq + 1
                recorder.write(msgspec.structs.replace(e, received_ns=e.publish_ns))
                recorder.flush_due(e.publish_ns)
                if recorder.trouble:
                    raise FileError(f"{out} cannot be written: {recorder.trouble}; make room, or choose another place")
        for at_ns, step_ns in recording.wall_steps:
            recorder.note_wall_step(at_ns, step_ns)
        if recorder.unwritable or recording.damage:
            raise FileError(f"{path} cannot be copied: {recording.damage or recorder.refused}; repair it first")
        if not recorder.close(_end(recording, recorder)):
            raise FileError(f"{out} cannot be written: {recorder.trouble}; make room, or choose another place")
    except BaseException:
        recorder.abandon()
        out.unlink(missing_ok=True)
        raise
    return out


def _end(recording: Recording, recorder: Recorder) -> dict[str, str]:
    """The end of the new file: what the recording's says, with the messages that there are."""
    dropped = MessageCounts.of(recording.end).dropped
    produced = {
        topic: recorder.counts.get(topic, 0) + sum(dropped.get(topic, {}).values())
        for topic in recorder.counts | dropped
    }
    counts = MessageCounts(produced, recorder.counts, {}, dropped).as_metadata()
    kept = {key: text for key, text in recording.end.items() if key not in ("checksum", "messages", "unwritable")}
    return {**kept, **counts}
