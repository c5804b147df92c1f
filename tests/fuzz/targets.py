# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kinds of input, each with how to make a case and what must hold for every case.

A check takes the octets of a case, and fails by an exception other than a refusal.
A refusal is a NatnsError whose message is one printable line.
"""

import re
import socket
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path
from random import Random

import shapes
from mutations import LINES, XML, Mutation, mutated

from libvirt_natns.cli import forward_edit, forward_spec, look_link, look_rules
from libvirt_natns.daemons import dhcp_lease, dnsmasq_config, resolv_conf
from libvirt_natns.daemons.dnsmasq_files import Files
from libvirt_natns.daemons.resolv_conf import Resolvers
from libvirt_natns.documents import config, domain_edit, libvirt_xml, xml_sniff
from libvirt_natns.engine.plan.network_plan import make
from libvirt_natns.engine.plan.surroundings import Surroundings
from libvirt_natns.errors import LONGEST, NatnsError, describe
from libvirt_natns.firewall import iptables, nftables
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.model.network import Domain, LibvirtNetwork, Network, Nic
from libvirt_natns.model.segment import BridgeSegment, Segment
from libvirt_natns.model.transit_segment import HostSegment
from libvirt_natns.model.upstream import (
    HOST_UPSTREAM,
    BridgeUpstream,
    HostUpstream,
    Outside,
    RouterUpstream,
)
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.operation import describe_plan
from libvirt_natns.service import client, server
from libvirt_natns.upstream import selection

CHECKOUT = Path(__file__).resolve().parents[2]
EXAMPLES = CHECKOUT / "xml"
GOLDEN = CHECKOUT / "tests" / "unit" / "dnsmasq"

UUID = b"<uuid>c0ffee00-0000-4000-8000-000000000001</uuid>"
MAC = "52:54:00:00:00:09"
LONGEST_MESSAGE = 2 * LONGEST + len(": ")
"""Characters: a fact and a remedy."""

DIRECTIVES = {
    "strict-order", "server", "port", "local", "domain", "expand-hosts", "domain-needed",
    "except-interface", "bind-dynamic", "interface", "txt-record", "srv-host", "dhcp-range",
    "dhcp-no-override", "dhcp-authoritative", "dhcp-lease-max", "dhcp-hostsfile",
    "addn-hosts", "dhcp-option", "enable-ra", "ra-param", "resolv-file", "no-resolv",
    "pid-file"
}  # fmt: skip
"""All that we ever say to dnsmasq by ourselves."""


@dataclass(frozen=True)
class Target:
    """One kind of input."""

    name: str
    seeds: Callable[[], Sequence[bytes]]
    mutations: Sequence[Mutation]
    check: Callable[[bytes], None]

    def make(self, random: Random) -> bytes:
        """A case."""
        return mutated(random, _once(self.seeds), self.mutations)


@lru_cache
def _once(seeds: Callable[[], Sequence[bytes]]) -> Sequence[bytes]:
    return seeds()


def refusal(error: NatnsError) -> None:
    """Check that a message is one printable line of bounded length."""
    line = str(error)
    assert line.isprintable(), f"a message does not print: {line!r}"
    assert 0 < len(line) <= LONGEST_MESSAGE, f"a message of {len(line)} characters"
    assert not any(unicodedata.bidirectional(each) in BIDI for each in line), ascii(line)


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


# -- networks ------------------------------------------------------------------


def _networks() -> Sequence[bytes]:
    found = [file.read_bytes() for file in sorted(EXAMPLES.glob("*.xml"))]
    found = [text for text in found if b"<network" in text]
    found += [
        file.read_bytes().split(b"--- network\n")[1].split(b"--- ")[0]
        for file in sorted(GOLDEN.glob("*.txt"))
    ]
    named = []
    for text in found:
        text = text if b"<uuid>" in text else text.replace(b"</name>", b"</name>" + UUID, 1)
        bridge = b"<bridge name='virbr10'/>"
        text = text if b"<bridge" in text else text.replace(b"</network>", bridge + b"</network>")
        named.append(text)
    return [*named, *shapes.networks()]


def check_network(data: bytes) -> None:
    """A network's document: both readers agree, and no line gets into what is made of it."""
    seen = xml_sniff.at_network(data)
    try:
        network = libvirt_xml.parse_any_network(data)
    except NatnsError as error:
        refusal(error)
        return
    agree(seen, network)
    if network.subnets and isinstance(network, Network):
        check_dnsmasq(network)
        check_plan(network)


OUTSIDE = Outside(IPv4Address("192.168.0.150"), IPv6Address("2001:db8:77::150"))


def agree(seen: xml_sniff.Glance, parsed: LibvirtNetwork | Domain) -> None:
    """The first look and the parser take a document for the same thing."""
    assert (seen.uuid, seen.name) == (parsed.uuid, parsed.name), "uuid and name"
    assert seen.annotated == (parsed.nat is not None), "annotated"
    if isinstance(parsed, LibvirtNetwork):
        disabled = parsed.nat is not None and not parsed.nat.enabled
        assert seen.disabled == disabled, "disabled"
        assert seen.forwards or parsed.forward_mode is None, "forwards"


def check_rules(network: Network, rules: Sequence[Rule]) -> None:
    """The rules' text differs from a plain network's in nothing but the name."""
    plain = replace_in_rules(rules, network.bridge, "virbr10")
    name = re.escape(network.bridge)
    nft = nftables.render(rules)
    assert re.sub(f'"{name}"', '"virbr10"', nft) == nftables.render(plain), nft
    entries = iptables.render(rules)
    assert re.sub(rf"(?<=-[io] ){name}(?= )", "virbr10", entries) == iptables.render(plain), entries


def replace_in_rules(rules: Iterable[Rule], old: str, new: str) -> list[Rule]:
    """The rules for an interface of another name."""
    return [
        replace(
            rule,
            iif=new if rule.iif == old else rule.iif,
            oif=new if rule.oif == old else rule.oif,
        )
        for rule in rules
    ]


def check_dnsmasq(network: Network) -> None:
    """Each line for dnsmasq is ours, libvirt's, or a line of the user's own options."""
    servers = Resolvers((IPv4Address("192.168.0.1"),))
    files = dnsmasq_config.make(network, None, servers, 1400, [(MAC, IPv4Address("10.0.0.77"))])
    users = [line for each in network.dnsmasq_options for line in each.split("\n")]
    for line in files.configuration.split("\n"):
        if not line or line in users:
            continue
        key = line.partition("=")[0]
        assert key in DIRECTIVES, f"a line of nobody's: {line!r}"
        assert "\r" not in line and "\0" not in line, line
    for line in (*files.hosts.split("\n"), *files.records.split("\n")):
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f]", line), line
    theirs = libvirts_text(network)
    derived = dnsmasq_config.make(network, Files(theirs), servers, 1400)
    known = {*theirs.split("\n"), *users, ""}
    for line in derived.configuration.split("\n"):
        assert line in known or line.partition("=")[0] in DIRECTIVES, f"nobody's: {line!r}"


def libvirts_text(network: Network) -> str:
    """What libvirt writes for its own dnsmasq, with the values as they stand in the XML."""
    return "\n".join(
        [
            "##WARNING",
            "strict-order",
            f"domain={network.name}",
            "pid-file=/run/libvirt/network/x.pid",
            "except-interface=lo",
            "bind-dynamic",
            f"interface={network.bridge}",
            "dhcp-option=3",
            "no-resolv",
            "addn-hosts=/var/lib/libvirt/dnsmasq/x.addnhosts",
            *network.dnsmasq_options,
            "",
        ]
    )


ON_HOST = HostSegment.of(HOST_UPSTREAM, "natns-host", IPv4Network("198.19.252.0/22"), None, None)


def check_plan(network: Network) -> None:
    """A plan is made, or refused in one line, and described in lines that print."""
    settings = _settings()
    try:
        if not selection.verdict(network, settings).handled:
            return
        configured = selection.upstream_of(network, settings)
        upstream: Segment = ON_HOST
        if isinstance(configured, BridgeUpstream):
            upstream = BridgeSegment.of(configured)
        selection.check_addresses(network, upstream)
        selection.check_resolvers(network, upstream, upstream.dns)
        around = Surroundings(1500, 1500, "nftables", None)
        made = make(network, upstream, OUTSIDE, around)
    except NatnsError as error:
        refusal(error)
        return
    for line in describe_plan(made).split("\n"):
        assert "\r" not in line, line
    for operation in made:
        if isinstance(operation, Firewall):
            check_rules(network, operation.rules)


@lru_cache
def _settings() -> config.Config:
    return config.load(EXAMPLES / "config.toml")


# -- hook input ----------------------------------------------------------------


def _hook_data() -> Sequence[bytes]:
    port = (
        b"<networkport><uuid>c0ffee00-0000-4000-8000-00000000000a</uuid><owner><name>web</name>"
        b"<uuid>c0ffee00-0000-4000-8000-00000000000b</uuid></owner>"
        b"<mac address='52:54:00:00:00:05'/><plug type='network' bridge='virbr10'/></networkport>"
    )
    found = []
    for text in _networks():
        inside = text[text.index(b"<network") :]
        found += [
            b"<hookData>" + inside + b"</hookData>",
            b"<hookData>\n" + inside + port + b"</hookData>",
        ]
    return found


def check_hook_data(data: bytes) -> None:
    """A network hook's input: a first look never fails, nor does what follows it."""
    seen = xml_sniff.at_network(data)
    assert not seen.owner or re.fullmatch("[0-9a-f-]{1,64}", seen.owner), seen.owner
    assert not seen.uuid or re.fullmatch("[0-9a-f-]{1,64}", seen.uuid), seen.uuid
    xml_sniff.at_domain(data)
    try:
        parsed = libvirt_xml.parse_hook_data(data)
    except NatnsError as error:
        refusal(error)
        line, more = describe(error)
        assert line.isprintable() and not more
        return
    agree(seen, parsed.network)
    if parsed.port is not None and parsed.port.owner_uuid:
        assert seen.owner == parsed.port.owner_uuid, "owner"


# -- domains -------------------------------------------------------------------


def _domains() -> Sequence[bytes]:
    found = [file.read_bytes() for file in sorted(EXAMPLES.glob("domain*.xml"))]
    found = [text.replace(b"</name>", b"</name>" + UUID, 1) for text in found]
    return [*found, *shapes.domains()]


def check_domain(data: bytes) -> None:
    """A guest's document; what is edited is parsed again as what it was edited to."""
    seen = xml_sniff.at_domain(data)
    try:
        bare = libvirt_xml.parse_domain_nics(data)
    except NatnsError as error:
        refusal(error)
        return
    assert (seen.uuid, seen.name) == (bare.uuid, bare.name), "uuid and name"
    nic = Nic(MAC, "another")
    more = libvirt_xml.parse_domain_nics(domain_edit.with_nic(data, nic))
    assert Counter(more.nics) == Counter([*bare.nics, nic]), "one more NIC"
    less = libvirt_xml.parse_domain_nics(
        domain_edit.without_nic(domain_edit.with_nic(data, nic), nic)
    )
    assert nic not in less.nics, "one NIC less"
    try:
        parsed = libvirt_xml.parse_domain(data)
    except NatnsError as error:
        refusal(error)
        return
    agree(seen, parsed)
    check_edited(data, parsed)


def check_edited(data: bytes, parsed: Domain) -> None:
    """A forward that is added is in the metadata then, and nothing else has changed."""
    spec = forward_spec.parse_new("61234-61235:22/sctp")
    options = forward_edit.Options()
    try:
        edited = domain_edit.edit_nat(data, lambda nat: forward_edit.add(nat, spec, options))
        again = libvirt_xml.parse_domain(edited.document)
    except NatnsError as error:
        refusal(error)
        return
    assert again.nat is not None and edited.element is not None
    before = parsed.nat.forwards if parsed.nat else ()
    assert again.nat.forwards[: len(before)] == before, "earlier forwards"
    assert len(again.nat.forwards) == len(before) + 1, "one more forward"
    assert again.nics == parsed.nics, "NICs"
    assert domain_edit.nat_text(edited.document) == edited.element, "the element"


# -- configuration ---------------------------------------------------------------


def _configurations() -> Sequence[bytes]:
    return [
        (EXAMPLES / "config.toml").read_bytes(),
        b"",
        b'[upstreams.wan]\nkind = "router"\nnic = "ens3"\nhost_ports = ["tcp/22", "udp/1-9"]\n',
        b'[upstreams.b]\nkind = "bridge"\nbridge = "br0"\npool = "dhcp"\ndhcp_timeout = 3\n'
        b'dhcp = "background"\nattach = "macvlan"\n',
        b'[upstreams.host]\nkind = "host"\nsubnet = "198.19.252.0/22"\n',
    ]


def check_configuration(data: bytes) -> None:
    """A configuration file."""
    text = data.decode(errors="replace")
    try:
        settings = config.parse(text, "config.toml")
    except NatnsError as error:
        refusal(error)
        return
    assert settings.upstream in settings.upstreams
    for upstream in settings.upstreams.values():
        if not isinstance(upstream, HostUpstream):
            link = upstream.nic if isinstance(upstream, RouterUpstream) else upstream.bridge
            Rule(chain="forward", iif=link, action="drop")


# -- service protocol --------------------------------------------------------------


def _requests() -> Sequence[bytes]:
    xml = b"<hookData><network><name>a</name></network></hookData>"
    found = [
        b"%s %s %s %d\n%s" % (kind, operation, b"begin", len(xml), xml)
        for kind in (b"network", b"guest", b"question", b"lease")
        for operation in (b"start", b"started", b"stopped", b"metrics")
    ]
    found += [b'{"argv": ["status", "--json"]}', b'{"argv": ["plan", "a"], "document": "<n/>"}']
    return [*found, b"done\n", b"refused\nwhy", client.GREETING, b"network start begin 0\n"]


def check_protocol(data: bytes) -> None:
    """What clients send to the service and the look server, and what a service sends."""
    near, far = socket.socketpair()
    with near, far:
        near.setblocking(False)
        # As much as the socket takes without anybody who reads.
        sent = near.send(data[:65536]) if data else 0
        near.shutdown(socket.SHUT_WR)
        far.settimeout(1.0)
        request = server._request(far)
    if request is not None:
        assert len(request.data) <= sent
        assert isinstance(request.name, str)
    answer = client._answer(data)
    assert answer is None or isinstance(answer.text, str)
    asked = look_link.parsed_request(data)
    if asked is not None:
        assert isinstance(asked.document, bytes)
        command = look_rules.command_of(asked.words)
        assert command is None or command in look_rules.LOOKS


# -- leases ----------------------------------------------------------------------


def _leases() -> Sequence[bytes]:
    return [
        b"ip=192.168.77.9\nmask=24\nrouter=192.168.77.1\ndns=192.168.77.1 9.9.9.9\nmtu=1400\n"
        b"routes=0.0.0.0/0 192.168.77.1 10.0.0.0/24 192.168.77.1\nserver=192.168.77.1\n",
        b"ip=10.1.2.3\nmask=255.255.0.0\nrouter=\ndns=\nmtu=\nroutes=\nserver=10.1.0.1\n",
        b"ip=169.254.1.1\nmask=0\nrouter=1.1.1.1 2.2.2.2\nroutes=" + b"10.0.0.0/8 1.2.3.4 " * 100,
    ]


def check_lease(data: bytes) -> None:
    """What a DHCP server says, as the client's script writes it down."""
    text = data.decode(errors="replace")
    lease = dhcp_lease.parse(text)
    if lease is None:
        return
    assert lease.mtu is None or 576 <= lease.mtu <= 65535
    for route in lease.routes:
        assert isinstance(route.destination, IPv4Network)
    for address in lease.dns:
        assert not address.is_loopback


# -- resolvers and other small texts ---------------------------------------------


def _small() -> Sequence[bytes]:
    return [
        b"nameserver 192.168.0.1\nsearch x\n",
        b"nameserver 127.0.0.53\noptions edns0\nnameserver fe80::1%eth0\n",
        b"8080:80/tcp",
        b"[2001:db8::1]:443:8443/udp",
        b"auto:22",
        b"10.0.0.5:1-9:1-9/sctp",
    ]


def check_small(data: bytes) -> None:
    """A resolv.conf, and a forward as it is typed."""
    text = data.decode(errors="replace")
    for address in resolv_conf.nameservers(text):
        assert isinstance(address, IPv4Address | IPv6Address)
    for parse in (forward_spec.parse_new, forward_spec.parse_old):
        try:
            parse(text)
        except ValueError:
            continue


TARGETS: Sequence[Target] = (
    Target("network", _networks, XML, check_network),
    Target("hook", _hook_data, XML, check_hook_data),
    Target("domain", _domains, XML, check_domain),
    Target("configuration", _configurations, LINES, check_configuration),
    Target("protocol", _requests, LINES, check_protocol),
    Target("lease", _leases, LINES, check_lease),
    Target("small", _small, LINES, check_small),
)
