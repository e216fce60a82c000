"""The configuration that a recording was made with, read back from its metadata, and its table of streams."""

from __future__ import annotations

import json
from collections.abc import Mapping

from stream_mmrnn.core import config, streams
from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import ChosenEncoders, chosen_encoders, stream_table
from stream_mmrnn.recording.mcap_file import Recording


def settings_of(recording: Recording) -> Settings:
    """The configuration in a recording's metadata; raises FileError if this release cannot read it."""
    try:
        return _settings(recording.metadata)
    except (KeyError, ValueError, AttributeError, RecursionError, ConfigError) as e:
        raise FileError(f"{recording.path} holds no configuration that this release can read: {e}") from e


def _settings(metadata: Mapping[str, str]) -> Settings:
    return config.recorded(json.loads(metadata["config"]))


def streams_of(metadata: Mapping[str, str]) -> dict[str, streams.Stream]:
    """The streams of a recording by name, from its metadata; the usual ones where it has no readable configuration."""
    try:
        return stream_table(_settings(metadata))
    except (KeyError, ValueError, AttributeError, RecursionError, ConfigError):
        return streams.usual()


def encoders_of(metadata: Mapping[str, str]) -> dict[str, ChosenEncoders]:
    """By stream of a recording, its encoders and why it had these; {} where it has no readable configuration."""
    try:
        return chosen_encoders(_settings(metadata))
    except (KeyError, ValueError, AttributeError, RecursionError, ConfigError):
        return {}
