# SPDX-License-Identifier: LGPL-2.1-or-later
"""The firewall rules of a router namespace, for both backends.

* Packets from the host and from networks' namespaces to the outside are masqueraded, and
  replies come in.
* The host's ports and the networks' published ports answer on each IPv4 address of the
  router.  Clients outside, the host and guests can use them.  Behind the router, packets
  of the host and of guests have the router's address.
* No other packet passes in IPv4.  In IPv6, packets to the host's own addresses pass, as they
  did before the router: the host filters them.  Packets of prefixes that the outside knows
  pass both ways: the networks' namespaces filter them.

No program listens in the namespace, so it needs no rules for packets to itself.

Limits: where networks get no IPv6, legacy iptables has no IPv6 rules.  Then the kernel asks
for an unused target address on the NIC's link, and drops the packet later.
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
from libvirt_natns.upstream.router import router_files
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.target import Target

NOTHING = RouterNeeds()

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


def rules(target: Target, needs: RouterNeeds = NOTHING) -> tuple[Rule, ...]:
    """Return all rules of a router with the needs of its networks."""
    return (
        *_translated(target, needs.forwards),
        Rule(chain="clamp", protocol="tcp", syn=True, action="clamp-mss"),
        *_masqueraded(target),
        *(_masqueraded6(target) if target.transit6 else ()),
        *_passing(target, _passing6(target, needs) if target.transit6 else ()),
    )


def _insides(target: Target) -> tuple[tuple[str, tuple[IPv4Network, ...]], ...]:
    """Return the links towards the host and the networks, with their subnets."""
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
        # Each rule has one source, since nft lists several in its own order, and merged.
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
            # Otherwise the reply would take another way: to itself, or past the router.
            yield Rule(
                chain="srcnat", oif=link, sources=subnets, translated=True, action="masquerade"
            )
    for _, subnets in _insides(target):
        yield Rule(chain="srcnat", oif=target.nic, sources=subnets, action="masquerade")


def _masqueraded6(target: Target) -> Iterator[Rule]:
    """Yield the rules by which packets from the transit bridge get the router's own address."""
    sources = (IPv6Network(target.transit6),)
    # Also on the bridge: otherwise the reply would go directly, past the router.
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
    # In IPv6, too: the NIC's neighbours must not use this router.
    yield Rule(chain="forward", iif=target.nic, oif=target.nic, action="drop")
    yield Rule(chain="forward", destinations=(default_route(4),), action="drop")


def _passing6(target: Target, needs: RouterNeeds) -> Iterator[Rule]:
    """Yield the rules that let networks' addresses pass the transit bridge, and no others."""
    bridge, own = names.ROUTER_TRANSIT, (IPv6Network(target.transit6),)
    yield Rule(chain="forward", iif=bridge, sources=own, action="accept")
    for prefix, gateway in needs.prefixes:
        # The comment has the gateway, so that ``is_current`` sees changed routes, too.
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
    """True if these rules were loaded last, by the record; the kernel is not asked."""
    return _recorded(target).startswith(f"{_wanted(target, wanted)} ")


def differences(target: Target, wanted: tuple[Rule, ...]) -> list[str]:
    """Return in words whether the rules are missing, or were altered."""
    if _recorded(target) == f"{_wanted(target, wanted)} {_shown(target)}":
        return []
    return [f"firewall of {target.namespace} is missing or was altered"]


def _recorded(target: Target) -> str:
    try:
        return names.router_file(target.name, "rules").read_text()
    except (OSError, UnicodeDecodeError):
        # Without a record the rules are loaded anew.
        return ""


def load(target: Target, wanted: tuple[Rule, ...]) -> None:
    """Load the rules in one transaction.  Raises FirewallError."""
    file = names.router_file(target.name, "rules")
    router_files.remove(file)
    if target.backend == nftables.name:
        nft.load(target.namespace, nftables.render(wanted, LAYOUT))
    else:
        made = iptables.tables(wanted, LEGACY)
        families = sorted({table.family for table in made})
        tables = [asdict(table) for table in made]
        iptables.call(target.namespace, "replace", families=families, tables=tables)
    file.write_text(f"{_wanted(target, wanted)} {_shown(target)}")
