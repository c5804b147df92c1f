# SPDX-License-Identifier: LGPL-2.1-or-later
"""A trial of the kinds of links that networks need, for the checks of the machine."""

from libvirt_natns.kernel.bridges import Bridges
from libvirt_natns.kernel.channel import NetlinkChannel, Sockets


def try_link_kinds(*, macvlan: bool = False) -> None:
    """Make a link of each kind in the thread's namespace, which must end soon.

    Raises KernelError if this kernel lacks a kind.
    """
    sockets = Sockets()
    channel = NetlinkChannel(sockets, None)
    try:
        Bridges(channel).create("bridge", "natns-trial", "0a:00:00:00:00:01")
        channel.change(
            "to make a veth pair",
            lambda: channel.writer.link(
                "add", ifname="outer", kind="veth", peer={"ifname": "inner"}
            ),
        )
        if macvlan:
            parent = channel.index("outer")
            channel.change(
                "to make a macvlan",
                lambda: channel.writer.link(
                    "add", ifname="macvlan", kind="macvlan", link=parent, macvlan_mode="bridge"
                ),
            )
    finally:
        sockets.close(None)
