"""Benchmarks: contestants in processes of their own, and the figures of each."""
