# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work that a verb need not wait for: done at once, or later by a resident process."""

from collections.abc import Callable

Later = Callable[[Callable[[], None]], None]
"""Takes work that may raise a NatnsError, and runs it at any time.

A failure must be reported, and must not fail the verb.
"""


def at_once(work: Callable[[], None]) -> None:
    """Do the work now, for a process that is about to end."""
    work()
