# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a domain: does it concern us, and which is it."""

import time

import pytest

from libvirt_natns.documents.libvirt_xml import (
    parse_any_network,
    parse_domain_nics,
    parse_hook_data,
)
from libvirt_natns.documents.xml_sniff import Glance, at_domain, at_network
from libvirt_natns.errors import DocumentError
from libvirt_natns.model.configuration import Config, Scope
from libvirt_natns.upstream.selection import verdict

UUID = "c0ffee00-0000-4000-8000-000000000001"
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1"/>'


def domain(inside: str) -> bytes:
    return f"<domain><name>web</name><uuid>{UUID}</uuid>{inside}</domain>".encode()


@pytest.mark.parametrize(
    ("inside", "annotated"),
    [
        (f"<metadata>{NAT}</metadata>", True),
        ('<metadata><nat xmlns="urn:libvirt-natns:1" enabled="no"/></metadata>', True),
        ('<metadata><x:nat xmlns:x="urn:another"/></metadata>', False),
        ("<metadata><nat/></metadata>", False),
        (f"<metadata><other>{NAT}</other></metadata>", False),
        (f"<description/>{NAT}", False),
        ("", False),
    ],
)
def test_annotated(inside: str, annotated: bool) -> None:
    seen = at_domain(domain(inside))
    assert (seen.annotated, seen.uuid, seen.name) == (annotated, UUID, "web")


@pytest.mark.parametrize("data", [b"", b"<domain", b"<network/>", b"\xff", b"<a><domain/></a>"])
def test_what_is_no_domain_concerns_nobody(data: bytes) -> None:
    seen = at_domain(data)
    assert (seen.annotated, seen.uuid) == (False, "")


def test_a_uuid_that_is_a_path_is_none() -> None:
    assert at_domain(b"<domain><uuid>../../etc</uuid></domain>").uuid == ""


def test_owner_of_a_port() -> None:
    port = f"<networkport><owner><uuid>{UUID}</uuid></owner></networkport>"
    data = f"<hookData><network/>{port}</hookData>"
    assert at_network(data.encode()).owner == UUID
    assert at_network(data.replace("owner", "plug").encode()).owner == ""


@pytest.mark.parametrize(
    ("inside", "six"),
    [
        ("<forward/><ip address='10.0.0.1'/>", False),
        ("<forward/><ip address='10.0.0.1'/><ip family='ipv6' address='fd00::1'/>", True),
        ("<ip address='fd00::1'/><forward/>", True),
        ("<ip family='ipv6' address='fd00::1'/>", False),
        ("<forward/><metadata><ip family='ipv6'/></metadata>", False),
    ],
)
def test_networks_that_libvirt_forwards_ipv6_for(inside: str, six: bool) -> None:
    assert at_network(f"<network>{inside}</network>".encode()).forwards6 is six


# One verdict for both looks, and for both readers of the first


TOP = "<name>a</name><uuid>{}</uuid>{}<bridge name='virbr10'/><mac address='52:54:00:00:00:01'/>{}"
IP = "<ip address='10.0.0.1' netmask='255.255.255.0'/>"
OTHER = "c0ffee00-0000-4000-8000-000000000002"
METADATA = {
    "none": "",
    "ours": f"<metadata>{NAT}</metadata>",
    "ours, default namespace": '<metadata><nat xmlns="urn:libvirt-natns:1"/></metadata>',
    "disabled": '<metadata><n:nat xmlns:n="urn:libvirt-natns:1" enabled="no"/></metadata>',
    "too deep": f"<metadata><x>{NAT}</x></metadata>",
    "prefix of another": (
        '<metadata><a:x xmlns:a="urn:libvirt-natns:1"/><a:nat xmlns:a="urn:a"/></metadata>'
    ),
    "prefix bound again": (
        '<metadata xmlns:a="urn:libvirt-natns:1"><x xmlns:a="urn:a"/>'
        '<a:nat enabled="no"/></metadata>'
    ),
    "text": "<metadata><x>a &lt;forward/&gt; &#x3c;ip&#62; <![CDATA[<forward>]]></x></metadata>",
    "comment": "<metadata><!-- <forward/> ' --><?x <forward/> ?></metadata>",
    "attribute": "<metadata><x y='<'/></metadata>".replace("<'", ">\"'"),
}
ODD = {
    "a name that expat does not know": "<x:pre\u021b xmlns:x='urn:x'>&amp;</x:pre\u021b>",
    "an unbound prefix": "<foo:bar foo:baz='1'/>",
}


def hook_data(metadata: str, more: str = "", uuid: str = UUID) -> bytes:
    inside = TOP.format(uuid, metadata, IP + more)
    return f"<hookData><network>{inside}</network></hookData>".encode()


def facts(seen: Glance) -> dict[str, object]:
    return {name: getattr(seen, name) for name in Glance.__slots__}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("odd", ODD)
def test_what_expat_refuses_is_read_the_same(name: str, odd: str) -> None:
    plain = hook_data(METADATA[name])
    fragment = f"<description>{ODD[odd]}</description>"
    strange = hook_data(METADATA[name], fragment)
    assert facts(at_network(strange)) == facts(at_network(plain))
    assert at_network(plain).whole
    guest = domain(METADATA[name])
    assert facts(at_domain(guest.replace(b"</domain>", fragment.encode() + b"</domain>"))) == facts(
        at_domain(guest)
    )


@pytest.mark.parametrize("forward", ["", "<forward mode='nat'/>"])
@pytest.mark.parametrize("address", ["", IP])
@pytest.mark.parametrize("metadata", [METADATA[each] for each in ("none", "ours", "disabled")])
@pytest.mark.parametrize("scope", ["isolated", "annotated"])
def test_the_first_look_and_the_parser_agree(
    forward: str, address: str, metadata: str, scope: Scope
) -> None:
    data = (
        f"<network><name>a</name><uuid>{UUID}</uuid>{metadata}{forward}"
        f"<bridge name='virbr10'/>{address}</network>"
    ).encode()
    try:
        expected = verdict(parse_any_network(data), Config(scope=scope)).handled
    except DocumentError:
        # It asks to be handled and cannot be.
        expected = True
    assert at_network(data).ours(scope) is expected


@pytest.mark.parametrize(
    "twice",
    [
        f"<name>a</name><uuid>{UUID}</uuid><uuid>{OTHER}</uuid>",
        f"<name>a</name><name>b</name><uuid>{UUID.upper().replace('-', '')}</uuid>",
        f"<name>a<x>b<y>c</y></x>d</name><uuid> {UUID}\n</uuid><bridge name='virbr11'/>",
        f"<bridge/><name>a</name><uuid>{UUID}</uuid><bridge name='virbr11'/>",
    ],
)
def test_of_what_stands_there_twice_both_take_the_first(twice: str) -> None:
    bridge = "" if twice.startswith("<bridge/>") else "<bridge name='virbr10'/>"
    data = f"<hookData><network>{bridge}{twice}{IP}</network></hookData>".encode()
    seen, parsed = at_network(data), parse_hook_data(data).network
    assert (seen.uuid, seen.name, seen.bridge) == (parsed.uuid, parsed.name, parsed.bridge or "")
    guest = f"<domain>{twice}</domain>".encode()
    assert (at_domain(guest).uuid, at_domain(guest).name) == (
        parse_domain_nics(guest).uuid,
        parse_domain_nics(guest).name,
    )


def test_of_two_networks_the_first_one_counts() -> None:
    second = f"<network><name>b</name><uuid>{OTHER}</uuid><forward/></network>"
    seen = at_network(hook_data("").replace(b"</hookData>", f"{second}</hookData>".encode()))
    assert (seen.name, seen.uuid, seen.forwards) == ("a", UUID, False)


@pytest.mark.parametrize("declared", ["foo", "utf-16", "latin-1"])
def test_a_declared_encoding_is_passed_over(declared: str) -> None:
    data = f'<?xml version="1.0" encoding="{declared}"?>'.encode() + hook_data("")
    assert facts(at_network(data)) == facts(at_network(hook_data("")))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<network",
        b"<domain/>",
        b"<network><name>a</nam",
        b"<network><name>\xff</name></network>",
        b'<!DOCTYPE a [<!ENTITY b "b">]><network><name>&b;</name></network>',
        b"<network></hookData>",
        b"</network><network/>",
        b"<network/><network/>",
        b"<?xml",
        b"<network><!-- ",
        b"<network x='>",
    ],
)
def test_what_cannot_be_read_may_be_ours(data: bytes) -> None:
    seen = at_network(data)
    assert not seen.whole
    assert (seen.ours("isolated"), seen.ours("annotated")) == (True, False)
    assert at_network(data + b"<x xmlns='urn:libvirt-natns:1'").ours("annotated")


def test_what_is_known_ahead_of_a_fault_holds() -> None:
    """Or the end of a network of ours would be lost."""
    data = hook_data("").replace(b"</network></hookData>", b"<a>")
    seen = at_network(data)
    assert (seen.uuid, seen.name, seen.bridge) == (UUID, "a", "virbr10")


def test_nics_of_a_guest() -> None:
    nics = (
        "<interface type='network'><source network='a' bridge='virbr1'/></interface>"
        "<interface type='bridge'><source bridge='br0'/></interface>"
        "<disk><source file='x' network='c'/></disk>"
    )
    seen = at_domain(domain(f"<devices>{nics}</devices>"))
    assert (seen.networks, seen.bridges) == (["a"], ["virbr1", "br0"])


@pytest.mark.parametrize("odd", ["", *ODD.values()])
@pytest.mark.parametrize(
    "long",
    [
        "<a>" * 50_000 + "</a>" * 50_000,
        "<a xmlns:b='c'>" * 50_000 + "</a>" * 50_000,
        "<a/>" * 100_000,
        "<!-- -->" * 100_000,
        "<a b='" + "&amp;" * 100_000 + "'/>",
        "x" * 9_000_000,
    ],
    ids=["deep", "deep, with namespaces", "many", "comments", "references", "long"],
)
def test_the_first_look_takes_no_longer_than_the_document_is_long(long: str, odd: str) -> None:
    data = hook_data(f"<metadata><x>{long}</x>{odd}</metadata>", "<forward/>")
    start = time.process_time()
    seen = at_network(data)
    taken = time.process_time() - start
    assert (seen.whole, seen.uuid, seen.forwards) == (True, UUID, True)
    assert taken < 1.5


@pytest.mark.parametrize(
    "text", ["<a " + "b" * 100_000, "<a '" * 50_000, "<" * 100_000, "<a b=" * 50_000]
)
def test_nothing_makes_it_read_again_and_again(text: str) -> None:
    start = time.process_time()
    assert not at_network(text.encode()).whole
    assert time.process_time() - start < 1.0
