"""Benchmarks and their judges."""
