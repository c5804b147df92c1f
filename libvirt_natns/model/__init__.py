# SPDX-License-Identifier: LGPL-2.1-or-later
"""Values that libvirt's XML and the configuration describe: network, guest, upstream, forward.

Each value is frozen.  Its maker in ``documents`` has validated it.
"""
