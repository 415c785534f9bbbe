"""Everything about NATS: the broker on nats-py, the address, the outbox, an embedded server."""
