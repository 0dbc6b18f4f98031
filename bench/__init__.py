"""Measurements over real processes. Figures and the hardware they come from are in docs/benchmarks.md."""
