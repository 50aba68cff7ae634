"""Timing, tables and plots: what the command line, the demo and the benchmarks share."""
