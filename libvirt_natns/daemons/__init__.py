# SPDX-License-Identifier: LGPL-2.1-or-later
"""Programs that run beside us: dnsmasq, udhcpc, ndppd, systemd, and libvirt with its daemons.

A module starts a program, or speaks to it, and checks its answers.
"""
