# SPDX-License-Identifier: LGPL-2.1-or-later
"""From metadata to claims: forwards and static NAT, with all addresses and ports."""
