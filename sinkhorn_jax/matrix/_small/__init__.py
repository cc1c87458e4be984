"""Pallas kernels for many matrices of at most 16 rows and columns each."""
