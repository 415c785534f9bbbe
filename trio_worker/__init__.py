"""A worker process that serves a language model with Apple MLX to callers on NATS."""

__version__ = "0.1.0"
