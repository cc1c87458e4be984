"""Attention as Pallas kernels for NVIDIA Hopper GPUs."""
