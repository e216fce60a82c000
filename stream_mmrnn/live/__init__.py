"""A live session on this machine: its processes, the supervisor, and going on after a crash."""
