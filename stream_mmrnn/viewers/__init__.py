"""Read-only consumers of a running session: live page, terminal, metrics, traces, Foxglove, Lab Streaming Layer.

Each reads the bus through its own bounded queue that drops the oldest, so a slow one never delays the engine.
"""
