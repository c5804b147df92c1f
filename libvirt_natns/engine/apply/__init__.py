# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carrying out a plan: operations are compared with the kernel, and made so."""
