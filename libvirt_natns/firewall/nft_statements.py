# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules in nft's syntax, without table and chain."""

from collections.abc import Iterable

from libvirt_natns.addresses import IPNetwork
from libvirt_natns.firewall import limits
from libvirt_natns.firewall.rule import Rule

IP = {4: "ip", 6: "ip6"}
"""nft's names of the families, in conditions and translations."""


REJECTIONS = {"tcp": "tcp reset", "udp": "icmpx port-unreachable"}

VERDICTS = {
    "accept": "accept",
    "drop": "drop",
    "masquerade": "masquerade",
    "clamp-mss": "tcp option maxseg size set rt mtu",
}


def statements(rule: Rule) -> Iterable[str]:
    """Return a rule in nft's syntax, without table and chain, as one statement or two."""
    if not rule.fresh or rule.family is None:
        return (statement(rule),)
    field = f"{IP[rule.family]} {'saddr' if rule.fresh == 'source' else 'daddr'}"
    return limits.fresh_statements(rule.family, _condition(rule), field, remembered=rule.remembered)


def statement(rule: Rule) -> str:
    """Return a rule that is one statement in nft's syntax, without table and chain."""
    comment = f' comment "{rule.comment}"' if rule.comment else ""
    pace = f" {limits.OVER}" if rule.paced else ""
    return f"{_condition(rule)}{pace} {_verdict(rule)}{comment}".lstrip()


def _condition(rule: Rule) -> str:
    parts = [f"meta nfproto ipv{rule.only}"] if rule.only else []
    parts += [*_interfaces(rule), *_addresses(rule), *_protocol(rule)]
    if rule.replies_of:
        family, to = IP[rule.replies_of.version], network_text(rule.replies_of)
        parts.append(f"ct direction reply ct original {family} daddr {to}")
    if rule.translated:
        parts.append("ct status dnat")
    if rule.states:
        parts.append(f"ct state {','.join(rule.states)}")
    if rule.flows:
        parts.append(limits.flow_statement(rule.flows))
    return " ".join(parts)


def _interfaces(rule: Rule) -> list[str]:
    # By name, not by index: rules are loaded before all interfaces are there.
    parts = []
    if rule.iif:
        parts.append(f'iifname {"!= " if rule.not_iif else ""}"{rule.iif}"')
    if rule.oif:
        parts.append(f'oifname {"!= " if rule.not_oif else ""}"{rule.oif}"')
    parts += [f'meta iifkind "{rule.iif_kind}"'] if rule.iif_kind else []
    parts += [f'meta oifkind "{rule.oif_kind}"'] if rule.oif_kind else []
    return parts


def _addresses(rule: Rule) -> list[str]:
    parts = []
    for field, networks, negated in (
        ("saddr", rule.sources, rule.not_sources),
        ("daddr", rule.destinations, rule.not_destinations),
    ):
        if networks and networks[0].prefixlen == 0:
            # A prefix of no bits: no part of the address is compared.
            parts.append(f"meta nfproto ipv{networks[0].version}")
        elif networks:
            protocol = IP[networks[0].version]
            members = set_text(map(network_text, networks))
            parts.append(f"{protocol} {field} {'!= ' if negated else ''}{members}")
    if rule.hop_limit is not None:
        parts.append(f"ip6 hoplimit {rule.hop_limit}")
    if rule.local:
        parts.append("fib daddr type local")
    return parts


def _protocol(rule: Rule) -> list[str]:
    if rule.span:
        return [f"{rule.protocol} dport {'-'.join(map(str, dict.fromkeys(rule.span)))}"]
    if rule.ports:
        return [f"{rule.protocol} dport {set_text(map(str, rule.ports))}"]
    if rule.icmp:
        return [f"{rule.protocol} type {set_text(rule.icmp)}"]
    if rule.syn or rule.not_syn:
        return [f"tcp flags & (syn|rst) {'==' if rule.syn else '!='} syn"]
    return [f"meta l4proto {rule.protocol}"] if rule.protocol else []


def _verdict(rule: Rule) -> str:
    if rule.action == "reject":
        return f"reject with {REJECTIONS.get(rule.protocol or '', 'icmpx admin-prohibited')}"
    if rule.action == "mark":
        return f"meta mark set {rule.mark:#010x}"
    if rule.helper:
        return f'ct helper set "{rule.helper}"'
    if rule.to:
        return f"{rule.action} {IP[rule.to.version]} to {_new_destination(rule)}"
    return VERDICTS[rule.action]


def _new_destination(rule: Rule) -> str:
    if rule.to_ports is None:
        return str(rule.to)
    if rule.to_ports[0] == rule.to_ports[1]:
        return f"{f'[{rule.to}]' if rule.family == 6 else rule.to}:{rule.to_ports[0]}"
    pairs = (f"{port} : {rule.to} . {to_port}" for port, to_port in rule.port_pairs)
    return f"{rule.protocol} dport map {{ {', '.join(pairs)} }}"


def network_text(network: IPNetwork) -> str:
    """Return a network in nft's words; a network of one address is the address."""
    return str(network if network.prefixlen < network.max_prefixlen else network.network_address)


def set_text(members: Iterable[str]) -> str:
    """Return members as a set of nft's, without doubles; a single member stands alone."""
    different = list(dict.fromkeys(members))
    return different[0] if len(different) == 1 else f"{{ {', '.join(different)} }}"
