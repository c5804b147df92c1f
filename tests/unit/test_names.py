# SPDX-License-Identifier: LGPL-2.1-or-later
"""Names that the kernel and file systems take, and that no two networks share."""

import configparser
import re
from pathlib import Path

import pytest

from libvirt_natns import names

UUIDS = ("c7308e5b-a296-4b40-a0cb-069d4253d364", "3786240b-0ddb-4bbe-85db-f52124a76c86")

PLAIN = ("default", "lab-1", "a", "_x", "10.0.0.0", "a+b", "x" * 64)
AWKWARD = (
    "",
    ".",
    "..",
    "-rf",
    "a b",
    "a\tb",
    "a,b",
    "A;B",
    "a/../b",
    "Büro",
    "客户网络",
    "x" * 65,
    "x" * 66,
    "nat\n",
    "${IFS}",
)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_names_stay(name: str) -> None:
    assert names.namespace(name) == f"nat-{name}"


@pytest.mark.parametrize("name", AWKWARD)
def test_other_names_become_file_names(name: str) -> None:
    assert re.fullmatch(r"nat-[A-Za-z0-9_.+-]{1,41}", names.namespace(name))
    assert names.slug(name) != name


ALTIFNAMSIZ = 127
"""Longest alternative interface name that the kernel takes, in characters."""

CHECKOUT = Path(__file__).resolve().parents[2]


def test_no_two_networks_share_a_namespace() -> None:
    assert len({names.namespace(name) for name in PLAIN + AWKWARD}) == len(PLAIN + AWKWARD)


def test_a_slug_is_no_other_networks_name() -> None:
    for name in AWKWARD:
        taken = names.namespace(name).removeprefix("nat-")
        assert names.namespace(taken) != names.namespace(name)
        # Nor is the slug of an earlier version, of a network that runs over an upgrade.
        former = names.former_namespace(name)
        assert former not in {names.namespace(each) for each in (*PLAIN, *AWKWARD)}


def test_slugs_are_readable() -> None:
    assert names.slug("Büro Süd, 2. OG").startswith("B-ro-S-d-2.-OG-")
    assert names.slug("客户网络").startswith("network-")


@pytest.mark.parametrize("name", PLAIN + AWKWARD)
def test_altnames_fit(name: str) -> None:
    for patch in ("private", "upstream"):
        assert len(names.altname(patch, name)) <= ALTIFNAMSIZ


def test_patches_fit_and_differ() -> None:
    ends = [end(uuid) for uuid in UUIDS for end in (names.private_patch, names.upstream_patch)]
    assert len(set(ends)) == 4
    assert {len(end) for end in ends} == {names.IFNAMSIZ}
    assert all(re.fullmatch(r"nat(in|up)-[0-9a-f]{9}", end) for end in ends)


@pytest.mark.parametrize("upstream", ["host", "wifi-2", "UPPER", "a.b", "x" * 64])
def test_transit_bridges_fit(upstream: str) -> None:
    assert re.fullmatch(r"natns-[a-z0-9-]{1,9}", names.transit_bridge(upstream))


def test_transit_bridge_of_the_built_in_upstream() -> None:
    assert names.transit_bridge("host") == "natns-host"


def test_macs_are_stable_local_and_unicast() -> None:
    ends = ("inner", "upstream", "private-port", "upstream-port")
    macs = [names.mac(uuid, end) for uuid in UUIDS for end in ends]
    assert macs == [names.mac(uuid, end) for uuid in UUIDS for end in ends]
    assert len(set(macs)) == len(macs)
    for mac in macs:
        first = int(mac[:2], 16)
        assert (first & 1, first & 2) == (0, 2)


def test_a_port_is_never_the_lowest_address_of_a_bridge() -> None:
    assert names.mac(UUIDS[0], "private-port").startswith("fe:")
    assert names.mac(UUIDS[0], "upstream-port").startswith("fe:")


def test_the_same_uuid_on_two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the upstream's segment, which both may be on, must tell them apart."""
    seen = []
    for machine in ("one", "two"):
        file = tmp_path / machine
        file.write_text(f"{machine}\n")
        monkeypatch.setattr(names, "MACHINE_ID", file)
        names.machine_id.cache_clear()
        seen.append((names.mac(UUIDS[0], "upstream"), names.mac(UUIDS[0], "inner")))
    names.machine_id.cache_clear()
    (upstream, inner), (other_upstream, other_inner) = seen
    assert upstream != other_upstream
    assert inner == other_inner


def test_a_machine_without_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "MACHINE_ID", tmp_path / "missing")
    names.machine_id.cache_clear()
    assert names.machine_id() == ""
    names.machine_id.cache_clear()


def test_resources_ship_with_the_package() -> None:
    """setuptools copies the files of linked directories that setup.cfg lists."""
    setup = configparser.ConfigParser()
    setup.read(CHECKOUT / "setup.cfg")
    patterns = setup["options.package_data"]["libvirt_natns"].split()
    package = CHECKOUT / "libvirt_natns"
    shipped = {file for pattern in patterns for file in package.glob(pattern)}
    for directory in ("hooks", "xml"):
        files = set((CHECKOUT / directory).iterdir())
        assert files
        assert {names.resource(f"{directory}/{file.name}").resolve() for file in files} == files
        assert {package / directory / file.name for file in files} <= shipped
