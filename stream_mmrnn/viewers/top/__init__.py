"""`stream-mmrnn top`: a running session and the resources of its processes, seen from another process."""
