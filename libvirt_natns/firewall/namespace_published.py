# SPDX-License-Identifier: LGPL-2.1-or-later
"""Published ports and static NAT of a namespace: the real destination of a packet.

A published port answers on the upstream address, to all clients on either side: to a client
outside, and to a guest behind the same namespace (a hairpin).  The guest that offers the
service may itself be the client.  The service sees its client's own address.  A hairpin
alone is masqueraded, or the reply would take the short way past the namespace.

``sources`` of a forward are the addresses that clients have here.  A guest behind the same
namespace has its private address, so such a guest gets in only if that address is listed.
"""

from collections.abc import Iterator

from libvirt_natns.addresses import by_family
from libvirt_natns.firewall.namespace_policy import (
    FamilyPolicy,
    Policy,
    by_port,
    translated,
    translated_families,
)
from libvirt_natns.firewall.rule import Rule, limited, single
from libvirt_natns.model.publication import Forward, StaticNat


def published(policy: Policy, halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    """Yield the translations of published ports and addresses, and the way back of hairpins."""
    # In an order that does not depend on who asked first.
    forwards = sorted(translated(policy), key=by_port)
    yield from map(_dnat, forwards)
    for static in sorted(policy.statics, key=lambda static: by_family(static.address)):
        yield from _static(policy, static)
    families = translated_families(policy)
    for half in halves:
        if half.family in families and half.subnets:
            yield Rule(
                chain="srcnat",
                oif=policy.inner,
                sources=half.subnets,
                translated=True,
                action="masquerade",
                comment="hairpin",
            )


def _dnat(forward: Forward) -> Rule:
    ports, to_ports = (forward.first, forward.last), (forward.to, forward.to_last)
    return Rule(
        chain="dstnat",
        sources=limited(forward.sources),
        destinations=single(forward.address),
        protocol=forward.proto,
        span=ports,
        action="dnat",
        to=forward.target,
        to_ports=None if ports == to_ports else to_ports,
        unique=True,
    )


def _static(policy: Policy, static: StaticNat) -> Iterator[Rule]:
    """Yield both directions; the way in comes after forwards, which may take some ports away."""
    own, target = single(static.address), static.target
    for ports in static.ports:
        span = (ports.first, ports.last)
        yield Rule(
            chain="dstnat",
            destinations=own,
            protocol=ports.proto,
            span=span,
            action="dnat",
            to=target,
        )
    if not static.ports:
        yield Rule(chain="dstnat", destinations=own, action="dnat", to=target)
    yield Rule(
        chain="srcnat",
        oif=policy.upstream,
        sources=single(target),
        action="snat",
        to=static.address,
    )
