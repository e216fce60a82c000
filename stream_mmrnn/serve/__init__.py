"""Sessions of other programs, over ZeroMQ, on one engine: `stream-mmrnn serve` and its client."""
