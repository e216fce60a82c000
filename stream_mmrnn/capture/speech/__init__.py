"""Words from sound, offline: `from:STREAM/speech` (extra `speech`).

Knows nothing about the bus, files of recordings or the wall clock.
"""
