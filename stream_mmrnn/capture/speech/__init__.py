"""From sound, offline: words (`from:STREAM/speech`, extra `speech`) and whether a turn ends (`from:STREAM/turn_end`).

Knows nothing about the bus, files of recordings or the wall clock.
"""
