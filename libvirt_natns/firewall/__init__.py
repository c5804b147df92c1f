# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall of namespaces and of the host.

This file imports nothing: a child of ``iptables`` imports the package, and starts quickly.
"""
