"""Flags of XLA, which count only if they are set before JAX starts."""

import importlib.metadata
import os
from typing import Final

# Most of the suite's time is compilation. The first flag lowers LLVM's effort; the
# other chooses an older way to emit loops, which compiles in half the time. XLA's graph
# stays the same. Later versions may lack it, and XLA aborts at a flag that it does not
# know.
QUICK_COMPILATION: Final = (
    "--xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false"
    * importlib.metadata.version("jaxlib").startswith("0.10.")
)
EIGHT_DEVICES: Final = "--xla_force_host_platform_device_count=8"


def compile_quickly():
    """Does nothing if XLA_FLAGS is set, which may be to nothing."""
    os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)
