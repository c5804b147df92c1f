# SPDX-License-Identifier: LGPL-2.1-or-later
"""Traits of operations, by which a plan is carried out."""


class Traits:
    """Attributes of a kind of operation, which decide how ``carry_out`` treats it.

    They are class attributes, not fields, so they do not count when operations are compared.
    """

    __slots__ = ()

    encloses = False
    """The operations that follow in a plan are inside of this one: a namespace."""

    always_recheck = False
    """The operation may have ended since it was carried out a moment ago: a daemon."""

    on_change_only = False
    """The operation follows other changes, and is no repair of its own: an announcement."""
