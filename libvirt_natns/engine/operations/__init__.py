# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kinds of operations: data that says what must exist."""
