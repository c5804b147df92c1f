# SPDX-License-Identifier: LGPL-2.1-or-later
"""A router namespace: the host's only NIC moves into it, and comes back as it was.

Each step is written down before it is done, so that a crash, a deadline or a boot can undo it.
"""
