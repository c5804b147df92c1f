# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules that have conntrack's helpers follow flows of guests, where a network asks for that.

A helper reads the announcements of a protocol, and expects the connections that they
announce.  NAT on the way changes the announcement.  So each place that translates a guest's flow
needs the rule: the network's namespace, and the host or router behind a transit bridge.
No helper is assigned without a rule of ours.
"""

from collections.abc import Collection, Iterator

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.firewall.rule import Rule, Transport
from libvirt_natns.model.upstream import Helper

PORTS: dict[Helper, tuple[Transport, int]] = {"ftp": ("tcp", 21), "tftp": ("udp", 69)}
"""The destinations of flows that a helper follows."""


def following(
    link: str, helpers: Collection[Helper], sources: tuple[IPNetwork, ...] = ()
) -> Iterator[Rule]:
    """Yield the rules for flows that arrive by a link, from all or some sources."""
    for name in sorted(set(helpers)):
        protocol, port = PORTS[name]
        yield Rule(
            chain="helper",
            iif=link,
            sources=sources,
            protocol=protocol,
            ports=(port,),
            action="helper",
            helper=name,
        )
