# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router namespace: a host's only NIC, moved into a namespace that routes for the host.

``nic`` captures what the kernel holds of a NIC and puts it back, ``steps`` are what
``router up`` does, each of which can be taken back, ``journal`` remembers all of
it through a kill, ``machine`` has the verbs, ``timer`` the deadline for them.
"""
