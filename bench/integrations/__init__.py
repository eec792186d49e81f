"""Benchmarks of the integrations: layers of other libraries beside what this library makes of them."""
