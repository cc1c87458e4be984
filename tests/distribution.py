"""Checks the wheel of a folder: `make dist` runs it.

python tests/distribution.py dist
"""

import pathlib
import sys
import zipfile
from typing import Final

LARGEST: Final = 300_000  # Bytes.

(wheel,) = pathlib.Path(sys.argv[1]).glob("*.whl")
size = wheel.stat().st_size
names = zipfile.ZipFile(wheel).namelist()
others = {name.partition("/")[0] for name in names} - {"sinkhorn_jax"}
others = {name for name in others if not name.endswith(".dist-info")}
if size > LARGEST or others:
    sys.exit(f"{wheel} has {size} bytes, and beside the package {sorted(others)}.")
print(f"{wheel}: {size} bytes.")
