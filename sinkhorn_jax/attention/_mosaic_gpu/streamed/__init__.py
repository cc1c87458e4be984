"""Kernels that pass over the kernel matrix strip by strip, one launch a pass."""
