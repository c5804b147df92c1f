# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs of guests, by the metadata of their documents."""
