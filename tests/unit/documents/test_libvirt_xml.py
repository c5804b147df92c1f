# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's XML and the natns:nat element: what is read, what is refused and how."""

import random
import re
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
)
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.documents import domain_edit, libvirt_xml, xml_tree
from libvirt_natns.documents.libvirt_xml import (
    NetworkPort,
    parse_domain,
    parse_domain_nics,
    parse_hook_data,
)
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.bandwidth import Bandwidth, RateLimit
from libvirt_natns.model.metadata import AddressRequest, NatMetadata, PortForward, PortRange
from libvirt_natns.model.network import Domain, LibvirtNetwork, Network, Nic
from libvirt_natns.model.publication import PortSet
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.subnet import DhcpHost, StaticRoute
from libvirt_natns.model.upstream import BridgeUpstream
from libvirt_natns.upstream import selection

EXAMPLES = sorted(names.resource("xml").glob("*.xml"))

IP = "<ip address='10.0.0.1' prefix='24'/>"
FORWARD = "<natns:portForward guestAddress='10.0.0.5'>{}</natns:portForward>"
FORWARDS = "<natns:portForward {}><natns:range {}/></natns:portForward>"
DEVICES = """<devices>
  <interface type='network'><mac address='52:54:00:ab:cd:ef'/><source network='lab'/></interface>
  <interface type='bridge'><mac address='52:54:00:AB:CD:F0'/><source bridge='virbr11'/></interface>
</devices>"""
NATNS_IP = "<natns:ip address='10.0.0.1' prefix='24'><natns:dhcp>{}</natns:dhcp></natns:ip>"


def nat_element(content: str, attributes: str = "") -> str:
    return f"<natns:nat xmlns:natns='urn:libvirt-natns:1' {attributes}>{content}</natns:nat>"


def network_xml(rest: str = "", nat: str | None = None, attributes: str = "") -> bytes:
    metadata = "" if nat is None else f"<metadata>\n{nat_element(nat, attributes)}\n</metadata>"
    return f"<network><name>lab</name>{metadata}{rest}</network>".encode()


def network(rest: str = "", nat: str | None = None, attributes: str = "") -> LibvirtNetwork:
    return libvirt_xml.parse_any_network(network_xml(rest, nat, attributes))


def metadata(nat: str, rest: str = IP, attributes: str = "") -> NatMetadata:
    found = network(rest, nat, attributes).nat
    assert found is not None
    return found


def domain_xml(nat: str, attributes: str = "", name: str = "web") -> bytes:
    metadata = f"<metadata>{nat_element(nat, attributes)}</metadata>"
    return f"<domain><name>{name}</name>{metadata}{DEVICES}</domain>".encode()


def domain_metadata(nat: str, attributes: str = "") -> NatMetadata:
    found = parse_domain(domain_xml(nat, attributes)).nat
    assert found is not None
    return found


def refusal(rest: str = "", nat: str | None = None, attributes: str = "") -> str:
    with pytest.raises(DocumentError) as caught:
        network(rest, nat, attributes)
    return str(caught.value)


def domain_refusal(nat: str, attributes: str = "") -> str:
    with pytest.raises(DocumentError) as caught:
        domain_metadata(nat, attributes)
    return str(caught.value)


def data_refusal(data: bytes) -> str:
    with pytest.raises(DocumentError) as caught:
        libvirt_xml.parse_any_network(data)
    return str(caught.value)


# libvirt's part


HOOK = """<hookData>
  <network connections='1'>
    <name>lab &amp; more</name>
    <uuid>4DEA22B3-1d52-d8f3-2516-782e98ab3fa0</uuid>
    <forward mode='route'/>
    <bridge name='virbr10' stp='on' delay='0'/>
    <mtu size='1400'/>
    <mac address='52:54:00:aa:bb:cc'/>
    <domain name='lab.example' localOnly='yes'/>
    <dns enable='no'/>
    <ip address='10.0.0.1' netmask='255.255.255.0'>
      <tftp root='/srv/tftp'/>
      <dhcp>
        <range start='10.0.0.100' end='10.0.0.150'><lease expiry='1' unit='hours'/></range>
        <range start='10.0.0.160' end='10.0.0.200'/>
        <host mac='52:54:0:0:0:AB' name='web' ip='10.0.0.5'/>
        <host name='db' ip='10.0.0.6'/>
        <host id='0:1' name='six'/>
        <bootp file='pxe'/>
      </dhcp>
    </ip>
    <ip family='ipv6' address='2001:db8::1' prefix='64'><dhcp/></ip>
    <ip family='ipv4' address='10.9.0.1' prefix='16'/>
    <route address='10.1.0.0' prefix='16' gateway='10.0.0.2'/>
    <route family='ipv6' address='2001:db8:1::' prefix='64' gateway='2001:db8::2'/>
    <portgroup name='p'/>
  </network>
  <networkport>
    <uuid>5d744f21-ba4a-4d6e-bdb2-30a35ff3207d</uuid>
    <owner><name>web</name><uuid>FF3207d0-ba4a-4d6e-bdb2-30a35ff3207d</uuid></owner>
    <mac address='52:54:00:7B:35:93'/>
    <plug type='network' bridge='virbr10'/>
  </networkport>
</hookData>"""


def test_hook_data() -> None:
    data = parse_hook_data(HOOK.encode())
    assert data.port == NetworkPort(
        "web", "ff3207d0-ba4a-4d6e-bdb2-30a35ff3207d", "52:54:00:7b:35:93", "virbr10"
    )
    lab = data.network
    assert (lab.name, lab.uuid) == ("lab & more", "4dea22b3-1d52-d8f3-2516-782e98ab3fa0")
    assert (lab.bridge, lab.forward_mode, lab.mtu) == ("virbr10", "route", 1400)
    assert (lab.domain, lab.dns, lab.taken_over, lab.nat) == ("lab.example", None, True, None)
    assert lab.routes == (
        StaticRoute(IPv4Network("10.1.0.0/16"), IPv4Address("10.0.0.2")),
        StaticRoute(IPv6Network("2001:db8:1::/64"), IPv6Address("2001:db8::2")),
    )
    first, six, second = lab.subnets
    assert (six.interface, six.dhcp) == (IPv6Interface("2001:db8::1/64"), False)
    assert (first.interface, first.dhcp) == (IPv4Interface("10.0.0.1/24"), True)
    assert [str(each) for each in first.ranges] == [
        "10.0.0.100-10.0.0.150",
        "10.0.0.160-10.0.0.200",
    ]
    assert first.hosts == (
        DhcpHost(IPv4Address("10.0.0.5"), "52:54:00:00:00:ab", "web"),
        DhcpHost(IPv4Address("10.0.0.6"), None, "db"),
    )
    assert (second.interface, second.dhcp) == (IPv4Interface("10.9.0.1/16"), False)


def test_hook_data_without_port() -> None:
    assert parse_hook_data(b"<hookData>" + network_xml() + b"</hookData>").port is None


def test_hook_data_with_an_empty_port() -> None:
    data = b"<hookData>" + network_xml() + b"<networkport/></hookData>"
    assert parse_hook_data(data).port == NetworkPort("", "", "", None)


def test_parse_network_takes_hook_data_too() -> None:
    assert libvirt_xml.parse_any_network(HOOK.encode()) == parse_hook_data(HOOK.encode()).network


@pytest.mark.parametrize("data", [b"<hookData/>", b"<hookData><domain/></hookData>"])
def test_hook_data_without_network(data: bytes) -> None:
    with pytest.raises(DocumentError, match="<hookData> has no <network>"):
        parse_hook_data(data)


def test_only_hook_data_is_hook_data() -> None:
    with pytest.raises(DocumentError, match="begins with 'network': expected <hookData>"):
        parse_hook_data(network_xml())


def test_least_network() -> None:
    assert network() == LibvirtNetwork(uuid="", name="lab", bridge=None)


def test_a_network_of_ours_has_a_bridge() -> None:
    data = network_xml("<bridge name='virbr10'/>")
    assert libvirt_xml.parse_network(data) == Network(uuid="", name="lab", bridge="virbr10")
    assert libvirt_xml.parse_network(data, bridge="br0").bridge == "virbr10"
    assert libvirt_xml.parse_network(network_xml(), bridge="br0").bridge == "br0"
    with pytest.raises(DocumentError, match=r"lab\.xml: network lab has no bridge"):
        libvirt_xml.parse_network(network_xml(), "lab.xml")


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ("address='10.0.0.1' prefix='24'", "10.0.0.1/24"),
        ("address='10.0.0.1' netmask='255.255.240.0'", "10.0.0.1/20"),
        ("address='10.0.0.1'", "10.0.0.1/8"),
        ("address='127.255.0.1'", "127.255.0.1/8"),
        ("address='128.0.0.1'", "128.0.0.1/16"),
        ("address='191.255.0.1'", "191.255.0.1/16"),
        ("address='192.168.0.1'", "192.168.0.1/24"),
        ("address='223.0.0.1'", "223.0.0.1/24"),
        ("address='192.168.0.1' prefix='0' netmask='255.255.0.0'", "192.168.0.1/16"),
        ("address='10.0.0.1' prefix='31'", "10.0.0.1/31"),
        ("family='ipv6' address='fd00::1' prefix='48'", "fd00::1/48"),
        ("family='ipv6' address='fd00::1'", "fd00::1/64"),
        ("family='ipv6' address='fd00::1' prefix='128'", "fd00::1/128"),
    ],
)
def test_prefix_as_libvirt_reads_it(attributes: str, expected: str) -> None:
    assert str(network(f"<ip {attributes}/>").subnets[0].interface) == expected


@pytest.mark.parametrize(
    ("rest", "culprit"),
    [
        ("<ip address='224.0.0.1'/>", "address='224.0.0.1'"),
        ("<ip address='10.0.0'/>", "address='10.0.0'"),
        ("<ip address='10.0.0.1' prefix='33'/>", "prefix='33'"),
        ("<ip address='10.0.0.1' prefix='x'/>", "prefix='x'"),
        ("<ip address='10.0.0.1' netmask='255.0.255.0'/>", "netmask='255.0.255.0'"),
        ("<ip address='10.0.0.1'><dhcp><range start='10.0.0.2'/></dhcp></ip>", "end=None"),
        ("<route address='10.0.0.0' gateway='x'/>", "gateway='x'"),
        ("<route family='ipv6' address='fd00::' gateway='10.0.0.1'/>", "gateway='10.0.0.1'"),
        ("<ip family='ipv6' address='10.0.0.1'/>", "address='10.0.0.1'"),
        ("<ip family='ipv6' address='fd00::1' prefix='129'/>", "prefix='129'"),
        ("<ip address='fd00::1' prefix='24'/>", "address='fd00::1'"),
        ("<mtu size='big'/>", "size='big'"),
        ("<uuid>123</uuid>", "uuid '123'"),
        ("<bridge name='a/b'/>", "name='a/b'"),
        ("<bridge name='a b'/>", "name='a b'"),
        ("<bridge name='.'/>", "name='.'"),
        ("<bridge name='-i'/>", "name='-i'"),
        ("<bridge name='virbr&quot;;'/>", "virbr"),
        ("<bridge name='sixteen-letters-'/>", "name='sixteen-letters-'"),
        ("<domain name='lab,10.0.0.0/8'/>", "name='lab,10.0.0.0/8'"),
        ("<domain name='lab&#10;server=1.2.3.4'/>", r"name='lab\nserver=1.2.3.4'"),
    ],
)
def test_libvirt_values_that_cannot_be_used(rest: str, culprit: str) -> None:
    message = refusal(rest)
    assert message.startswith("network 'lab', line 1: <")
    assert culprit in message


@pytest.mark.parametrize("name", ["", "a&#10;b", "a&#9;b", "a&#x9b;b", "\n  lab\n"])
def test_names_with_control_characters(name: str) -> None:
    with pytest.raises(DocumentError, match="expected a name without control characters") as caught:
        libvirt_xml.parse_any_network(f"<network><name>{name}</name></network>".encode())
    assert str(caught.value).isprintable()


def test_a_comment_does_not_shorten_a_name() -> None:
    lab = libvirt_xml.parse_any_network(b"<network><name>la<!-- -->b</name></network>")
    assert lab.name == "lab"


@pytest.mark.parametrize(
    ("rest", "expected"),
    [
        ("", None),
        ("<forward/>", "nat"),
        ("<forward mode='route'/>", "route"),
        ("<forward mode='none'/>", None),
    ],
)
def test_forward_mode(rest: str, expected: str | None) -> None:
    assert network(rest).forward_mode == expected


def test_bandwidth() -> None:
    """As libvirt gives the values to tc(8): kbps are 1000 octets a second, kb are 1024."""
    limits = network(
        "<bridge name='b'/><bandwidth><inbound average='1000' peak='5000' burst='5120'/>"
        "<outbound average='128' peak='256'/></bandwidth>"
        "<portgroup name='x'><bandwidth><inbound average='1'/></bandwidth></portgroup>"
    ).bandwidth
    assert limits == Bandwidth(
        RateLimit(1_000_000, 5_000_000, 5120 << 10, 1600),
        RateLimit(128_000, 128_000, 128 << 10, 128 << 10),
    )
    assert str(limits.outbound) == "128000 octets/s"


@pytest.mark.parametrize(
    "content", ["", "<inbound/>", "<inbound average='0'/>", "<outbound average='many'/>"]
)
def test_bandwidth_without_a_rate(content: str) -> None:
    limits = network(f"<bridge name='b'/><bandwidth>{content}</bandwidth>").bandwidth
    assert limits == Bandwidth()
    assert network("<bridge name='b'/>").bandwidth is None


def test_bridge_template_is_no_bridge_yet() -> None:
    assert network("<bridge name='virbr%d'/>").bridge is None
    assert network("<bridge stp='on'/>").bridge is None


def test_a_strange_domain_of_a_forwarded_network_is_not_refused() -> None:
    assert network("<forward mode='nat'/><domain name='a,b'/>").domain is None


def test_ip_without_address_is_ignored() -> None:
    assert network("<ip><dhcp/></ip>").subnets == ()


def test_host_names_that_would_inject_are_dropped() -> None:
    rest = "<ip address='10.0.0.1'><dhcp><host name='a,b' mac='x' ip='10.0.0.5'/></dhcp></ip>"
    assert network(rest).subnets[0].hosts == (DhcpHost(IPv4Address("10.0.0.5")),)


GUEST = """<domain type='kvm' id='7' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web &amp; more</name>
  <uuid>FF3207D0-ba4a-4d6e-bdb2-30a35ff3207d</uuid>
  <title>The shop</title>
  <metadata><o:o xmlns:o='urn:other'><o:interface type='network'/></o:o></metadata>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <interface type='network'>
      <mac address='52:54:00:AB:CD:01'/>
      <source network='lab 2 &#246;' portgroup='p' portid='5d744f21' bridge='virbr10'/>
      <target dev='vnet0'/>
    </interface>
    <interface type='direct'><mac address='52:54:00:00:00:02'/><source dev='eth0'/></interface>
    <interface type='user'><mac address='52:54:00:00:00:03'/></interface>
    <interface type='bridge'>
      <source bridge='virbr11'/><mac address='52:54:0:0:0:4'/><model type='virtio'/>
    </interface>
    <hostdev><interface type='network'><source network='inner'/></interface></hostdev>
    <interface type='network'><source network='a'/></interface>
    <interface type='bridge'><mac address='52:54:00:00:00:05'/><source bridge='a b'/></interface>
    <interface/>
    <interface type='network'><mac/></interface>
  </devices>
  <qemu:commandline><qemu:arg value='-nodefaults'/></qemu:commandline>
</domain>"""


def test_domain() -> None:
    guest = parse_domain(GUEST.encode())
    assert guest == Domain(
        uuid="ff3207d0-ba4a-4d6e-bdb2-30a35ff3207d",
        name="web & more",
        nics=(
            Nic("52:54:00:ab:cd:01", network="lab 2 ö", bridge="virbr10"),
            Nic("52:54:00:00:00:04", bridge="virbr11"),
            Nic("", network="a"),
            Nic("52:54:00:00:00:05"),
            Nic(""),
        ),
        outward=True,
    )
    assert parse_domain_nics(GUEST.encode()) == guest


@pytest.mark.parametrize("kind", ["lxc", "qemu"])
def test_domains_of_every_driver(kind: str) -> None:
    data = GUEST.replace("kvm", kind).encode()
    assert parse_domain(data) == parse_domain(GUEST.encode())


@pytest.mark.parametrize(
    "nat",
    [
        "<natns:range start='abc'/>",
        "<?x y?>",
        "</natns:nat><natns:nat xmlns:natns='urn:libvirt-natns:1'>",
        "<natns:address mac='52:54:00:00:00:99'/>",
        "x" * xml_tree.MAX_METADATA,
    ],
)
def test_nics_whatever_the_metadata_says(nat: str) -> None:
    data = domain_xml(nat)
    with pytest.raises(DocumentError):
        parse_domain(data)
    nics = (Nic("52:54:00:ab:cd:ef", "lab"), Nic("52:54:00:ab:cd:f0", bridge="virbr11"))
    assert parse_domain_nics(data) == Domain("", "web", nics)


def test_a_domains_name_matters_with_metadata_only() -> None:
    plain = b"<domain><name>a&#9;b</name></domain>"
    assert parse_domain(plain) == parse_domain_nics(plain) == Domain("", "a\tb")
    data = domain_xml("", name="a&#9;b")
    assert parse_domain_nics(data).name == "a\tb"
    with pytest.raises(DocumentError, match="expected a name without control characters") as caught:
        parse_domain(data)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("data", [b"", b"<domain>", b"<network><name>a</name></network>"])
def test_no_domains(data: bytes) -> None:
    for parse in (parse_domain, parse_domain_nics):
        with pytest.raises(DocumentError):
            parse(data)


# Hostile documents


LAUGHS = "".join(f"<!ENTITY l{n} '{f'&l{n - 1};' * 10}'>" for n in range(1, 12))


@pytest.mark.parametrize(
    "prologue",
    [
        "<!DOCTYPE network>",
        "<?xml version='1.0'?>\n<!-- <network/> --> <?pi?>\n<!DOCTYPE network SYSTEM 'http://[::1]/x'>",
        "\ufeff<!DOCTYPE network [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>",
        f"<!DOCTYPE network [<!ENTITY l0 'ha'>{LAUGHS}]>",
        "<!-- a --><!-- b --><!DOCTYPE network>",
    ],
)
def test_document_types(prologue: str) -> None:
    message = data_refusal(prologue.encode() + network_xml())
    assert message == "the document has a <!DOCTYPE>: remove it, and the entities it defines"


def test_a_document_type_in_text_is_text() -> None:
    rest = "<metadata><x:x xmlns:x='x'><![CDATA[<!DOCTYPE html>]]></x:x></metadata>"
    assert network(rest).nat is None


def test_undeclared_entity() -> None:
    assert "not well-formed" in data_refusal(b"<network><name>&xxe;</name></network>")


def test_inclusion_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("<name>included</name>")
    xi = f"<xi:include xmlns:xi='http://www.w3.org/2001/XInclude' href='{tmp_path}/name'/>"
    assert "has the name ''" in data_refusal(f"<network>{xi}</network>".encode())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "not well-formed"),
        (b"\x00", "not well-formed"),
        (b"<network><name>a</name>", "not well-formed"),
        (b"<network><name>a\x01</name></network>", "not well-formed"),
        (b"<a>" * 5000, "not well-formed"),
        ("<network/>".encode("utf-16"), "not UTF-8 at byte 0"),
        ("<network/>".encode("utf-16-le"), "not well-formed"),
        (b"<?xml version='1.0' encoding='UTF-7'?><network/>", "encoding='UTF-7'"),
        (b"<?xml version='1.0' encoding = 'latin1'?><network/>", "encoding='latin1'"),
        (b"<network xmlns='urn:x'><name>a</name></network>", "begins with '{urn:x}network'"),
        (b"<domain/>", "begins with 'domain': expected <network> or <hookData>"),
        (b"<?pi?>" * 20000 + b"<!--" * 20000, "not well-formed"),
    ],
)
def test_no_documents(data: bytes, expected: str) -> None:
    message = data_refusal(data)
    assert expected in message
    assert message.isprintable()


def test_too_large() -> None:
    padding = b" " * xml_tree.MAX_DOCUMENT
    assert "expected at most 8388608" in data_refusal(network_xml() + padding)
    assert (
        libvirt_xml.parse_any_network(network_xml() + padding[: -len(network_xml())]).name == "lab"
    )


def test_too_much_metadata() -> None:
    host = "<natns:host name='h{0}' ip='10.0.{1}.{2}'/>"
    hosts = "".join(host.format(n, n // 250, n % 250 + 2) for n in range(8000))
    nat = f"<natns:ip address='10.0.255.1' prefix='16'><natns:dhcp>{hosts}</natns:dhcp></natns:ip>"
    assert "bytes: expected at most 262144" in refusal("", nat)


def test_names_the_file() -> None:
    with pytest.raises(DocumentError, match=r"^lab\.xml: the document is not well-formed XML: "):
        libvirt_xml.parse_any_network(b"<network>", "lab.xml")
    with pytest.raises(DocumentError, match=r"^lab\.xml: network 'lab', line 1: <mtu> has size="):
        libvirt_xml.parse_any_network(network_xml("<mtu size='x'/>"), "lab.xml")
    with pytest.raises(DocumentError, match=r"^web\.xml: the document begins with 'network'"):
        parse_domain(network_xml(), "web.xml")
    with pytest.raises(DocumentError, match=r"^web\.xml: domain 'web', line 1: <natns:nat> has"):
        parse_domain(domain_xml("", "enabled='no'"), "web.xml")


# Our part: what is accepted


def test_metadata_of_a_network() -> None:
    nat = metadata(
        "<natns:upstream name='provider' address='192.168.0.150'/>"
        "<natns:portForward proto='udp' guestAddress='10.0.0.5' address='192.168.0.150'"
        " source='192.168.0.0/24, 10.9.8.7 172.16.0.0/12'>"
        "<natns:range start='80' end='90' to='8080'/><natns:range start='85' exclude='yes'/>"
        "</natns:portForward>"
    )
    assert nat == NatMetadata(
        upstream="provider",
        address=IPv4Address("192.168.0.150"),
        forwards=(
            PortForward(
                proto="udp",
                ranges=(PortRange(80, 90, 8080), PortRange(85, 85, 85, exclude=True)),
                address=IPv4Address("192.168.0.150"),
                guest_address=IPv4Address("10.0.0.5"),
                sources=tuple(
                    IPv4Network(each) for each in ("192.168.0.0/24", "10.9.8.7/32", "172.16.0.0/12")
                ),
            ),
        ),
    )


def test_metadata_of_a_domain() -> None:
    nat = domain_metadata(
        "<natns:portForward network='lab 2 &#246;'><natns:range start='1'/></natns:portForward>"
        "<natns:portForward proto='sctp' mac='52:54:00:AB:CD:EF' address='127.0.0.1'"
        " guestAddress='10.0.0.9'><natns:range start='1' end='65535'/></natns:portForward>"
    )
    assert nat.forwards == (
        PortForward("tcp", (PortRange(1, 1, 1),), network="lab 2 ö"),
        PortForward(
            "sctp",
            (PortRange(1, 65535, 1),),
            mac="52:54:00:ab:cd:ef",
            address=IPv4Address("127.0.0.1"),
            guest_address=IPv4Address("10.0.0.9"),
        ),
    )


def test_domain_without_metadata() -> None:
    assert parse_domain(b"<domain><name>web</name></domain>") == Domain("", "web")
    foreign = b"<domain><metadata><nat xmlns='urn:x'/></metadata></domain>"
    assert parse_domain(foreign).nat is None


def test_chosen_ports() -> None:
    nat = "<natns:range start='auto' to='22'/><natns:range start='22' to='22'/>"
    ranges = (PortRange(0, 0, 22, auto=True), PortRange(22, 22, 22))
    assert metadata(FORWARD.format(nat)).forwards[0].ranges == ranges
    assert domain_metadata(FORWARD.format(nat)).forwards[0].ranges == ranges


def test_chosen_ports_of_different_targets() -> None:
    ranges = "start='auto' to='22'", "start='auto' to='23'"
    attributes = "", "proto='udp'", "guestAddress='10.0.0.7'", "address='192.168.0.9'"
    text = "".join(FORWARDS.format(each, ports) for each in attributes for ports in ranges)
    assert len(domain_metadata(text).forwards) == 8


def test_addresses_of_a_guests_own() -> None:
    nat = domain_metadata(
        "<natns:address/>"
        "<natns:address address='auto' network='lab'><natns:allow start='80'/></natns:address>"
        "<natns:address address='192.168.0.7' mac='52:54:00:AB:CD:EF'>"
        "<natns:allow proto='udp' start='60' end='70'/><natns:allow proto='sctp' start='70'/>"
        "<natns:allow proto='tcp' start='65535'/></natns:address>"
    )
    assert nat == NatMetadata(
        addresses=(
            AddressRequest(),
            AddressRequest(network="lab", ports=(PortSet("tcp", 80, 80),)),
            AddressRequest(
                IPv4Address("192.168.0.7"),
                mac="52:54:00:ab:cd:ef",
                ports=(
                    PortSet("udp", 60, 70),
                    PortSet("sctp", 70, 70),
                    PortSet("tcp", 65535, 65535),
                ),
            ),
        )
    )


@pytest.mark.parametrize(
    "others",
    [
        "proto='udp'",
        "address='192.168.0.9'",
        "network='lab'",
        "network='other'",
        "mac='52:54:00:ab:cd:f0'",
    ],
)
def test_one_port_in_different_places(others: str) -> None:
    text = FORWARDS.format("", "start='80'") + FORWARDS.format(others, "start='80'")
    assert len(domain_metadata(text).forwards) == 2


def test_an_excluded_port_is_free_for_another_forward() -> None:
    first = FORWARD.format(
        "<natns:range start='8000' end='8010'/><natns:range start='8005' exclude='yes'/>"
    )
    second = FORWARD.format("<natns:range start='8005' to='80'/><natns:range start='8011'/>")
    assert len(domain_metadata(first + second).forwards) == 2


def test_empty_metadata() -> None:
    assert metadata("") == NatMetadata()
    assert domain_metadata("<!-- nothing yet -->") == NatMetadata()


@pytest.mark.parametrize(("value", "expected"), [("yes", True), ("no", False)])
def test_enabled(value: str, expected: bool) -> None:
    assert metadata("", attributes=f"enabled='{value}'").enabled is expected


def test_own_subnet() -> None:
    hosts = (
        "<natns:host mac='52:54:00:AA:00:05' ip='10.0.0.5'/><natns:host name='b' ip='10.0.0.6'/>"
    )
    lab = network("", NATNS_IP.format("<natns:range start='10.0.0.1' end='10.0.0.254'/>" + hosts))
    assert lab.nat is not None
    assert (lab.taken_over, lab.subnets) == (False, lab.nat.subnets)
    subnet = lab.subnets[0]
    assert (subnet.interface, subnet.dhcp) == (IPv4Interface("10.0.0.1/24"), True)
    assert subnet.ranges == (AddressRange(IPv4Address("10.0.0.1"), IPv4Address("10.0.0.254")),)
    assert subnet.hosts == (
        DhcpHost(IPv4Address("10.0.0.5"), mac="52:54:00:aa:00:05"),
        DhcpHost(IPv4Address("10.0.0.6"), name="b"),
    )


def test_own_subnet_in_both_families() -> None:
    hosts = (
        "<natns:host mac='52:54:00:AA:00:05' ip='FD00::5'/>"
        "<natns:host id='00:03:00:01:02:03' name='b' ip='fd00::6'/>"
        "<natns:host name='c' ip='fd00:0:0::ffff:ffff:ffff:ffff'/>"
    )
    ranges = "<natns:range start='fd00::1:0' end='fd00::1:ffff'/>"
    lab = network("", NATNS_IP.format("") + natns_ip6(ranges + hosts))
    assert lab.nat is not None
    assert (lab.taken_over, lab.subnets) == (False, lab.nat.subnets)
    four, six = lab.subnets
    assert four.interface == IPv4Interface("10.0.0.1/24")
    assert (six.interface, six.dhcp) == (IPv6Interface("fd00::1/64"), True)
    assert str(six.ranges[0]) == "fd00::1:0-fd00::1:ffff"
    assert six.hosts == (
        DhcpHost(IPv6Address("fd00::5"), mac="52:54:00:aa:00:05"),
        DhcpHost(IPv6Address("fd00::6"), name="b", id="00:03:00:01:02:03"),
        DhcpHost(IPv6Address("fd00::ffff:ffff:ffff:ffff"), name="c"),
    )


def test_own_subnet_in_ipv6_alone() -> None:
    (only,) = network("", "<natns:ip family='ipv6' address='fd00::1' prefix='126'/>").subnets
    assert only.interface == IPv6Interface("fd00::1/126")


def test_own_subnet_by_netmask_without_dhcp() -> None:
    lab = network("", "<natns:ip address='10.0.0.1' netmask='255.255.255.252' family='ipv4'/>")
    assert lab.subnets[0].interface == IPv4Interface("10.0.0.1/30")
    assert not lab.subnets[0].dhcp


def test_order_and_comments_do_not_matter() -> None:
    nat = metadata(
        FORWARD.format("<natns:range start='80'/>") + "<!-- x --><natns:upstream name='a'/>"
    )
    assert (nat.upstream, len(nat.forwards)) == ("a", 1)


def test_any_prefix_will_do() -> None:
    text = "<network><name>a</name><metadata><nat xmlns='urn:libvirt-natns:1' enabled='no'/>"
    found = libvirt_xml.parse_any_network(f"{text}</metadata></network>".encode()).nat
    assert found == NatMetadata(enabled=False)


# Our part: what is refused, and in which words


def host(attributes: str) -> str:
    return NATNS_IP.format(f"<natns:host {attributes}/>")


def natns_ip6(inside: str = "", attributes: str = "address='fd00::1' prefix='64'") -> str:
    dhcp = f"<natns:dhcp>{inside}</natns:dhcp>"
    return f"<natns:ip family='ipv6' {attributes}>{dhcp}</natns:ip>"


def host6(attributes: str) -> str:
    return natns_ip6(f"<natns:host {attributes}/>")


def dhcp_range6(start: str, end: str) -> str:
    return natns_ip6(f"<natns:range start='{start}' end='{end}'/>")


def dhcp_range(start: str, end: str) -> str:
    return NATNS_IP.format(f"<natns:range start='{start}' end='{end}'/>")


@pytest.mark.parametrize(
    ("nat", "fact", "expected"),
    [
        ("<natns:upstream name='a b'/>", "<natns:upstream> has name='a b'", "the name of an ups"),
        ("<natns:upstream name='a;b'/>", "name='a;b'", "the name of an upstream"),
        ("<natns:upstream name=''/>", "name=''", "the name of an upstream"),
        ("<natns:upstream name='a&#10;b'/>", r"name='a\nb'", "without control characters"),
        ("<natns:upstream address='10.0.0.256'/>", "address='10.0.0.256'", "an IPv4 address"),
        ("<natns:upstream address=' 10.0.0.2'/>", "address=' 10.0.0.2'", "an IPv4 address"),
        ("<natns:upstream address='224.0.0.1'/>", "address='224.0.0.1'", "of a single host"),
        ("<natns:upstream nam='a'/>", "has an attribute 'nam'", "only address, address6 or name"),
        ("<natns:upstream/><natns:upstream/>", "<natns:upstream> appears twice", "at most one"),
        ("<natns:upstream><x/></natns:upstream>", "<x> is not known in <natns:upstr", "no elem"),
        ("<natns:address/>", "<natns:address> is not known", "only ip, portForward or upstream"),
        ("<upstream/>", "<upstream> is not known in <natns:nat>", "only ip, portForward or ups"),
        ("provider", "<natns:nat> has text 'provider'", "none"),
        ("<natns:upstream/>tail", "<natns:nat> has text 'tail'", "none"),
        ("<?x y?>", "<natns:nat> has a processing instruction", "none"),
        (
            "<natns:ip address='10.0.0.1'/>",
            "neither prefix nor netmask",
            "either prefix or netmask",
        ),
        (
            "<natns:ip address='10.0.0.1' prefix='8' netmask='255.0.0.0'/>",
            "both prefix and netmask",
            "either prefix or netmask",
        ),
        ("<natns:ip prefix='8'/>", "<natns:ip> has no attribute 'address'", "an IPv4 or IPv6"),
        ("<natns:ip address='10.0.0.1' prefix='31'/>", "prefix='31'", "from 1 to 30"),
        ("<natns:ip address='10.0.0.1' prefix='0'/>", "prefix='0'", "from 1 to 30"),
        ("<natns:ip address='10.0.0.0' prefix='24'/>", "address='10.0.0.0'", "in 10.0.0.0/24"),
        ("<natns:ip address='10.0.0.255' prefix='24'/>", "address='10.0.0.255'", "a host addr"),
        ("<natns:ip address='127.0.0.1' prefix='8'/>", "address='127.0.0.1'", "a host address"),
        ("<natns:ip address='0.0.0.1' prefix='8'/>", "address='0.0.0.1'", "a host address"),
        (
            "<natns:ip address='10.0.0.1' netmask='255.255.0.255'/>",
            "netmask='255.255.0.255'",
            "such as 255.255.255.0",
        ),
        (
            "<natns:ip address='10.0.0.1' netmask='255.255.255.254'/>",
            "netmask='255.255.255.254'",
            "to 255.255.255.252",
        ),
        ("<natns:ip address='10.0.0.1' prefix='8' family='ipx'/>", "family='ipx'", "ipv4 or ipv6"),
        (NATNS_IP.format("") * 2, "is the second IPv4 subnet, after line 2", "at most one of each"),
        (natns_ip6() * 2, "is the second IPv6 subnet, after line 2", "at most one of each"),
        (natns_ip6("", "address='10.0.0.1' prefix='64'"), "address='10.0.0.1'", "an IPv6 address"),
        (natns_ip6("", "address='fd00::1' prefix='48'"), "prefix='48'", "to 30 or with family="),
        (natns_ip6("", "address='fd00::1' prefix='24'"), "prefix='24'", "from 64 to 126"),
        (natns_ip6("", "address='fd00::1' prefix='127'"), "prefix='127'", "from 64 to 126"),
        (
            natns_ip6("", "address='fd00::1'"),
            "neither prefix nor netmask",
            "either prefix or netmask",
        ),
        (
            natns_ip6("", "address='fd00::1' netmask='255.0.0.0'"),
            "family='ipv6' and netmask",
            "prefix instead",
        ),
        ("<natns:ip address='fd00::1' prefix='64'/>", "prefix='64'", "or family='ipv6'"),
        ("<natns:ip address='fd00::1' prefix='24'/>", "address='fd00::1'", "an IPv4 address"),
        (natns_ip6("", "address='fd00::' prefix='64'"), "address='fd00::'", "address in fd00::/64"),
        (natns_ip6("", "address='fe80::1' prefix='64'"), "address='fe80::1'", "a host address"),
        (natns_ip6("", "address='ff02::1' prefix='64'"), "address='ff02::1'", "a host address"),
        (natns_ip6("", "address='fd00::1%a' prefix='64'"), "address='fd00::1%a'", "or IPv6 addr"),
        (natns_ip6("", "address='12345::1' prefix='64'"), "address='12345::1'", "or IPv6 address"),
        (dhcp_range6("fd00::2", "10.0.0.2"), "end='10.0.0.2'", "an IPv6 address"),
        (dhcp_range("10.0.0.2", "fd00::2"), "end='fd00::2'", "an IPv4 address"),
        (dhcp_range6("fd00::9", "fd00::8"), "end='fd00::8'", "fd00::9 or higher"),
        (dhcp_range6("fd00::9", "fd00:0:0:1::"), "end='fd00:0:0:1::'", "address in fd00::/64"),
        (dhcp_range6("fd00::2", "fd00::1:2"), "end='fd00::1:2'", "at most fd00::1:1, for 65536"),
        (host6("ip='fd00::5'"), "neither mac nor name", "at least one"),
        (host6("id='0:1:2' mac='52:54:00:00:00:01' ip='fd00::5'"), "both mac and id", "one of"),
        (host6("id='x' ip='fd00::5'"), "id='x'", "a DUID such as"),
        (host6("name='a' ip='10.0.0.5'"), "ip='10.0.0.5'", "an IPv6 address"),
        (host6("name='a' ip='fd00::1'"), "ip='fd00::1'", "other than the gateway"),
        (host("id='0:1:2' ip='10.0.0.5'"), "has an attribute 'id'", "only with family='ipv6'"),
        (
            natns_ip6("<natns:host name='a' ip='fd00::5'/><natns:host name='b' ip='fd00:0::5'/>"),
            "ip='fd00:0::5'",
            "a value other than that of <natns:host> in line 2",
        ),
        (
            natns_ip6("<natns:host id='0:1:A' ip='fd00::5'/><natns:host id='0:1:a' ip='fd00::6'/>"),
            "id='0:1:a'",
            "a value other than that of <natns:host> in line 2",
        ),
        ("<natns:upstream address='fd00::5'/>", "address='fd00::5'", "an IPv4 address"),
        ("<natns:upstream address6='10.0.0.5'/>", "address6='10.0.0.5'", "an IPv6 address"),
        ("<natns:upstream address6='ff02::5'/>", "address6='ff02::5'", "of a single host"),
        (NATNS_IP.format("<natns:range start='10.0.0.2'/>"), "no attribute 'end'", "an IPv4 or"),
        (dhcp_range("10.0.0.9", "10.0.0.8"), "end='10.0.0.8'", "10.0.0.9 or higher"),
        (dhcp_range("10.0.1.2", "10.0.1.3"), "start='10.0.1.2'", "a host address in 10.0.0.0/24"),
        (dhcp_range("10.0.0.2", "10.0.0.255"), "end='10.0.0.255'", "a host address"),
        (dhcp_range("10.0.0.0", "10.0.0.9"), "start='10.0.0.0'", "a host address"),
        (dhcp_range("10.0.0.2", "10.0.0.9,lo"), "end='10.0.0.9,lo'", "an IPv4 or IPv6"),
        (host("ip='10.0.0.5'"), "<natns:host> has neither mac nor name", "at least one"),
        (host("name='a'"), "has no attribute 'ip'", "an IPv4 or IPv6"),
        (host("name='a' ip='10.0.0.1'"), "ip='10.0.0.1'", "other than the gateway"),
        (host("name='a' ip='10.0.1.5'"), "ip='10.0.1.5'", "a host address in 10.0.0.0/24"),
        (host("name='a,b' ip='10.0.0.5'"), "name='a,b'", "a host name"),
        (host("name='a b' ip='10.0.0.5'"), "name='a b'", "a host name"),
        (host("name='a#' ip='10.0.0.5'"), "name='a#'", "a host name"),
        (host("name='45m' ip='10.0.0.5'"), "name='45m'", "a host name"),
        (host("name='a-' ip='10.0.0.5'"), "name='a-'", "a host name"),
        (host("name='a..b' ip='10.0.0.5'"), "name='a..b'", "a host name"),
        (host(f"name='{'a' * 64}' ip='10.0.0.5'"), "name='aaa", "a host name"),
        (host(f"name='{'.'.join('a' * 128)}' ip='10.0.0.5'"), "name='a.a", "a host name"),
        (host("name='Ignore' ip='10.0.0.5'"), "name='Ignore'", "not a keyword of dnsmasq"),
        (host("name='infinite' ip='10.0.0.5'"), "name='infinite'", "not a keyword of dnsmasq"),
        (host("mac='53:54:00:00:00:01' ip='10.0.0.5'"), "mac='53:54:00", "a unicast MAC address"),
        (host("mac='52:54:00:00:01' ip='10.0.0.5'"), "mac='52:54:00", "a unicast MAC address"),
        (
            NATNS_IP.format(
                "<natns:host name='a' ip='10.0.0.5'/>\n<natns:host name='b' ip='10.0.0.5'/>"
            ),
            "line 3: <natns:host> has ip='10.0.0.5'",
            "a value other than that of <natns:host> in line 2",
        ),
        (
            NATNS_IP.format(
                "<natns:host mac='52:54:00:00:00:0a' ip='10.0.0.5'/>"
                "<natns:host mac='52:54:00:00:00:0A' ip='10.0.0.6'/>"
            ),
            "mac='52:54:00:00:00:0A'",
            "a value other than",
        ),
    ],
)
def test_refused_in_a_network(nat: str, fact: str, expected: str) -> None:
    message = refusal("", nat)
    found, _, wanted = message.partition(": expected ")
    assert re.match(r"network 'lab', line \d: <", found), message
    assert fact in found
    assert expected in wanted
    assert message.isprintable()


@pytest.mark.parametrize(
    ("attributes", "ranges", "fact", "expected"),
    [
        ("", "", "<natns:portForward> has no <natns:range>", "at least one"),
        ("", "start='0'", "start='0'", "a port number from 1 to 65535"),
        ("", "start='65536'", "start='65536'", "a port number"),
        ("", "start='abc'", "start='abc'", "a port number"),
        ("", "start='+80'", "start='+80'", "a port number"),
        ("", "start='080'", "start='080'", "a port number"),
        ("", "start='\u0661'", "start='\u0661'", "a port number"),
        ("", "start='auto'", "start='auto' and no attribute 'to'", "the guest's port, from 1"),
        ("", "start='1' to='2' exclude='no'|end='3'", "no attribute 'start'", "a port number"),
        ("", "start='AUTO' to='1'", "start='AUTO'", "a port number from 1 to 65535 or auto"),
        ("", "start='auto' to='auto'", "to='auto'", "a port number"),
        ("", "start='1' end='auto'", "end='auto'", "a port number"),
        ("", "start='auto' to='0'", "to='0'", "a port number"),
        ("", "start='auto' to='1' end='2'", "start='auto' and end", "at most one of the two"),
        ("", "start='auto' to='1' exclude='no'", "start='auto' and exclude", "one of the two"),
        ("", "start='auto' exclude='yes'", "start='auto' and exclude", "one of the two"),
        ("", "start='auto' to='1'|start='auto' to='1'", "to='1', for tcp, a second time", "once"),
        ("", "to='80'", "no attribute 'start'", "a port number from 1 to 65535 or auto"),
        ("", "exclude='yes'", "no attribute 'start'", "a port number"),
        ("", "start='80' end='0'", "end='0'", "a port number"),
        ("", "start='80' to='65536'", "to='65536'", "a port number"),
        ("", "start='-1'", "start='-1'", "a port number"),
        ("", "end='80'", "no attribute 'start'", "a port number"),
        ("", "start='81' end='80'", "end='80'", "81 or higher"),
        ("", "start='1' end='3' to='65534'", "to='65534'", "at most 65533, for 3 ports"),
        ("", "start='1' exclude='maybe'", "exclude='maybe'", "no or yes"),
        ("", "start='1' exclude='yes' to='2'", "has exclude='yes' and to", "one of the two"),
        (
            "",
            "start='1' exclude='yes'",
            "ranges with exclude='yes' only",
            "at least one range without exclude",
        ),
        ("", "start='1' end='9'|start='9' to='1'", "start='9'", "ports other than those of"),
        ("", "start='8'|start='1' end='9'", "start='8'", "ports other than those of"),
        ("proto='icmp'", "start='1'", "proto='icmp'", "tcp, udp or sctp"),
        ("proto='TCP'", "start='1'", "proto='TCP'", "tcp, udp or sctp"),
        ("dev='eth0'", "start='1'", "has an attribute 'dev'", "only address, guestAddress"),
        ("address='::1'", "start='1'", "address='::1'", "of a single host"),
        ("address='fe80::1'", "start='1'", "address='fe80::1'", "of a single host"),
        ("address='fd00::1'", "start='1'", "address in IPv6 and guestAddress in IPv4", "one fam"),
        ("source='fd00::/8'", "start='1'", "guestAddress in IPv4 and source fd00::/8 in", "one"),
        ("source='fd00::1/8'", "start='1'", "source='fd00::1/8'", "whole subnets: fd00::/8"),
        ("source='fd00::/129'", "start='1'", "source='fd00::/129'", "subnets such as"),
        ("address='0.0.0.0'", "start='1'", "address='0.0.0.0'", "of a single host"),
        ("source='10.0.0.1/24'", "start='1'", "source='10.0.0.1/24'", "whole subnets: 10.0.0.0/24"),
        ("source='10.0.0.0/33'", "start='1'", "source='10.0.0.0/33'", "subnets such as"),
        ("source='10.0.0.0/8;'", "start='1'", "source='10.0.0.0/8;'", "subnets such as"),
        ("source=''", "start='1'", "source=''", "subnets such as"),
    ],
)
def test_forwards_refused_everywhere(
    attributes: str, ranges: str, fact: str, expected: str
) -> None:
    elements = "".join(f"<natns:range {each}/>" for each in ranges.split("|") if each)
    text = f"<natns:portForward guestAddress='10.0.0.5' {attributes}>{elements}</natns:portForward>"
    for message in (refusal(IP, text), domain_refusal(text)):
        found, _, wanted = message.partition(": expected ")
        assert fact in found
        assert expected in wanted


@pytest.mark.parametrize(
    ("value", "helpers"),
    [
        ("tftp", ("tftp",)),
        ("ftp,tftp", ("ftp", "tftp")),
        ("tftp, ftp, tftp", ("tftp", "ftp")),
        ("none", ()),
    ],
)
def test_helpers_of_a_network(value: str, helpers: tuple[str, ...]) -> None:
    assert metadata("", attributes=f"helpers='{value}'").helpers == helpers
    assert metadata("").helpers is None


@pytest.mark.parametrize("value", ["", "sip", "none, ftp", "tftp ftp,"])
def test_helpers_that_are_none(value: str) -> None:
    message = refusal(IP, "", f"helpers='{value}'")
    assert f"helpers='{value}'" in message
    assert message.endswith("expected helpers such as tftp, or tftp and ftp with a comma between"
                            " them, or none")  # fmt: skip


@pytest.mark.parametrize("address", ["10.0.1.5", "10.0.0.1", "10.0.0.0", "10.0.0.255", "127.0.0.1"])
def test_a_networks_forward_goes_to_its_guests(address: str) -> None:
    nat = FORWARD.format("<natns:range start='1'/>").replace("10.0.0.5", address)
    message = refusal(IP, nat)
    assert (
        f"has guestAddress='{address}': expected the address of a guest in 10.0.0.0/24" in message
    )


def test_a_networks_forward_needs_a_subnet() -> None:
    message = refusal("", FORWARD.format("<natns:range start='1'/>"))
    assert "expected the address of a guest in an <ip>, but the network has none" in message


def test_a_networks_forward_into_its_second_or_own_subnet() -> None:
    nat = FORWARD.format("<natns:range start='1'/>")
    assert metadata(nat, f"<ip address='10.9.0.1' prefix='16'/>{IP}").forwards
    assert metadata(NATNS_IP.format("") + nat, "").forwards


@pytest.mark.parametrize("attribute", ["network='lab'", "mac='52:54:00:00:00:01'"])
def test_a_networks_forward_has_no_nic(attribute: str) -> None:
    nat = FORWARD.replace("<natns:portForward", f"<natns:portForward {attribute}")
    assert "has an attribute '" in refusal(IP, nat.format("<natns:range start='1'/>"))


def test_a_networks_forward_needs_its_target() -> None:
    nat = "<natns:portForward><natns:range start='1'/></natns:portForward>"
    assert "has no attribute 'guestAddress': expected an IPv4 or" in refusal(IP, nat)


def allow(*ranges: str) -> str:
    inner = "".join(f"<natns:allow {each}/>" for each in ranges)
    return f"<natns:address>{inner}</natns:address>"


@pytest.mark.parametrize(
    ("nat", "attributes", "fact"),
    [
        ("", "enabled='no'", "<natns:nat> has an attribute 'enabled': expected only defaultRoute"),
        ("", "helpers='ftp'", "<natns:nat> has an attribute 'helpers': expected only defaultRoute"),
        ("<natns:upstream/>", "", "<natns:upstream> is not known in <natns:nat>: expected only"),
        ("<natns:ip address='10.0.0.1' prefix='8'/>", "", "<natns:ip> is not known"),
        (
            "<natns:portForward mac='52:54:00:ab:cd:ee'><natns:range start='1'/>"
            "</natns:portForward>",
            "",
            "mac='52:54:00:ab:cd:ee': expected the MAC address of a NIC of the guest in a "
            "network or on a bridge: 52:54:00:ab:cd:ef or 52:54:00:ab:cd:f0",
        ),
        ("<natns:address mac='52:54:00:ab:cd:ee'/>", "", "<natns:address> has mac='52:54:00:ab:cd"),
        ("<natns:address mac='lab'/>", "", "mac='lab': expected a unicast MAC address"),
        (
            "<natns:address network='a' mac='52:54:00:ab:cd:ef'/>",
            "",
            "<natns:address> has both network and mac: expected at most one of the two",
        ),
        ("<natns:address/><natns:address address='1.2.3.4'/>", "", "the same NIC as li"),
        (
            "<natns:address mac='52:54:00:ab:cd:ef'/><natns:address mac='52:54:00:AB:CD:EF'/>",
            "",
            "same NIC as line 1: expected another network or mac",
        ),
        ("<natns:address network='a'/><natns:address network='a'/>", "", "selects the same NIC"),
        ("<natns:address address=''/>", "", "address='': expected auto, or an IPv4 or IPv6"),
        ("<natns:address address='any'/>", "", "address='any': expected auto, or an IPv4 or IPv6"),
        (
            "<natns:address address='::1'/>",
            "",
            "address='::1': expected the address of a single host",
        ),
        ("<natns:address address='127.0.0.1'/>", "", "expected the address of a single host"),
        ("<natns:address proto='tcp'/>", "", "attribute 'proto': expected only address, mac or n"),
        ("<natns:address><natns:range start='1'/></natns:address>", "", "expected only allow"),
        (allow(""), "", "<natns:allow> has no attribute 'start': expected a port number"),
        (allow("start='auto'"), "", "start='auto': expected a port number from 1 to 65535"),
        (allow("start='0'"), "", "<natns:allow> has start='0': expected a port number"),
        (allow("start='2' end='1'"), "", "<natns:allow> has end='1': expected 2 or higher"),
        (allow("start='2' to='3'"), "", "has an attribute 'to': expected only end, proto or start"),
        (allow("start='2' proto='icmp'"), "", "proto='icmp': expected tcp, udp or sctp"),
        (
            allow("start='2'", "start='1' end='9'"),
            "",
            "start='2': expected ports other than those of <natns:allow> in line 1",
        ),
        (
            "<natns:portForward network='a' mac='52:54:00:00:00:01'><natns:range start='1'/>"
            "</natns:portForward>",
            "",
            "has both network and mac: expected at most one of the two",
        ),
        (
            "<natns:portForward network='a/b'><natns:range start='1'/></natns:portForward>",
            "",
            "network='a/b': expected the name of a libvirt network",
        ),
        (
            "<natns:portForward guestAddress='224.0.0.1'><natns:range start='1'/>"
            "</natns:portForward>",
            "",
            "guestAddress='224.0.0.1': expected the address of a single host",
        ),
    ],
)
def test_refused_in_a_domain(nat: str, attributes: str, fact: str) -> None:
    message = domain_refusal(nat, attributes)
    assert message.startswith("domain 'web', line 1: ")
    assert fact in message


def test_a_guest_without_nics_selects_none() -> None:
    data = domain_xml("<natns:address mac='52:54:00:ab:cd:ef'/>").replace(b"interface", b"other")
    with pytest.raises(DocumentError, match=r"on a bridge, but the guest has none$"):
        parse_domain(data)


@pytest.mark.parametrize("nic", ["", "network='lab'", "mac='52:54:00:ab:cd:ef'"])
@pytest.mark.parametrize("address", ["", "address='192.168.0.9'"])
def test_two_forwards_of_one_port(nic: str, address: str) -> None:
    """Whatever stands between them, and whoever their clients and targets are."""
    place = f"{nic} {address}"
    others = "source='10.0.0.0/8' guestAddress='10.0.0.9'"
    forwards = [
        FORWARDS.format(f"{place} proto='udp'", "start='8005'"),
        FORWARDS.format(place, "start='8000' end='8010' to='80'"),
        FORWARDS.format(place, "start='8011'"),
        FORWARDS.format(f"{place.replace('ef', 'EF')} {others}", "start='8005' end='20000'"),
    ]
    message = domain_refusal("\n".join(forwards))
    expected = "publishes tcp port 8005: expected ports other than those in line 2"
    assert message == f"domain 'web', line 4: <natns:portForward> {expected}"


def test_two_forwards_of_one_port_in_a_network() -> None:
    text = FORWARD.format("<natns:range start='1' end='9'/>")
    message = refusal(IP, f"{text}{text}")
    assert "publishes tcp port 1: expected ports other than those in line 2" in message


def test_one_port_in_both_families() -> None:
    inside = ("10.0.0.5", "fd00::5")
    forwards = [FORWARDS.format(f"guestAddress='{each}'", "start='80'") for each in inside]
    own = NATNS_IP.format("") + natns_ip6()
    found = metadata(own + "".join(forwards), "").forwards
    assert [each.family for each in found] == [4, 6]
    assert "publishes tcp port 80" in refusal("", own + "".join(forwards + forwards[1:]))


def test_a_forward_without_a_family_is_of_both() -> None:
    forwards = FORWARDS.format("", "start='80'") + FORWARDS.format(
        "guestAddress='fd00::5'", "start='80'"
    )
    assert "publishes tcp port 80" in domain_refusal(forwards)


def test_an_address_of_each_family_for_a_guest() -> None:
    six = "<natns:address address='2001:db8::5'/>"
    both = domain_metadata("<natns:address/>" + six).addresses
    assert [each.address for each in both] == [None, IPv6Address("2001:db8::5")]
    four = "<natns:address/><natns:address address='192.168.0.9'/>"
    for twice in (four, six + six.replace("::5", "::6")):
        assert "selects the same NIC" in domain_refusal(twice)


def test_clients_of_one_family() -> None:
    text = FORWARDS.format("guestAddress='fd00::5' source='2001:db8::/32, fd00::9'", "start='80'")
    (forward,) = metadata(natns_ip6() + text, "").forwards
    assert forward.sources == (IPv6Network("2001:db8::/32"), IPv6Network("fd00::9/128"))


@pytest.mark.parametrize("ip", [IP, "<ip family='ipv6' address='2001:db8::1' prefix='64'/>"])
def test_own_subnet_of_the_other_family_beside_libvirts(ip: str) -> None:
    for own in (NATNS_IP.format(""), natns_ip6()):
        assert refusal(ip, own).endswith("either <ip> or <natns:ip>")


def test_both_kinds_of_ip() -> None:
    message = refusal(IP, NATNS_IP.format(""))
    assert "<natns:ip> address='10.0.0.1' is set beside libvirt's own <ip address='10.0.0.1'>" in (
        message
    )
    assert message.endswith("either <ip> or <natns:ip>")


def test_two_nat_elements() -> None:
    rest = f"<metadata>{nat_element('')}{nat_element('')}</metadata>"
    assert "<natns:nat> appears twice: expected at most one" in refusal(rest)


def test_enabled_takes_yes_or_no_only() -> None:
    assert "enabled='true': expected yes or no" in refusal(IP, "", "enabled='true'")


def test_names_the_line() -> None:
    nat = "\n<natns:upstream/>\n" + FORWARD.format("\n<natns:range start='0'/>")
    assert refusal(IP, nat).startswith("network 'lab', line 5: <natns:range> has start='0'")


def test_long_values_are_shortened() -> None:
    assert len(refusal(IP, f"<natns:upstream name='{'x' * 5000}'/>")) < 300


# Robustness


MARKUP = [b"<", b">", b"&", b'"', b"'", b"\x00", b"\xff", b"]]>", b"<!--", b"<?x?>", b"&#10;"]


def mutated(data: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(data))
    kind = dice.randrange(5)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + dice.choice(MARKUP) + data[at:]
    if kind == 3:
        return data[:at] + data[at + dice.randrange(1, 40) :]
    piece = data[at : at + dice.randrange(1, 200)]
    return data[:at] + piece + data[at:]


def parse_any(data: bytes) -> object:
    if b"<network>" in data:
        return libvirt_xml.parse_any_network(data)
    return parse_domain(data)


BROKEN, REVALUED = 250, 150
"""Variants of each example.  tests/fuzz/run makes as many of the kind as there is time for."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_broken_bytes_raise_nothing_else(example: Path) -> None:
    dice = random.Random(example.name)
    data = example.read_bytes()
    refused = 0
    for _ in range(BROKEN):
        try:
            parse_any(mutated(data, dice))
        except DocumentError as error:
            refused += 1
            assert "\n" not in str(error)
    assert BROKEN / 10 < refused < BROKEN


VALUES = [
    "",
    "auto",
    "0",
    "65535",
    "65536",
    "10.0.0.5",
    "10.0.0.1/24",
    "yes",
    "a",
    "a b",
    "\u0661",
    "::1",
]
ATTRIBUTE = re.compile(rb'(\w+)="([^"]*)"')


def with_other_values(data: bytes, dice: random.Random) -> bytes:
    """One attribute or more of the metadata dropped, renamed or set to something."""
    start, end = data.index(b"<natns:nat"), data.rindex(b"natns:nat")

    def change(match: re.Match[bytes]) -> bytes:
        if b"urn:" in match[2] or dice.random() < 0.9:
            return match[0]
        others = [
            b"",
            b'x%d="1"' % match.start(),
            b'%s="%s"' % (match[1], dice.choice(VALUES).encode()),
        ]
        return dice.choice(others)

    return data[:start] + ATTRIBUTE.sub(change, data[start:end]) + data[end:]


@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if b"</natns:nat>" in path.read_bytes()],
    ids=lambda path: path.name,
)
def test_whatever_the_schema_refuses_is_explained(example: Path) -> None:
    dice = random.Random(example.name)
    data = example.read_bytes()
    refused = 0
    for _ in range(REVALUED):
        try:
            parse_any(with_other_values(data, dice))
        except DocumentError as error:
            refused += 1
            # That is what is said when only libxml2 knows the reason.
            assert "is not valid" not in str(error)
    assert refused > REVALUED / 10


@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if b"</domain>" in path.read_bytes()],
    ids=lambda path: path.name,
)
def test_nics_do_not_depend_on_the_metadata(example: Path) -> None:
    dice = random.Random(example.name)
    data = example.read_bytes()
    expected = parse_domain_nics(data)
    assert expected.nics
    for _ in range(200):
        assert parse_domain_nics(with_other_values(data, dice)) == expected


def test_time_is_bounded() -> None:
    """Thousands of ranges are compared by neighbours, not each with each."""
    ranges = "".join(f"<natns:range start='{port}'/>" for port in range(1, 9000))
    assert len(metadata(FORWARD.format(ranges)).forwards[0].ranges) == 8999


def test_time_is_bounded_for_forwards_too() -> None:
    forwards = "".join(FORWARDS.format("", f"start='{port}'") for port in range(1, 3500))
    assert len(domain_metadata(forwards).forwards) == 3499
    assert "publishes tcp port 3499" in domain_refusal(
        forwards + FORWARDS.format("", "start='3499'")
    )


# Files


def test_missing_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "resource", lambda name: tmp_path / name)
    assert "natns-network.rng" in refusal(IP, "")


@pytest.mark.parametrize(
    ("metrics", "chosen"),
    [(("", ""), 2), (("7", ""), 3), (("7", "2"), 3), (("2", "7"), 2), (("x", "9" * 5000), 2)],
)
def test_one_route_counts_for_each_destination(metrics: tuple[str, str], chosen: int) -> None:
    routes = "".join(
        f"<route address='10.1.0.0' prefix='16' gateway='10.0.0.{last}' metric='{metric}'/>"
        for last, metric in enumerate(metrics, 2)
    )
    found = libvirt_xml.parse_any_network(f"<network><name>a</name>{routes}</network>".encode())
    assert [str(route.gateway) for route in found.routes] == [f"10.0.0.{chosen}"]


def test_a_route_by_the_network_itself_has_no_gateway() -> None:
    found = libvirt_xml.parse_any_network(
        b"<network><name>a</name><ip address='10.0.0.1' prefix='24'/>"
        b"<route address='10.1.0.0' prefix='16' gateway='10.0.0.1'/>"
        b"<route address='10.2.0.0' prefix='16' gateway='10.0.0.2'/></network>"
    )
    assert [str(found.next_hop(route)) for route in found.routes] == ["None", "10.0.0.2"]


PROVIDER = BridgeSegment.of(BridgeUpstream(name="provider", bridge="br0"))


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ("<ip address='0.0.0.0' prefix='24'/>", "no host can have its address 0.0.0.0"),
        ("<ip family='ipv6' address='::ffff:10.0.0.1' prefix='120'/>", "no host can have"),
        (
            "<ip address='10.0.0.1' prefix='24'/>"
            "<route address='10.1.0.0' prefix='16' gateway='10.0.0.255'/>",
            "the gateway 10.0.0.255 of its <route> is the broadcast address",
        ),
        (
            "<ip family='ipv6' address='fd00::1' prefix='64'/>"
            "<route family='ipv6' address='fe80::' prefix='64' gateway='fd00::2'/>",
            "no <route> can lead to link-local addresses (fe80::/64)",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(inside: str, expected: str) -> None:
    found = libvirt_xml.parse_network(
        f"<network><name>a</name>{inside}</network>".encode(), bridge="b"
    )
    with pytest.raises(DocumentError, match=re.escape(expected)):
        selection.check_addresses(found, PROVIDER)


def test_edited_documents_keep_what_is_not_ascii() -> None:
    """A comment has no other spelling for its characters."""
    inside = "<!-- preț --><natns:portForward><natns:range start='1'/></natns:portForward>"
    nat = f"<natns:nat xmlns:natns='urn:libvirt-natns:1'>{inside}</natns:nat>"
    xml = f"<domain><name>a</name><metadata>{nat}<x preț='1'/></metadata></domain>".encode()
    edited = domain_edit.edit_nat(xml, lambda nat: None)
    assert "<!-- preț -->" in edited.document.decode()
    assert domain_edit.nat_text(edited.document) == edited.element
    assert "preț='1'" in domain_edit.with_nic(xml, Nic("52:54:00:00:00:05")).decode().replace(
        '"', "'"
    )
