"""JetStream over the broker port: streams, receipts, pulls and acknowledgements."""
