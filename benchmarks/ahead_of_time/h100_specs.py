"""The GPU that kernels are compiled for: what it has, and what it can do at most."""

import math
from typing import Final

# What XLA asks of a device before it compiles for one. An H100 SXM, as it describes
# itself: see the CUDA C++ Programming Guide, "Compute Capabilities", 9.0, for what a
# multiprocessor has, and NVIDIA's H100 data sheet for the rest.
TARGET: Final = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 5 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# A block of threads may have so much shared memory, in bytes.
MAX_SHARED: Final = 227 * 2**10
# A multiprocessor has so much, and keeps some of it back for each block.
SHARED: Final = 228 * 2**10
RESERVED: Final = 2**10
REGISTERS: Final = 65536
# Warps get them in units of so many, from one of the four parts of a multiprocessor.
REGISTER_UNIT: Final = 256
PARTS: Final = 4
WARP: Final = 32
WARPGROUP: Final = 4  # Warps, which use the tensor cores together.
MAX_THREADS: Final = 2048
MAX_BLOCKS: Final = 32

# A second, of an H100 SXM: dense products in bfloat16 and float16, and operations in
# float32 at one for each two of its flops, says NVIDIA's data sheet,
# https://www.nvidia.com/en-us/data-center/h100/.
FLOPS: Final = 989e12
VECTOR_OPS: Final = 67e12 / 2
# A multiprocessor makes 16 results of exp2 while it makes 128 of additions: CUDA C++
# Programming Guide, "Arithmetic Instructions",
# https://docs.nvidia.com/cuda/cuda-c-programming-guide/.
EXPS: Final = VECTOR_OPS * 16 / 128
# And moves so many bytes of shared memory, from 32 banks of 4: the same guide, "Compute
# Capabilities", 9.0.
WAVEFRONT: Final = 128
SHARED_BYTES: Final = VECTOR_OPS * WAVEFRONT / 128


def blocks_at_once(registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Blocks of threads that a multiprocessor has room for, and what limits them.

    Args:
        registers: Of a thread.
        threads: Of a block.
        shared: Bytes of shared memory of a block.
    """
    warps = -(-threads // WARP)
    of_a_warp = math.ceil(registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    at_once = PARTS * (REGISTERS // PARTS // of_a_warp)
    room = {
        "registers": at_once // warps,
        "shared memory": SHARED // (shared + RESERVED),
        "threads": MAX_THREADS // (warps * WARP),
        "blocks": MAX_BLOCKS,
    }
    limit = min(room, key=lambda name: room[name])
    return room[limit], limit
