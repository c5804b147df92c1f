# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plans: operations in the order in which they are carried out, decided without a look."""
