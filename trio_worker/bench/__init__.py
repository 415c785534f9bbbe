"""Measuring a worker: throughput, latency, and its own cost.

Every figure that compares is the median of ratios of two measurements, taken in turn in the same
run, since machines are noisy. No prompt comes twice, so nothing is answered from an earlier
measurement.
"""
