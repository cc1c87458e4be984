"""Sinkhorn attention as kernels for NVIDIA's Hopper GPUs. `attend.py` is the entry."""
