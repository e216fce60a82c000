"""A running system seen from another process: `stream-mmrnn top` and `stream-mmrnn predictions`."""
