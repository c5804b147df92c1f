# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules as entries of iptables' chains.

Legacy iptables has no chain after source NAT, so the guard asks for the translation that conntrack
has recorded.  A packet may leave if its connection's recorded translation gives the packet an
allowed source.  The first packet of a connection may leave, too: NAT comes next and is about to
decide.

Limits: ARP is not limited: iptables does not see ARP.
"""

from collections.abc import Iterator
from itertools import product

from libvirt_natns.addresses import Family
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall.iptables_limits import counted, fresh, over
from libvirt_natns.firewall.iptables_syntax import ChainEntry, Match
from libvirt_natns.firewall.rule import IcmpType, Rule

TARGETS: dict[str, Match] = {
    "accept": ("ACCEPT", {}),
    "drop": ("DROP", {}),
    "masquerade": ("MASQUERADE", {}),
    "clamp-mss": ("TCPMSS", {"clamp-mss-to-pmtu": ""}),
}

REJECTIONS: dict[Family, dict[str, str]] = {
    4: {"tcp": "tcp-reset", "udp": "icmp-port-unreachable", "": "icmp-admin-prohibited"},
    6: {"tcp": "tcp-reset", "udp": "icmp6-port-unreachable", "": "icmp6-adm-prohibited"},
}

ICMPV6: dict[IcmpType, int] = {
    "echo-request": 128,
    "mld-listener-query": 130,
    "mld-listener-report": 131,
    "mld-listener-done": 132,
    "nd-router-solicit": 133,
    "nd-router-advert": 134,
    "nd-neighbor-solicit": 135,
    "nd-neighbor-advert": 136,
    "nd-redirect": 137,
    "mld2-listener-report": 143,
}
"""Numbers, as ip6tables has no names for some types."""


def entries(rule: Rule, family: Family = 4) -> Iterator[ChainEntry]:
    """Yield the entries of a rule: for each source, destination and type of ICMP."""
    if rule.iif_kind or rule.oif_kind:
        raise FirewallError("iptables cannot match the kind of a link")
    if rule.chain == "guard" and rule.not_sources:
        yield from _guard(rule)
        return
    if rule.flows:
        yield from counted(rule, family)
        return
    if rule.fresh == "source" and not rule.icmp:
        return
    for source, destination, icmp in product(
        _addresses(rule, "sources"), _addresses(rule, "destinations"), rule.icmp or (None,)
    ):
        entry = ChainEntry(
            source=source,
            destination=destination,
            iif=("!" if rule.not_iif else "") + rule.iif,
            oif=("!" if rule.not_oif else "") + rule.oif,
            protocol=rule.protocol or "",
            matches=tuple(_matches(rule, icmp)),
            target=_target(rule, family),
        )
        yield from fresh(rule, entry, family) if rule.fresh else (entry,)


def _addresses(rule: Rule, field: str) -> list[str]:
    networks = getattr(rule, field)
    if not getattr(rule, f"not_{field}"):
        return [str(network) for network in networks] or [""]
    if len(networks) > 1:
        raise FirewallError("iptables cannot negate a match of several networks")
    return [f"!{network}" for network in networks]


def _matches(rule: Rule, icmp: IcmpType | None) -> Iterator[Match]:
    if rule.syn or rule.not_syn:
        yield "tcp", {"tcp-flags": [*([] if rule.syn else ["!"]), "SYN,RST", "SYN"]}
    if icmp and rule.protocol == "icmpv6":
        yield "icmp6", {"icmpv6-type": str(ICMPV6[icmp])}
    elif icmp:
        yield "icmp", {"icmp-type": icmp}
    if rule.paced:
        yield over(f"natns-{icmp}"[:15])
    if rule.hop_limit is not None:
        yield "hl", {"hl-eq": str(rule.hop_limit)}
    if rule.local:
        yield "addrtype", {"dst-type": "LOCAL"}
    yield from _ports(rule)
    yield from _states(rule)
    if rule.comment:
        yield "comment", {"comment": rule.comment}


def _states(rule: Rule) -> Iterator[Match]:
    if rule.replies_of:
        yield "conntrack", {"ctdir": "REPLY", "ctorigdst": str(rule.replies_of)}
    if rule.translated:
        # DNAT is a state of iptables, and states given together are alternatives.
        yield "conntrack", {"ctstate": "DNAT"}
    if rule.states:
        yield "conntrack", {"ctstate": ",".join(rule.states).upper()}


def _ports(rule: Rule) -> Iterator[Match]:
    ports = ":".join(map(str, dict.fromkeys(rule.span))) if rule.span else ""
    ports = ports or ",".join(map(str, rule.ports))
    if "," in ports or (ports and rule.protocol == "sctp"):
        # Kernels without a module for SCTP alone have this one.
        yield "multiport", {"dports": ports}
    elif ports:
        yield str(rule.protocol), {"dport": ports}


def _target(rule: Rule, family: Family) -> Match:
    if rule.action == "reject":
        reasons = REJECTIONS[family]
        return "REJECT", {"reject-with": reasons.get(rule.protocol or "", reasons[""])}
    if rule.action == "dnat":
        ports = _to_ports(rule)
        to = f"[{rule.to}]" if ports and family == 6 else rule.to
        return "DNAT", {"to-destination": f"{to}{ports}"}
    if rule.action == "snat":
        return "SNAT", {"to-source": str(rule.to)}
    if rule.action == "zone":
        return "CT", {"zone": str(rule.zone)}
    if rule.action == "helper":
        return "CT", {"helper": rule.helper}
    if rule.action == "mark":
        return "MARK", {"set-xmark": f"{rule.mark:#x}/0xffffffff"}
    if rule.action == "keep":
        # A prefix of no bits: the whole address stays.
        return "NETMAP", {"to": "0.0.0.0/0" if family == 4 else "::/0"}
    return TARGETS[rule.action]


def _to_ports(rule: Rule) -> str:
    if rule.span is None or rule.to_ports is None:
        return ""
    first, last = rule.to_ports
    # The number behind the slash is the port that becomes the first one.
    return f":{first}" if first == last else f":{first}-{last}/{rule.span[0]}"


def _guard(rule: Rule) -> Iterator[ChainEntry]:
    def entry(target: str, **values: str | list[str]) -> ChainEntry:
        matches = (("conntrack", dict(values)),) if values else ()
        return ChainEntry(oif=rule.oif, matches=matches, target=(target, {}))

    # NAT leaves both states alone.  The entry is the first: a packet without a connection
    # matches no condition on a connection, negated or not.
    yield entry("DROP", ctstate="INVALID,UNTRACKED")
    # The first packet; NAT decides after us.  A connection that met no NAT rule, as it
    # began earlier, is confirmed and caught below.
    yield entry("ACCEPT", ctstatus="!CONFIRMED")
    for network in rule.sources:
        alone = network.prefixlen == network.max_prefixlen
        address = str(network.network_address if alone else network)
        yield entry("ACCEPT", ctrepldst=address, ctdir="ORIGINAL")
        yield entry("ACCEPT", ctorigdst=address, ctdir="REPLY")
    yield entry("DROP")
