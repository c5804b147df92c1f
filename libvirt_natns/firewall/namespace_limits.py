# SPDX-License-Identifier: LGPL-2.1-or-later
"""A namespace's limits on new addresses and flows: ARP requests, made-up senders, conntrack.

The neighbour tables and the conntrack hash are the machine's: see ``limits``.
"""

from collections.abc import Iterator

from libvirt_natns.addresses import by_family, host_network
from libvirt_natns.firewall.namespace_policy import FamilyPolicy, Policy
from libvirt_natns.firewall.rule import Chain, Rule
from libvirt_natns.firewall.well_known import LINK_LOCAL


def arp(policy: Policy) -> Iterator[Rule]:
    """Limit new senders of ARP requests for the namespace's own addresses, and of replies."""
    own = sorted((*policy.gateways, *policy.addresses), key=by_family)
    destinations = tuple(host_network(address) for address in own if address.version == 4)
    if destinations:
        yield Rule(chain="arp", destinations=destinations, fresh="source", action="drop")


def counted(policy: Policy, chain: Chain) -> Rule:
    """Return the rule that drops new flows over the namespace's limit."""
    return Rule(chain=chain, states=("new",), flows=policy.max_flows, action="drop")


def senders(half: FamilyPolicy, chain: Chain) -> Iterator[Rule]:
    """Limit made-up senders: for a reply, the namespace would ask for each sender's neighbour."""
    link = (LINK_LOCAL,) if half.family == 6 and chain == "input" else ()
    if half.on_link:
        yield Rule(chain=chain, sources=(*half.on_link, *link), fresh="source", action="drop")
