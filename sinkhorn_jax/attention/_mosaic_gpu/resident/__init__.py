"""Kernels that keep the kernel matrix of a head in shared memory."""
