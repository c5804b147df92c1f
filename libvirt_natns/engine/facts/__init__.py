# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts for a plan: configuration, state database and kernel are read here."""
