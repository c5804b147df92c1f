# SPDX-License-Identifier: LGPL-2.1-or-later
"""The part of the host that all networks share."""
