# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ways out: bridges and NICs, the transit bridge of the host, DHCP servers, router namespaces.

Completes an upstream with facts of this machine, and tells which networks can use it.
"""
