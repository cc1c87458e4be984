"""Tests on eight simulated devices, which tests/package/test_many_devices.py runs."""

import os

from support.xla_flags import EIGHT_DEVICES

FLAGS = os.environ.get("XLA_FLAGS", "")
collect_ignore_glob = [] if EIGHT_DEVICES in FLAGS else ["test_*"]
