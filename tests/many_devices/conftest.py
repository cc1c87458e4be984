"""Tests on eight simulated devices, which tests/package/test_many_devices.py runs."""

import os

DEVICES = "--xla_force_host_platform_device_count=8"

collect_ignore_glob = [] if DEVICES in os.environ.get("XLA_FLAGS", "") else ["test_*"]
