# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metadata becomes claims here: forwards and addresses with nothing left to look up."""
