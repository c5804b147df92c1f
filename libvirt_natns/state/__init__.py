# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state database: networks, leases, guests and claims, and the pools they lease from.

The room has all SQL that changes something.  It changes nothing in the kernel.
"""
