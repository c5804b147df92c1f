# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sample packets of guests, followed through chains of others."""

from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from libvirt_natns.firewall import iptables_save, sample_packets, verdicts
from libvirt_natns.firewall.host_policy import HostForward
from libvirt_natns.firewall.nft_conditions import RuleReader
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.firewall.sample_packets import SamplePacket

OUT = SamplePacket(4, "natns-host", "wlan0", ip_address("198.19.252.9"), ip_address("198.41.0.4"))
REPLY = SamplePacket(
    4, "wlan0", "natns-host", OUT.destination, OUT.source, sport=443, dport=40000,
    state="established",
)  # fmt: skip
PUBLISHED = replace(OUT, iif="wlan0", oif="natns-host", destination=OUT.source, translated=True)

Json = dict[str, Any]


def match(kind: str, key: str, wanted: object, op: str = "==") -> Json:
    left = {"protocol": kind, "field": key} if kind in ("ip", "ip6", "tcp", "th") else {"key": key}
    where = "payload" if "field" in left else kind
    return {"match": {"op": op, "left": {where: left}, "right": wanted}}


def states(*wanted: str) -> Json:
    return match("ct", "state", list(wanted), "in")


LOCAL = {"fib": {"result": "type", "flags": ["daddr"]}}
IN, BY_TUNNEL = match("meta", "iifname", "natns-host"), match("meta", "oifname", "wg0")
LAN = match("ip", "daddr", {"prefix": {"addr": "192.168.0.0", "len": 16}})
MARK = match("meta", "mark", 1)
ACCEPT: Json = {"accept": None}
DROP: Json = {"drop": None}
REJECT: Json = {"reject": {"type": "icmpx"}}
COUNT: Json = {"counter": {"packets": 0, "bytes": 0}}


def end_of(*rules: list[Json], policy: str = "accept", packet: SamplePacket = OUT) -> str:
    """Return how a chain with these rules ends for a packet, "?" behind it where unsure."""
    held: dict[str, list[Any]] = {
        "s": ["198.19.252.0", "198.19.252.9"],
        "m": [["wlan0", DROP]],
        "c": [JOINED],
    }
    reader = RuleReader(lambda name: held.get(name))
    called = [[states("established"), ACCEPT], [LAN, DROP], [match("ct", "state", "new"), REJECT]]
    chains = {
        "forward": [reader.rule(rule) for rule in rules],
        "called": [reader.rule(rule) for rule in called],
    }
    stop = verdicts.stop_of(chains, "forward", policy, packet)
    if stop is None:
        return ""
    return (stop.how if stop.chain == "forward" else f"{stop.how} in {stop.chain}") + (
        "" if stop.sure else "?"
    )


SOURCE_AND_PORT = {
    "concat": [
        {"payload": {"protocol": "ip", "field": "saddr"}},
        {"payload": {"protocol": "tcp", "field": "dport"}},
    ]
}
JOINED = {"concat": ["198.19.252.9", 443]}
CALL = {"jump": {"target": "called"}}
GO = {"goto": {"target": "called"}}


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        ([], "accept", ""),
        ([], "drop", "policy drop"),
        ([[BY_TUNNEL, ACCEPT], [COUNT, REJECT]], "drop", "reject"),
        ([[match("meta", "oifname", "wg0", "!="), DROP]], "accept", "drop"),
        ([[LAN, REJECT], [IN, ACCEPT]], "drop", ""),
        ([[match("meta", "iifname", "natns*"), ACCEPT]], "drop", ""),
        ([[match("meta", "iifname", {"set": ["a", "natns-host"]}), ACCEPT]], "drop", ""),
        ([[match("ip", "saddr", "@s"), ACCEPT]], "drop", ""),
        ([[match("ip", "saddr", "@unheard-of"), DROP]], "accept", ""),
        ([[match("ip", "saddr", "@unheard-of"), ACCEPT]], "drop", "policy drop?"),
        ([[match("ip", "saddr", {"range": ["198.19.0.0", "198.19.255.9"]}), DROP]], "", "drop"),
        ([[match("ip6", "saddr", "fe80::1", "!="), DROP]], "accept", ""),
        ([[match("meta", "nfproto", "ipv6"), DROP], [match("meta", "nfproto", "ipv4"), REJECT]],
         "accept", "reject"),
        ([[match("tcp", "dport", {"set": [80, {"range": [440, 450]}]}), ACCEPT]], "drop", ""),
        ([[match("th", "dport", 53), ACCEPT]], "drop", "policy drop"),
        ([[match("meta", "l4proto", 6), DROP]], "accept", "drop"),
        ([[MARK, DROP]], "accept", ""),
        ([[MARK, ACCEPT], [REJECT]], "accept", "reject?"),
        ([[{"limit": {"rate": 9, "inv": True}}, DROP]], "accept", ""),
        ([[{"limit": {"rate": 9}}, ACCEPT]], "drop", ""),
        ([[states("new"), {"queue": None}]], "drop", ""),
        ([[states("invalid"), DROP], [CALL]], "accept", "reject in called"),
        ([[states("established"), CALL]], "accept", ""),
        ([[IN, {"return": None}], [REJECT]], "accept", ""),
        ([[IN, {"return": None}]], "drop", "policy drop"),
        ([[GO], [ACCEPT]], "drop", "reject in called"),
        ([[{"vmap": {"key": {"meta": {"key": "oifname"}}, "data": "@m"}}]], "accept", "drop"),
        ([[{"vmap": {"key": {"meta": {"key": "oifname"}}, "data": "@x"}}]], "drop", "policy drop?"),
        ([[{"vmap": {"key": {"ct": {"key": "state"}}, "data": {"set": [["new", CALL]]}}}]],
         "accept", "reject in called"),
        ([[{"xt": {"type": "match", "name": "comment"}}, {"xt": {"type": "target", "name":
         "REJECT"}}]], "accept", "reject"),
        ([[{"xt": {"type": "match", "name": "recent"}}, DROP]], "accept", ""),
        # As nft told it before it knew more.
        ([[{"xt": None}, DROP], [{"xt": None}, ACCEPT]], "drop", "policy drop?"),
        ([[{"match": {"op": "==", "left": SOURCE_AND_PORT, "right": "@c"}}, DROP]], "", "drop"),
        ([[{"match": {"op": "!=", "left": SOURCE_AND_PORT, "right": "@c"}}, DROP]], "", ""),
        ([[{"match": {"op": "==", "left": LOCAL, "right": "local"}}, DROP]], "", ""),
        ([[{"match": {"op": "!=", "left": LOCAL, "right": "local"}}, DROP]], "", "drop"),
        ([[{"log": None}], [{"xt": {"type": "target", "name": "LOG"}}]], "accept", ""),
    ],
)  # fmt: skip
def test_a_packet_of_a_guest(rules: list[list[Json]], policy: str, expected: str) -> None:
    assert end_of(*rules, policy=policy) == expected


def test_replies_and_published_ports() -> None:
    established = [states("established", "related"), ACCEPT]
    assert end_of(established, policy="drop", packet=REPLY) == ""
    assert end_of(established, policy="drop", packet=PUBLISHED) == "policy drop"
    assert end_of([match("ct", "status", "dnat", "in"), ACCEPT], policy="drop") == "policy drop"
    published = [match("ct", "status", "dnat", "in"), ACCEPT]
    assert end_of(published, policy="drop", packet=PUBLISHED) == ""


SAVED = """# Generated
*filter
:INPUT ACCEPT [0:0]
:FORWARD {policy} [0:0]
:block - [0:0]
{rules}
-A block -m comment --comment "all the rest" -j REJECT --reject-with icmp-port-unreachable
COMMIT
"""


@pytest.mark.parametrize(
    ("rules", "policy", "expected"),
    [
        ("", "DROP", "policy drop"),
        ("-A FORWARD -d 192.168.0.0/16 -i natns-host -j REJECT\n", "ACCEPT", ""),
        ("-A FORWARD ! -d 192.168.0.0/16 -i natns-host -j REJECT\n", "ACCEPT", "reject"),
        ("-A FORWARD ! -o wg+ -p tcp -j DROP\n", "ACCEPT", "drop"),
        ("-A FORWARD -m conntrack --ctstate RELATED,NEW -j ACCEPT\n", "DROP", ""),
        ("-A FORWARD -p tcp -m multiport --dports 80,440:450 -j ACCEPT\n", "DROP", ""),
        ("-A FORWARD -p tcp -m tcp --dport 80 -j ACCEPT\n", "DROP", "policy drop"),
        ("-A FORWARD -m set --match-set banned src -j DROP\n", "ACCEPT", ""),
        ("-A FORWARD -m set --match-set good src -j ACCEPT\n-A FORWARD -g block\n", "DROP",
         "reject in block?"),
        ("-A FORWARD -m limit --limit 3/min -j LOG --log-prefix '-A'\n-A FORWARD -j block\n",
         "ACCEPT", "reject in block"),
        ("-A FORWARD -d 198.0.0.4/255.0.0.255 -j DROP\n", "ACCEPT", ""),
        ("-A FORWARD -s 198.19.252.9/32 -j RETURN\n-A FORWARD -j block\n", "ACCEPT", ""),
    ],
)  # fmt: skip
def test_rules_of_iptables(rules: str, policy: str, expected: str) -> None:
    saved = iptables_save.parse(SAVED.format(policy=policy, rules=rules))
    stop = verdicts.stop_of(saved.chains, "FORWARD", saved.policies["FORWARD"], OUT)
    told = stop and (stop.how if stop.chain == "FORWARD" else f"{stop.how} in {stop.chain}")
    assert (told or "") + ("?" if stop and not stop.sure else "") == expected


def test_samples_of_what_must_pass() -> None:
    subnet = (ip_network("198.19.252.0/22"),)
    ways: sample_packets.WaysOut = {4: "wlan0", 6: None}
    out = Rule(chain="foreign", iif="natns-host", sources=subnet, action="accept")
    back = Rule(chain="foreign", oif="natns-host", destinations=subnet, action="accept")
    assert next(sample_packets.of_accept(out, ways)) == OUT
    assert list(sample_packets.of_accept(back, ways)) == [REPLY]
    assert list(sample_packets.of_accept(out, {4: None, 6: "wlan0"})) == []
    target = ip_address("198.19.252.9")
    forward = HostForward("tcp", None, 443, 443, target, "natns-host")
    (seen,) = sample_packets.of_forward(forward, ways)
    assert seen == replace(PUBLISHED, source=OUT.destination)
    # NAT has yet to give it this address.
    assert seen.at("prerouting").destination is None
    assert OUT.at("postrouting").source is None
