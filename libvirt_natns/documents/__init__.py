# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents: bytes of XML and TOML to models, with one clear line for what is refused.

Decides from a document alone, whether a network or guest is ours included.
"""
