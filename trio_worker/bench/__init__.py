"""Measuring a worker: throughput, latency, and its own cost."""
