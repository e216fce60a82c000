"""Read-only consumers of the bus: the live page, `top`, the terminal view, Prometheus, traces, Foxglove, LSL."""
