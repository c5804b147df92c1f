# SPDX-License-Identifier: LGPL-2.1-or-later
"""pyroute2's route socket, which makes all changes of links, addresses and routes.

pyroute2 takes 0.3 s of computing to import.  ``kernel.channel`` imports this module with a
process's first change, so a hook that changes nothing does not pay for it.
"""

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

__all__ = ["IPRoute", "NetlinkError"]
