# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traits of operations, by which a plan is carried out."""


class Traits:
    """How a kind of operation is treated when a plan is carried out.

    Class attributes, not fields: an operation is the same with any of them.
    """

    __slots__ = ()

    encloses = False
    """The operations that follow in a plan are inside of this one: a namespace."""

    always_recheck = False
    """The operation may have ended since it was carried out a moment ago: a daemon."""

    on_change_only = False
    """The operation follows other changes, and is no repair of its own: an announcement."""
