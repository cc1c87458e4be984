"""Speed, memory and accuracy of the implementations.

    python -m benchmarks                    # Attention, against softmax and libraries.
    python -m benchmarks --quick            # The same on one tiny case.
    python -m benchmarks matrices           # Many small matrices.
    python -m benchmarks collapse_measures  # The measures of collapse.
    python -m benchmarks gpu_block_search   # Blocks of the GPU kernels, on a GPU.
    python -m benchmarks readme             # README table and pages from kept rows.
    python -m benchmarks.ahead_of_time.tpu  # TPU kernels, compiled without a TPU.
    python -m benchmarks.ahead_of_time.gpu  # GPU kernels, compiled without a GPU.

Measurements are appended below results/<device>/. `sinkhorn_jax` does not import this.
"""
