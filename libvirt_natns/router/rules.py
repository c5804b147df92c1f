# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of a router namespace, in the words of both backends.

* What the host and the namespaces of networks send to the outside is
  masqueraded, and replies come in.
* The host's ports and the networks' published ones answer on whatever IPv4 address the
  router has, to whoever asks: clients outside, the host itself and guests.
  Behind the router the last two are seen by the router's address.
* Nothing else passes in IPv4.  In IPv6 all that the NIC gets for the host's own
  addresses does, as it did before: filtering it is the host's.

Nothing listens in the namespace, so nothing need be said about what is addressed to it.

Limits: legacy iptables says nothing about IPv6, so there a packet that comes in for an address
that nobody has is looked for on the NIC's link, and dropped after that.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network

from libvirt_natns import firewall, names
from libvirt_natns.addresses import default_route
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.firewall.host import HostForward
from libvirt_natns.firewall.iptables import Place
from libvirt_natns.firewall.nftables import Hook
from libvirt_natns.firewall.rules import Rule, limited, single
from libvirt_natns.records import asdict
from libvirt_natns.router.journal import Target

LAYOUT: nftables.Layout = {
    "dstnat": Hook("nat", "prerouting", "dstnat"),
    "clamp": Hook("filter", "forward", "mangle"),
    "forward": Hook("filter", "forward", "filter"),
    "srcnat": Hook("nat", "postrouting", "srcnat"),
}

LEGACY: iptables.Layout = {
    "dstnat": Place("nat", "PREROUTING"),
    "srcnat": Place("nat", "POSTROUTING"),
    "clamp": Place("mangle", "FORWARD"),
    "forward": Place("filter", "FORWARD"),
}


def rules(target: Target, forwards: Iterable[HostForward] = ()) -> tuple[Rule, ...]:
    """All rules of a router; ``forwards`` are what its networks publish."""
    return (
        *_translated(target, forwards),
        Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss"),
        *_masqueraded(target),
        *_passing(target),
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


def _passing(target: Target) -> Iterator[Rule]:
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
    # IPv6, too: nobody is a router to the NIC's neighbours.
    yield Rule(chain="forward", iif=target.nic, oif=target.nic, action="drop")
    yield Rule(chain="forward", destinations=(default_route(4),), action="drop")


# -- loading -----------------------------------------------------------------


def _wanted(target: Target, wanted: tuple[Rule, ...]) -> str:
    return f"{target.backend} {firewall.fingerprint(nftables.render(wanted, LAYOUT))}"


def _shown(target: Target) -> str:
    listing = firewall.named(target.backend).listing(target.namespace)
    return firewall.fingerprint(listing) if listing else "nothing"


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
    except FileNotFoundError:
        return ""


def load(target: Target, wanted: tuple[Rule, ...]) -> None:
    """Put the rules in force, all of them or none.  Raises FirewallError."""
    file = names.router_file(target.name, "rules")
    file.unlink(missing_ok=True)
    if target.backend == nftables.name:
        nftables.run(target.namespace, nftables.render(wanted, LAYOUT))
    else:
        made = [asdict(table) for table in iptables.tables(wanted, LEGACY)]
        iptables.call(target.namespace, "replace", tables=made)
    file.write_text(f"{_wanted(target, wanted)} {_shown(target)}")
