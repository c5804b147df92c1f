# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records are compared here with the kernel and with libvirt, and differences are repaired."""
