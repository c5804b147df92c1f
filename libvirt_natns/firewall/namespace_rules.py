# SPDX-License-Identifier: LGPL-2.1-or-later
"""All rules of one namespace, made from its policy.

``namespace_published`` translates destinations, ``namespace_edge`` holds the upstream's edge,
``namespace_forward`` and ``namespace_input`` judge packets, ``namespace_limits`` limits new
addresses and flows.  Everything here is pure.

IPv6 is as IPv4 where a subnet is private.  Public subnets pass as they are: all goes out.
Published ports come in, and so do echo requests and errors, as RFC 4890 asks.  A policy
without IPv6 has no rule about IPv6: the namespace has none then.

Limits: A client outside with an address in a private subnet is not answered: from here,
the address is a guest's.
"""

from libvirt_natns.firewall.helpers import following
from libvirt_natns.firewall.namespace_edge import edge
from libvirt_natns.firewall.namespace_forward import forwarded
from libvirt_natns.firewall.namespace_input import addressed
from libvirt_natns.firewall.namespace_limits import arp
from libvirt_natns.firewall.namespace_policy import Policy, family_policies
from libvirt_natns.firewall.namespace_published import published
from libvirt_natns.firewall.rule import Rule


def ruleset(policy: Policy) -> tuple[Rule, ...]:
    """Return all rules of one namespace, in an order that keeps each chain's own."""
    halves = family_policies(policy)
    return (
        *following(policy.inner, policy.helpers),
        *published(policy, halves),
        *edge(policy, halves),
        *forwarded(policy, halves),
        *addressed(halves),
        *arp(policy),
    )
