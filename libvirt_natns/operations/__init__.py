# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations: each says one thing that must exist, tells how it differs, and makes it so."""
