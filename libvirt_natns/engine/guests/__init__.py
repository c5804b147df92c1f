# SPDX-License-Identifier: LGPL-2.1-or-later
"""Verbs of guests, by the metadata of their documents."""
