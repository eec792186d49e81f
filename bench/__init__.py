"""Benchmarks: ``python -m bench.run SUITE`` measures, ``python -m bench.report`` writes docs/results."""
