# SPDX-License-Identifier: LGPL-2.1-or-later
"""NAT routers, in network namespaces, for libvirt's isolated networks.

Importing the package alone costs next to nothing: the hooks that libvirt runs
start from here, four times for every guest on the host.
"""

__version__ = "0.2.0"
