"""Mutants of kernels: what is changed, how each language's are built, and the tests that must notice (tests/mutate.py)."""
