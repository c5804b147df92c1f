# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents: bytes of XML and TOML to models, with one clear line for a refusal.

The room decides from a document alone, also whether a network or guest is ours.
"""
