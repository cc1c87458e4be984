"""Attention as Pallas kernels for TPUs."""
