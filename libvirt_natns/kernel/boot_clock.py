# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running boot, and its clock, which no change of the time of day moves."""

import time
from functools import cache
from pathlib import Path


@cache
def boot_id() -> str:
    """Return the kernel's id of the running boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def now() -> float:
    """Return the seconds since boot, suspended time included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
