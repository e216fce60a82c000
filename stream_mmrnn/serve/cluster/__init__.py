"""Sessions of many clients on the engines of many machines, over NATS with JetStream: `serve --cluster`.

What a client says goes to a log, by session; a session's partition has one engine that holds its lease, reads the log,
steps and writes what it says to another log, from which clients are told. NATS is the broker, the log, the key-value
store and the judge of who may write; nothing of these is our own.
"""
