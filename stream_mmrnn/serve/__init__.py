"""Serves the sessions of other programs over ZeroMQ: `stream-mmrnn serve`, its clients, and `cluster/` over NATS."""
