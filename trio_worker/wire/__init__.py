"""What callers and the worker say to each other on NATS."""
