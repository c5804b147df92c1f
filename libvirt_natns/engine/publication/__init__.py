# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata becomes claims here: forwards and static NAT, with all addresses and ports."""
