# SPDX-License-Identifier: LGPL-2.1-or-later
"""The client identifiers that DHCP clients of the host leave in their files."""

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from libvirt_natns.daemons import dhclient_files, host_dhcp
from libvirt_natns.daemons.host_dhcp import HostClient, LeasedNic
from libvirt_natns.kernel import processes

NIC = LeasedNic("ens3", 2, "52:54:00:00:03:10", IPv4Address("198.51.100.10"))
DUID = "ff00000310000100012b4f1c52540000"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file system, and no program of the host."""
    for name in ("NETWORKD", "NETWORK_MANAGER", "DHCPCD", "DHCPCD_CONFIGURATION"):
        moved = tmp_path / getattr(host_dhcp, name).relative_to("/")
        monkeypatch.setattr(host_dhcp, name, moved)
    duids = tuple(tmp_path / each.relative_to("/") for each in host_dhcp.DHCPCD_DUIDS)
    monkeypatch.setattr(host_dhcp, "DHCPCD_DUIDS", duids)
    leases = tuple((f"{tmp_path}{directory}", names) for directory, names in dhclient_files.LEASES)
    monkeypatch.setattr(dhclient_files, "LEASES", leases)
    names = tuple(f"{tmp_path}{name}" for name in dhclient_files.CONFIGURATIONS)
    monkeypatch.setattr(dhclient_files, "CONFIGURATIONS", names)
    monkeypatch.setattr(processes, "with_word", lambda _: [])
    return tmp_path


def write(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_no_client_is_known() -> None:
    assert host_dhcp.holder(NIC) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"ADDRESS={NIC.address}\nCLIENTID={DUID}\n", HostClient("systemd-networkd", DUID)),
        (f"ADDRESS={NIC.address}\n", HostClient("systemd-networkd", None)),
        (f"ADDRESS={NIC.address}\nCLIENTID=../..\n", HostClient("systemd-networkd", None)),
        (f"ADDRESS=198.51.100.9\nCLIENTID={DUID}\n", None),
    ],
)
def test_networkd(text: str, expected: HostClient | None) -> None:
    write(host_dhcp.NETWORKD / "2", f"# This is private data. Do not parse.\n{text}")
    assert host_dhcp.holder(NIC) == expected


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("01:52:54:00:00:03:10", "01525400000310"),
        ("FF:00:00:03:10:00:02", "ff000003100002"),
        ("", None),
    ],
)
def test_network_manager(
    said: str, expected: str | None, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(host_dhcp.NETWORK_MANAGER / "2", "[device]\nmanaged=true\nconnection-uuid=1-2\n")
    option = f"DHCP4.OPTION[1]:dhcp_client_identifier = {said}\n" if said else ""
    write(root / "bin/nmcli", f"#!/bin/sh\nprintf '%s' '{option}'\n"
          f"echo 'DHCP4.OPTION[2]:ip_address = {NIC.address}'\n")  # fmt: skip
    (root / "bin/nmcli").chmod(0o755)
    monkeypatch.setattr(processes, "PATH", f"{root}/bin")
    assert host_dhcp.holder(NIC) == HostClient("NetworkManager", expected)


def message(*options: bytes) -> bytes:
    """A DHCP message, as dhcpcd keeps the server's answer."""
    fixed = bytes(16) + NIC.address.packed
    return fixed + bytes(240 - len(fixed)) + b"".join(options) + b"\xff"


@pytest.mark.parametrize(
    ("options", "configuration", "duid", "expected"),
    [
        ((b"\x35\x01\x05", b"\0", b"\x3d\x07\x01RT\0\0\x03\x10"), "", "", "01525400000310"),
        ((), "# comment\nduid\n", "00:01:00:01:2b:4f", "ff00000310000100012b4f"),
        ((), "duid\n", "", None),
        ((), "clientid\n", "", "01525400000310"),
        ((), "clientid 00:61:62\n", "", "006162"),
        ((), "hostname\n", "", ""),
        ((b"\x35",), "", "", ""),
    ],
)
def test_dhcpcd(
    options: tuple[bytes, ...], configuration: str, duid: str, expected: str | None
) -> None:
    write(host_dhcp.DHCPCD / "ens3.lease", message(*options))
    write(host_dhcp.DHCPCD_CONFIGURATION, configuration)
    if duid:
        write(host_dhcp.DHCPCD_DUIDS[0], f"{duid}\n")
    assert host_dhcp.holder(NIC) == HostClient("dhcpcd", expected)


LEASE = """\
default-duid "\\000\\001\\000\\001+O\\034RT\\000\\000";
lease {{
  interface "{nic}";
  fixed-address {address};
  option subnet-mask 255.255.255.0;
  {more}
  renew 1 2026/11/30 10:00:00;
}}
"""


@pytest.mark.parametrize(
    ("returned", "configuration", "with_duid", "expected"),
    [
        ("option dhcp-client-identifier 1:52:54:0:0:3:10;", "", False, "01525400000310"),
        ('option dhcp-client-identifier "a;\\"b";', "", False, "613b2262"),
        ("", "send dhcp-client-identifier = hardware;", False, "01525400000310"),
        ("", "#send dhcp-client-identifier 1:2:3;\n", False, ""),
        ("", 'interface "ens4" { send dhcp-client-identifier 1:2:3; }\n', False, ""),
        (
            "",
            "send dhcp-client-identifier 1:2:3;\n"
            'interface "ens3" {\n  media "a" { }\n  send dhcp-client-identifier 4:5:6;\n}\n',
            False,
            "040506",
        ),
        ("", 'send dhcp-client-identifier "\\000abc";', False, "00616263"),
        ("", "send dhcp-client-identifier = concat(00:01, hardware);", True, None),
        ("", "", True, DUID[:26] + "52540000"[:6]),
    ],
)
def test_dhclient(
    returned: str,
    configuration: str,
    with_duid: bool,
    expected: str | None,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = LEASE.format(nic="ens3", address=NIC.address, more=returned)
    write(root / "var/lib/dhcp/dhclient.ens3.leases", text)
    write(root / "etc/dhcp/dhclient.conf", configuration)
    if with_duid:
        monkeypatch.setattr(processes, "with_word", lambda _: [7])
        monkeypatch.setattr(processes, "command", lambda _: ["/sbin/dhclient", "-i", "ens3"])
    if expected and expected.startswith("ff"):
        expected = "ff00000310" + "000100012b4f1c52540000"
    assert host_dhcp.holder(NIC) == HostClient("dhclient", expected)


def test_a_lease_of_another_nic_or_address(root: Path) -> None:
    for nic, address in (("ens4", NIC.address), ("ens3", "198.51.100.9")):
        text = LEASE.format(nic=nic, address=address, more="")
        write(root / "var/lib/dhcp/dhclient.leases", text)
        assert host_dhcp.holder(NIC) is None
