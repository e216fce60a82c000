"""The configuration that a recording was made with, read back from its metadata."""

from __future__ import annotations

import json

from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.recording.mcap_file import Recording


def settings_of(recording: Recording) -> config.Settings:
    """The configuration in a recording's metadata; raises FileError if this release cannot read it."""
    try:
        return config.recorded(json.loads(recording.metadata["config"]))
    except (KeyError, ValueError, AttributeError, RecursionError, ConfigError) as e:
        raise FileError(f"{recording.path} holds no configuration that this release can read: {e}") from e
