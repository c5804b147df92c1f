# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of nft's JSON listing, as rules for ``verdicts``.

The module knows the words of ordinary filters: links, addresses, protocols, ports, and the state
of a connection.  All other conditions are unknown.  Source: libnftables-json(5).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from ipaddress import ip_address, ip_network
from typing import Any

from libvirt_natns.addresses import FAMILIES, Address, Family
from libvirt_natns.firewall.sample_packets import SamplePacket
from libvirt_natns.firewall.verdicts import Condition, FilterRule, RuleEnd

Json = Any
"""A part of nft's listing."""

SetElements = Callable[[str], Sequence[Json] | None]
"""Returns the elements of a named set of the rule's table; None where they cannot be had."""

HEADERS = {"ip": 4, "ip6": 6}
SEEN: Mapping[str, tuple[Family, ...]] = {"ip": (4,), "ip6": (6,), "inet": FAMILIES}
"""The families of packets that a table's chains see, by the family of the table."""

VERDICTS = ("accept", "drop", "reject", "queue", "return", "jump", "goto", "dnat", "redirect")
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
TRANSPORTS = (*PROTOCOLS, "udplite", "dccp", "icmp", "icmpv6", "igmp", "esp", "ah")
TARGETS = {"REJECT": "reject", "DROP": "drop", "ACCEPT": "accept", "NFQUEUE": "queue"}
TARGETS |= {"DNAT": "dnat", "REDIRECT": "redirect"}
"""Targets of iptables that decide about a packet, as nft's words."""


class _Unknown:
    """A value that the sample does not have."""


UNKNOWN = _Unknown()
ABSENT = _Unknown()
"""A value of a packet of another kind: a rule that asks for it does not fit."""

PacketValue = str | int | Address | frozenset[str] | tuple["PacketValue", ...] | _Unknown


@dataclass(frozen=True, slots=True)
class RuleReader:
    """Reads the rules of one table; ``elements`` returns those of the table's named sets."""

    elements: SetElements

    def rule(self, statements: Sequence[Json]) -> FilterRule:
        """Return a rule from the statements of nft's listing."""
        conditions: list[Condition] = []
        end, choose = RuleEnd(), None
        for statement in statements:
            word, content = next(iter(statement.items()))
            if word == "vmap":
                choose = partial(self._chosen, content)
            elif word in VERDICTS:
                end = RuleEnd(word, content["target"] if word in ("jump", "goto") else "")
                conditions += self._looked_up(content)
            elif word == "xt" and content and content.get("type") == "target":
                end = RuleEnd(TARGETS.get(content["name"], ""))
            elif (condition := self._condition(word, content)) is not None:
                conditions.append(condition)
        return FilterRule(tuple(conditions), end, choose)

    def _looked_up(self, content: Json) -> list[Condition]:
        """Return the condition of a translation to what a map holds: there is an element."""
        address = content.get("addr") if isinstance(content, dict) else None
        if not isinstance(address, dict) or "map" not in address:
            return []
        key, data = address["map"]["key"], address["map"]["data"]
        pairs = self.elements(data[1:]) if isinstance(data, str) else data.get("set")
        if pairs is None:
            return [_unknown]
        wanted = {"set": [wanted for wanted, _ in pairs]}
        return [partial(self._matches, {"op": "==", "left": key, "right": wanted})]

    def _condition(self, word: str, content: Json) -> Condition | None:
        if word == "match":
            return partial(self._matches, content)
        if word == "xt":
            # nft before 1.0.6 tells nothing of it.
            return None if content and content.get("name") == "comment" else _unknown
        if word in ("limit", "ct count", "quota"):
            # A single packet is within each limit.
            return _never if isinstance(content, dict) and content.get("inv") else None
        return None

    def _matches(self, match: Json, packet: SamplePacket) -> bool | None:
        value = value_of(packet, match["left"])
        if isinstance(value, _Unknown):
            return None if value is UNKNOWN else False
        if match["op"] not in ("==", "!=", "in"):
            return None
        fits = self._is_among(value, match["right"])
        return fits if fits is None or match["op"] != "!=" else not fits

    def _is_among(self, value: PacketValue, wanted: Json) -> bool | None:
        """True if a value is, or is one of, what the rule wants; None if that is not known."""
        if isinstance(wanted, str) and wanted.startswith("@"):
            held = self.elements(wanted[1:])
            return None if held is None else self._any(value, held)
        if isinstance(wanted, dict) and "set" in wanted:
            members = wanted["set"]
            return self._any(value, members if isinstance(members, list) else [members])
        if isinstance(wanted, list):
            return self._any(value, wanted)
        return equals(value, wanted)

    def _any(self, value: PacketValue, wanted: Sequence[Json]) -> bool | None:
        fits = [equals(value, each) for each in wanted]
        return True if True in fits else None if None in fits else False

    def _chosen(self, content: Json, packet: SamplePacket) -> RuleEnd | None:
        """Return the end of a verdict map; None where the map is not known."""
        value, data = value_of(packet, content["key"]), content["data"]
        if value is ABSENT:
            return RuleEnd()
        pairs = self.elements(data[1:]) if isinstance(data, str) else data["set"]
        if isinstance(value, _Unknown) or pairs is None:
            return None
        for wanted, verdict in pairs:
            fits = equals(value, wanted)
            if fits is None:
                return None
            if fits:
                word, inner = next(iter(verdict.items()))
                return RuleEnd(word, inner["target"] if inner else "")
        return RuleEnd()


def _unknown(_packet: SamplePacket) -> None:
    return None


def _never(_packet: SamplePacket) -> bool:
    return False


def value_of(packet: SamplePacket, expression: Json) -> PacketValue:
    """Return the packet's value for the left side of a match."""
    kind, content = next(iter(expression.items())) if isinstance(expression, dict) else ("", {})
    if kind == "meta":
        return _meta(packet, content["key"])
    if kind == "ct":
        return _connection(packet, content["key"])
    if kind == "payload" and "protocol" in content:
        return _header(packet, content["protocol"], content["field"])
    if kind == "fib" and content == {"result": "type", "flags": ["daddr"]}:
        return "local" if packet.local else "unicast"
    if kind == "concat":
        values = tuple(value_of(packet, part) for part in content)
        return next((value for value in values if isinstance(value, _Unknown)), values)
    return UNKNOWN


def _meta(packet: SamplePacket, key: str) -> PacketValue:
    links = {"iifname": packet.iif, "iif": packet.iif, "oifname": packet.oif, "oif": packet.oif}
    if key in links:
        return links[key] or UNKNOWN
    nfproto, ethertype = ("ipv4", "ip") if packet.family == 4 else ("ipv6", "ip6")
    others = {"nfproto": nfproto, "l4proto": packet.protocol, "protocol": ethertype}
    return others.get(key, UNKNOWN)


def _connection(packet: SamplePacket, key: str) -> PacketValue:
    if key == "state":
        return frozenset({packet.state})
    if key == "status":
        translated = {"dnat"} if packet.translated else set()
        seen = {"assured", "seen-reply"} if packet.is_reply else set()
        return frozenset({"confirmed", *translated, *seen} if packet.is_reply else translated)
    if key == "direction":
        return "reply" if packet.is_reply else "original"
    return UNKNOWN


def _header(packet: SamplePacket, protocol: str, field: str) -> PacketValue:
    if protocol in HEADERS:
        if HEADERS[protocol] != packet.family:
            return ABSENT
        addresses = {"saddr": packet.source, "daddr": packet.destination}
        if field in addresses:
            return addresses[field] or UNKNOWN
        return packet.protocol if field in ("protocol", "nexthdr") else UNKNOWN
    if protocol not in ("th", packet.protocol):
        return ABSENT if protocol in TRANSPORTS else UNKNOWN
    return {"sport": packet.sport, "dport": packet.dport}.get(field, UNKNOWN)


def equals(value: PacketValue, wanted: Json) -> bool | None:
    """True if a value is what a rule or an element of a set says; None if that is not known."""
    if isinstance(value, tuple):
        return _all_equal(value, wanted)
    if isinstance(wanted, dict):
        return _lies_in(value, wanted)
    if isinstance(value, frozenset):
        return str(wanted) in value
    if isinstance(value, str):
        if not isinstance(wanted, str):
            return bool(wanted == PROTOCOLS.get(value))
        return fnmatchcase(value, wanted.replace("[", "[[]")) if "*" in wanted else value == wanted
    if isinstance(value, int):
        return bool(value == wanted) if isinstance(wanted, int) else None
    try:
        return value == ip_address(wanted)
    except ValueError:
        return None


def _all_equal(values: tuple[PacketValue, ...], wanted: Json) -> bool | None:
    if isinstance(wanted, dict) and "elem" in wanted:
        wanted = wanted["elem"]["val"]
    parts = wanted.get("concat", []) if isinstance(wanted, dict) else []
    if len(parts) != len(values):
        return None
    fits = [equals(value, part) for value, part in zip(values, parts, strict=True)]
    return False if False in fits else None if None in fits else True


def _lies_in(value: PacketValue, wanted: Json) -> bool | None:
    try:
        if "elem" in wanted:
            # An element with a timeout or a counter.
            return equals(value, wanted["elem"]["val"])
        if "prefix" in wanted:
            prefix = ip_network(f"{wanted['prefix']['addr']}/{wanted['prefix']['len']}", False)
            return None if isinstance(value, str | int | frozenset) else bool(value in prefix)
        first, last = wanted["range"]
        if isinstance(value, int):
            return bool(first <= value <= last)
        return int(ip_address(first)) <= int(value) <= int(ip_address(last))  # type: ignore[arg-type]
    except (KeyError, ValueError, TypeError):
        return None
