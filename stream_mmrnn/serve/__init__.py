"""Sessions of other programs on one engine: the server, its clients, and the cluster."""
