# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packets that a namespace forwards.

Packets between two ports of the private bridge do not pass the namespace within one
subnet: an isolated port would reach its siblings otherwise.  Link-local destinations,
where clouds keep their metadata, are refused unless the upstream allows them.

Limits: Connections that a protocol announces (active FTP and the like) pass only where a helper
of conntrack follows the protocol (``helpers``).  A connection of TCP that conntrack does not know
cannot be gone on with from a public subnet.  A published connection would live on from inside
otherwise, after its port is published no more.
"""

from collections.abc import Iterator
from dataclasses import replace

from libvirt_natns.firewall.namespace_limits import counted, senders
from libvirt_natns.firewall.namespace_policy import (
    FamilyPolicy,
    Policy,
    by_port,
    lets_in,
    translated_families,
)
from libvirt_natns.firewall.rule import Rule, Transport, limited, single
from libvirt_natns.firewall.well_known import LINK_LOCAL4, METADATA6
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.transit_segment import RELAY_PORT


def forwarded(policy: Policy, halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    """Yield rules for packets that may pass; the chain drops all others without an answer.

    Only forged sources and packets that conntrack calls invalid come that far.  An answer
    to a forged source would hit a stranger.  An answer to an invalid packet would hit a
    connection that works.
    """
    yield Rule(chain="forward", states=("established", "related"), action="accept")
    yield counted(policy, "forward")
    for half in halves:
        yield from senders(half, "forward")
        yield from _link_local(policy, half)
        yield from _relay(policy, half)
    yield from _translated_in(policy, halves)
    for half in halves:
        yield from _across(policy, half)
    for half in halves:
        if half.outgoing:
            yield from _let_out(policy, half)
    yield from _let_in(policy, halves)


def _link_local(policy: Policy, half: FamilyPolicy) -> Iterator[Rule]:
    """Refuse link-local destinations: a cloud's metadata are about the host, not about a guest.

    A refusal comes at once: a guest that looks for metadata while it boots would wait otherwise.
    """
    if half.outgoing and not policy.link_local:
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.upstream,
            sources=half.outgoing,
            destinations=(LINK_LOCAL4,) if half.family == 4 else METADATA6,
            action="reject",
            comment="link-local",
        )


def _relay(policy: Policy, half: FamilyPolicy) -> Iterator[Rule]:
    """Refuse guests that ask the host's DNS relay themselves: one could keep it from all others.

    The network's own dnsmasq limits the questions that wait for an answer.
    """
    protocols: tuple[Transport, ...] = ("udp", "tcp")
    for gateway in policy.transit if half.subnets else ():
        for protocol in protocols if gateway.version == half.family else ():
            yield Rule(
                chain="forward",
                iif=policy.inner,
                oif=policy.upstream,
                destinations=single(gateway.ip),
                protocol=protocol,
                ports=(RELAY_PORT,),
                action="reject",
                comment="DNS relay",
            )


def _across(policy: Policy, half: FamilyPolicy) -> Iterator[Rule]:
    """Accept packets between two subnets of one bridge, as libvirt does; limit new neighbours.

    The rules ask for no state: replies may take another way, and then conntrack calls
    packets of the flow invalid.
    """
    several = len(half.subnets) > 1
    for subnet in half.subnets if several else ():
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.inner,
            sources=(subnet,),
            destinations=(subnet,),
            action="drop",
            comment="within one subnet",
        )
    if half.on_link:
        # From outside come echo requests and flows to published ports, which have few targets.
        yield Rule(
            chain="forward",
            iif=policy.inner,
            destinations=half.on_link,
            fresh="destination",
            action="drop",
        )
    if several:
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.inner,
            sources=half.subnets,
            destinations=half.subnets,
            action="accept",
            comment="between private subnets",
        )


def _let_out(policy: Policy, half: FamilyPolicy) -> Iterator[Rule]:
    if half.public:
        # A segment from the middle of a connection begins no connection here.  After a cut,
        # a client must not go on with its connection.
        yield Rule(
            chain="forward",
            iif=policy.inner,
            oif=policy.upstream,
            sources=half.public,
            protocol="tcp",
            not_syn=True,
            states=("new",),
            action="reject",
            comment="cut",
        )
    yield Rule(
        chain="forward",
        iif=policy.inner,
        oif=policy.upstream,
        sources=half.outgoing,
        states=("new",),
        action="accept",
    )


def _translated_in(policy: Policy, halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    """Accept flows to published ports, of clients outside and of guests (hairpins)."""
    families = translated_families(policy)
    if not families:
        return
    yield Rule(
        chain="forward",
        iif=policy.upstream,
        oif=policy.inner,
        translated=True,
        states=("new",),
        action="accept",
        comment="published",
    )
    for half in halves:
        if half.family in families and half.subnets:
            yield Rule(
                chain="forward",
                iif=policy.inner,
                oif=policy.inner,
                sources=half.subnets,
                translated=True,
                states=("new",),
                action="accept",
                comment="hairpin",
            )


def _let_in(policy: Policy, halves: tuple[FamilyPolicy, ...]) -> Iterator[Rule]:
    opened = [forward for forward in policy.forwards if lets_in(policy, forward)]
    for forward in sorted(opened, key=by_port):
        yield _opened(policy, forward)
    for half in halves:
        if half.public:
            pinged = Rule(
                chain="forward",
                iif=policy.upstream,
                oif=policy.inner,
                destinations=half.public,
                protocol="icmpv6",
                icmp=("echo-request",),
                states=("new",),
                action="accept",
            )
            # Any station outside can name addresses that no guest has.
            yield replace(pinged, action="drop", fresh="destination", remembered=False)
            yield pinged


def _opened(policy: Policy, forward: Forward) -> Rule:
    return Rule(
        chain="forward",
        iif=policy.upstream,
        oif=policy.inner,
        sources=limited(forward.sources),
        destinations=single(forward.target),
        protocol=forward.proto,
        span=(forward.first, forward.last),
        states=("new",),
        action="accept",
        unique=True,
    )
