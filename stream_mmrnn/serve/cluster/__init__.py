"""Sessions on the engines of many machines, over NATS with JetStream: `serve --cluster`.

Clients write to a log. One engine holds the lease of a partition: it reads the log, steps, and writes the answers to a
second log. NATS is the broker, the logs and the key-value store, and it rejects writes of former owners.
"""
