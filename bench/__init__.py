"""Benchmarks: interleaved ratios over dense torch, peers beside us, results as CSV, tables and plots for the README."""
