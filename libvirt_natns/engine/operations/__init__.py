# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations: what must exist, as data."""
