# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first look at a domain: does it concern us, and which is it."""

import pytest

from libvirt_natns.glance import at_domain, at_network

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
