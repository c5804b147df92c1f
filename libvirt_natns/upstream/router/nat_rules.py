# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of a router namespace, in the words of both backends.

* What the host and the namespaces of networks send to the outside is
  masqueraded, and replies come in.
* The host's ports and the networks' published ones answer on whatever IPv4 address the
  router has, to whoever asks: clients outside, the host itself and guests.
  Behind the router the last two are seen by the router's address.
* Nothing else passes in IPv4.  In IPv6 all that the NIC gets for the host's own
  addresses does, as it did before: filtering it is the host's.  What networks have of
  prefixes that the outside knows passes both ways, too: their namespaces filter it.

Nothing listens in the namespace, so nothing need be said about what is addressed to it.

Limits: where networks get no IPv6, legacy iptables says nothing about it, so there a packet
that comes in for an address that nobody has is looked for on the NIC's link, and dropped after
that.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.addresses import default_route
from libvirt_natns.firewall import backends, iptables, nft, nftables
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.iptables import Place
from libvirt_natns.firewall.nftables import BaseChain
from libvirt_natns.firewall.rule import Rule, limited, single
from libvirt_natns.records import asdict
from libvirt_natns.upstream.router import journal
from libvirt_natns.upstream.router.downstream import Needs
from libvirt_natns.upstream.router.journal import Target

NOTHING = Needs()

LAYOUT: nftables.Layout = {
    "dstnat": BaseChain("nat", "prerouting", "dstnat"),
    "clamp": BaseChain("filter", "forward", "mangle"),
    "forward": BaseChain("filter", "forward", "filter"),
    "srcnat": BaseChain("nat", "postrouting", "srcnat"),
}

LEGACY: iptables.Layout = {
    "dstnat": Place("nat", "PREROUTING"),
    "srcnat": Place("nat", "POSTROUTING"),
    "clamp": Place("mangle", "FORWARD"),
    "forward": Place("filter", "FORWARD"),
}


def rules(target: Target, needs: Needs = NOTHING) -> tuple[Rule, ...]:
    """All rules of a router with what its networks need."""
    return (
        *_translated(target, needs.forwards),
        Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss"),
        *_masqueraded(target),
        *(_masqueraded6(target) if target.transit6 else ()),
        *_passing(target, _passing6(target, needs) if target.transit6 else ()),
    )


def _insides(target: Target) -> tuple[tuple[str, tuple[IPv4Network, ...]], ...]:
    """The links behind which somebody lives, with the subnets there."""
    return (
        (names.ROUTER_HOST_LINK, (IPv4Network(target.host_subnet),)),
        (names.ROUTER_TRANSIT, (IPv4Network(target.transit),)),
    )


def _translated(target: Target, forwards: Iterable[HostForward]) -> Iterator[Rule]:
    for protocol, first, last in target.ports:
        yield Rule(
            chain="dstnat",
            local=True,
            protocol=protocol,
            span=(first, last),
            action="dnat",
            to=target.host.ip,
            unique=True,
        )
    for forward in forwards:
        # One source a rule, since nft lists several in its own order, and merged.
        for source in limited(forward.sources) or (None,):
            yield Rule(
                chain="dstnat",
                sources=(source,) if source else (),
                destinations=single(forward.address) if forward.address else (),
                local=forward.address is None,
                protocol=forward.proto,
                span=(forward.first, forward.last),
                action="dnat",
                to=forward.target,
                unique=True,
            )


def _masqueraded(target: Target) -> Iterator[Rule]:
    for link, _ in _insides(target):
        for _, subnets in _insides(target):
            # The reply would find another way: to itself, or past the router.
            yield Rule(
                chain="srcnat", oif=link, sources=subnets, translated=True, action="masquerade"
            )
    for _, subnets in _insides(target):
        yield Rule(chain="srcnat", oif=target.nic, sources=subnets, action="masquerade")


def _masqueraded6(target: Target) -> Iterator[Rule]:
    """What bears an address of the transit bridge is seen by the router's own."""
    sources = (IPv6Network(target.transit6),)
    # On the bridge, too: the reply would find the short way, past the router.
    for link in (target.nic, names.ROUTER_HOST_LINK, names.ROUTER_TRANSIT):
        yield Rule(chain="srcnat", oif=link, sources=sources, action="masquerade")


def _passing(target: Target, six: Iterable[Rule]) -> Iterator[Rule]:
    yield Rule(chain="forward", states=("established", "related"), action="accept")
    for link, subnets in _insides(target):
        yield Rule(chain="forward", iif=link, oif=target.nic, sources=subnets, action="accept")
        yield Rule(
            chain="forward",
            oif=link,
            destinations=subnets,
            translated=True,
            states=("new",),
            action="accept",
            comment="published",
        )
    yield from six
    # IPv6, too: nobody is a router to the NIC's neighbours.
    yield Rule(chain="forward", iif=target.nic, oif=target.nic, action="drop")
    yield Rule(chain="forward", destinations=(default_route(4),), action="drop")


def _passing6(target: Target, needs: Needs) -> Iterator[Rule]:
    """In and out of the transit bridge in IPv6: what networks' addresses are, and no more."""
    bridge, own = names.ROUTER_TRANSIT, (IPv6Network(target.transit6),)
    yield Rule(chain="forward", iif=bridge, sources=own, action="accept")
    for prefix, gateway in needs.prefixes:
        # With a gateway that has changed the routes have, too: see ``is_current``.
        public, by = (IPv6Network(prefix),), f"by {gateway}"
        yield Rule(chain="forward", iif=bridge, sources=public, action="accept", comment=by)
        yield Rule(chain="forward", oif=bridge, destinations=public, action="accept", comment=by)
    yield Rule(
        chain="forward",
        oif=bridge,
        destinations=own,
        translated=True,
        states=("new",),
        action="accept",
        comment="published",
    )
    yield Rule(chain="forward", iif=bridge, only=6, action="drop")
    yield Rule(chain="forward", oif=bridge, only=6, action="drop")


# -- loading -----------------------------------------------------------------


def _wanted(target: Target, wanted: tuple[Rule, ...]) -> str:
    return f"{target.backend} {backends.fingerprint(nftables.render(wanted, LAYOUT))}"


def _shown(target: Target) -> str:
    listing = backends.named(target.backend).listing(target.namespace)
    return backends.fingerprint(listing) if listing else "nothing"


def is_current(target: Target, wanted: tuple[Rule, ...]) -> bool:
    """Whether these are what was loaded last, without a look at the kernel."""
    return _recorded(target).startswith(f"{_wanted(target, wanted)} ")


def differences(target: Target, wanted: tuple[Rule, ...]) -> list[str]:
    """Whether the rules are not in force, or were altered."""
    if _recorded(target) == f"{_wanted(target, wanted)} {_shown(target)}":
        return []
    return [f"firewall of {target.namespace} is missing or was altered"]


def _recorded(target: Target) -> str:
    try:
        return names.router_file(target.name, "rules").read_text()
    except (OSError, UnicodeDecodeError):
        # Then the rules are loaded anew.
        return ""


def load(target: Target, wanted: tuple[Rule, ...]) -> None:
    """Put the rules in force, all of them or none.  Raises FirewallError."""
    file = names.router_file(target.name, "rules")
    journal.remove(file)
    if target.backend == nftables.name:
        nft.load(target.namespace, nftables.render(wanted, LAYOUT))
    else:
        made = iptables.tables(wanted, LEGACY)
        families = sorted({table.family for table in made})
        tables = [asdict(table) for table in made]
        iptables.call(target.namespace, "replace", families=families, tables=tables)
    file.write_text(f"{_wanted(target, wanted)} {_shown(target)}")
