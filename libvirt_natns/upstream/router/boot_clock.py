# SPDX-License-Identifier: LGPL-2.1-or-later
"""The clock of deadlines and lifetimes: it goes on while the machine sleeps, and is never set."""

import time


def now() -> float:
    """Return the seconds since boot, including those in which the machine slept."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
