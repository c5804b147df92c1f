# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing records with the kernel and with libvirt, and repairing the differences."""
