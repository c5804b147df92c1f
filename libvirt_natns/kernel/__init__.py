# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel: links, addresses, routes, namespaces, processes, packets that probe.

Wraps netlink, /proc, /sys and system calls.  Knows nothing of networks, upstreams or plans.
"""
