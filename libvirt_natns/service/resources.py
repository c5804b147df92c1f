# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors and memory of the service's process."""

import ctypes
import os
import resource
from contextlib import suppress

M_ARENA_MAX = -8
"""Of malloc.h."""


def fill_standard_streams() -> None:
    """Open /dev/null for standard streams that the service was started without.

    Otherwise a socket or the state database gets the number of standard error.
    Libraries and children would write their complaints there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # open(2) gives the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def raise_limits() -> None:
    """Allow as many descriptors as can be: a network takes a few, and the usual limit is 1024."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def save_memory() -> None:
    """Use one heap for all threads: glibc's many keep 10 MB, and few threads allocate at once."""
    with suppress(AttributeError):
        # Other C libraries have no such function, and no such heaps.
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_memory_back() -> None:
    """Give freed memory back to the machine; glibc keeps it otherwise."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
