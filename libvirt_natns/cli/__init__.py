# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line virt-natns, and what prints: tables, diagrams, checks of the machine."""
