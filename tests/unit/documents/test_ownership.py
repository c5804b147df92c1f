# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which failures may stop a start: those of what is ours, as far as anything can tell."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.documents import config, ownership
from libvirt_natns.documents.xml_sniff import Glance, at_domain, at_network
from libvirt_natns.errors import ConfigError
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.model.configuration import Config
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

UUID = "c0ffee00-0000-4000-8000-000000000001"
IP = "<ip address='10.0.0.1' netmask='255.255.255.0'/>"
NAT = '<metadata><natns:nat xmlns:natns="urn:libvirt-natns:1"{}/></metadata>'
ENABLED, DISABLED = NAT.format(""), NAT.format(' enabled="no"')
CONFIG_FILE = names.CONFIG_FILE
TYPO = 'scope = "isolated"\nupstream = host\n'


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All that is looked at, below a directory of the test's own."""
    for name in ("CONFIG_FILE", "DATABASE", "NETWORKS", "NAMESPACES", "LINKS"):
        file = Path(getattr(ownership, name)).name
        monkeypatch.setattr(ownership, name, str(tmp_path / file))
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "config.toml")
    return tmp_path


def test_the_places_are_those_of_the_rest() -> None:
    import importlib

    fresh = importlib.reload(ownership)
    assert Path(fresh.CONFIG_FILE) == CONFIG_FILE
    assert Path(fresh.DATABASE) == names.STATE_DIRECTORY / "state.db"
    assert Path(fresh.NETWORKS) == names.network_directory("").parent / "networks"
    assert Path(fresh.NAMESPACES) == names.NETNS_DIRECTORY


# The scope


@pytest.mark.parametrize(
    "text",
    [
        "",
        'scope = "annotated"',
        "scope='annotated'",
        '  "scope"\t= "annotated" # all others are left alone',
        'upstream = "p"\nscope = "annotated"\n[upstreams.p]\nkind = "host"\n',
        'scope = "isolated"',
        '# scope = "annotated"',
        'upstreams.p.pool = [\n"10.0.0.1"\n]\nupstreams.p.kind = "bridge"\n'
        'upstreams.p.bridge = "br0"\nupstreams.p.subnet = "10.0.0.0/24"\nscope = "annotated"\n',
        'scope = "annotated"\r\nupstream = "host"\r\n',
    ],
)
def test_the_scope_is_what_the_configuration_says(text: str, places: Path) -> None:
    (places / "config.toml").write_bytes(text.encode())
    assert ownership.scope() == config.load(places / "config.toml").scope


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ('scope = "annotated"\nupstream = host\n', "annotated"),
        ('scope = "annotated"\n\xff\xfe', "annotated"),
        ('scope = "annotaded"\n', "isolated"),
        ('[upstreams.p]\nscope = "annotated"\n', "isolated"),
        ('scope "annotated"\n', "isolated"),
        # What the configuration itself understands is left to it.
        ('scope = "\\u0061nnotated"\n', "isolated"),
    ],
)
def test_the_scope_is_read_leniently(text: str, scope: str, places: Path) -> None:
    (places / "config.toml").write_bytes(text.encode("latin-1"))
    assert ownership.scope() == scope


def test_no_configuration_is_scope_isolated() -> None:
    assert ownership.scope() == Config().scope


# Networks


def network(inside: str) -> Glance:
    return at_network(f"<network><uuid>{UUID}</uuid>{inside}</network>".encode())


@pytest.mark.parametrize(
    ("inside", "isolated", "annotated", "broken"),
    [
        (IP, True, False, False),
        (IP + ENABLED, True, True, True),
        (ENABLED, True, True, True),
        (IP + DISABLED, False, False, False),
        (IP + ENABLED + "<forward mode='nat'/>", False, False, False),
        ("", False, False, False),
    ],
)
def test_networks(inside: str, isolated: bool, annotated: bool, broken: bool, places: Path) -> None:
    seen = network(inside)
    assert ownership.of_network(seen) is isolated
    file = places / "config.toml"
    file.write_text('scope = "annotated"\n')
    assert ownership.of_network(seen) is annotated
    file.write_text('scope = "annotated"\nupstream = host\n')
    assert ownership.of_network(seen) is annotated
    file.write_text(TYPO)
    with pytest.raises(ConfigError):
        config.load(file)
    assert ownership.of_network(seen) is broken


def test_a_network_that_was_handled_stays_ours_with_a_broken_configuration(places: Path) -> None:
    (places / "config.toml").write_text(TYPO)
    seen = network(IP)
    assert not ownership.of_network(seen)
    store = Store(places)
    store.networks.put(
        NetworkRecord(
            uuid=UUID, name="a", namespace="nat-a", bridge="virbr1", upstream="host", kind="host",
            subnets=(), taken_over=True, state="down", boot=boot_id(), since=now(), document=b"",
        )
    )  # fmt: skip
    assert ownership.of_network(seen)
    # Of a version to come.
    store.close()
    with closing(sqlite3.connect(places / "state.db")) as database:
        database.execute("PRAGMA user_version = 99")
    assert ownership.of_network(seen)
    assert not ownership.was_handled(UUID.replace("c0ffee", "decade"))
    (places / "state.db").write_bytes(b"no database" * 1000)
    assert not ownership.of_network(seen)
    (places / "networks" / UUID).mkdir(parents=True)
    assert ownership.of_network(seen)


def test_asking_makes_no_database(places: Path) -> None:
    assert not ownership.was_handled(UUID)
    assert not ownership.was_handled("")
    assert not (places / "state.db").exists()


# Guests


def guest(*sources: str) -> Glance:
    nics = "".join(f"<interface><source {source}/></interface>" for source in sources)
    return at_domain(f"<domain><devices>{nics}</devices></domain>".encode())


def test_a_guest_is_ours_by_its_networks_namespace(places: Path) -> None:
    (places / "netns").mkdir()
    assert not ownership.of_guest(guest("network='a'", "network='my lab'"))
    (places / "netns" / names.namespace("my lab")).touch()
    assert ownership.of_guest(guest("network='a'", "network='my lab'"))
    assert not ownership.of_guest(guest("network='default'"))
    assert not ownership.of_guest(guest())


def test_a_guest_is_ours_by_its_bridges_patch(places: Path) -> None:
    ports = places / "net" / "virbr10" / "brif"
    ports.mkdir(parents=True)
    (ports / "vnet0").touch()
    seen = guest("bridge='br0'", "bridge='virbr10'")
    assert not ownership.of_guest(seen)
    (ports / names.private_patch(UUID)).touch()
    assert ownership.of_guest(seen)
    assert not ownership.of_guest(guest("bridge='../net/virbr10'"))
