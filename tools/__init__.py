"""Benchmarks and the making of the embedded model. Not in the wheel."""
