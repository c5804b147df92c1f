# SPDX-License-Identifier: LGPL-2.1-or-later
"""A picture of the networks that are up: its facts, and a renderer for each format."""
