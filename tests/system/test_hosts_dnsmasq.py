# SPDX-License-Identifier: LGPL-2.1-or-later
"""dnsmasq's own options in a network's XML: where they have it listen."""

import socket
import struct
from contextlib import ExitStack

import pytest
from lab import FastGuest, Node, Provider, Service, isolated, natns, run, virsh, write_config
from lab_boundary import guest_on
from lab_domains import networks

XMLNS = "xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'"
PXE = ('pxe-service=x86PC,"Boot","boot/pxelinux"', 'pxe-prompt="Boot",1')
BOOT_ITEM = 32768
"""The type of the first <pxe-service> with a file."""

pytestmark = pytest.mark.usefixtures("installed")


def with_options(xml: str, *options: str) -> str:
    inside = "".join(f"<dnsmasq:option value='{option}'/>" for option in options)
    whole = f"<dnsmasq:options>{inside}</dnsmasq:options></network>"
    return xml.replace("<network>", f"<network {XMLNS}>").replace("</network>", whole)


def boot_request(address: str, mac: bytes) -> bytes:
    """What firmware asks a boot server for, when its menu's first entry was chosen."""
    head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x1234, 0, 0)
    head += socket.inet_aton(address) + bytes(12) + mac + bytes(10 + 64 + 128)
    vendor = b"PXEClient:Arch:00000:UNDI:002001"
    item = bytes([71, 4]) + struct.pack("!HH", BOOT_ITEM, 0)
    options = {53: b"\x03", 60: vendor, 93: bytes(2), 43: item + b"\xff"}
    listed = b"".join(bytes([kind, len(value)]) + value for kind, value in options.items())
    return head + b"\x63\x82\x53\x63" + listed + b"\xff"


def booted(guest: Node, address: str, port: int = 4011) -> str:
    """The boot file that a network's boot server names; raises OSError without an answer."""
    with guest.open_socket("udp", 68) as asking:
        asking.connect(("10.0.0.1", port))
        asking.send(boot_request(address, bytes(6)))
        return asking.recv(2000)[108:236].rstrip(b"\0").decode()


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_a_boot_server_answers_firmware(firewall: str, provider: Provider) -> None:
    write_config(provider.config(firewall=firewall, more="probe = 0"))
    with ExitStack() as stack:
        stack.enter_context(networks(with_options(isolated("a", "virbr10"), *PXE)))
        guest = guest_on(stack, "guest", "virbr10", "10.0.0.5")
        assert booted(guest, "10.0.0.5") == "boot/pxelinux.0"
        assert natns("check").stdout == ""


def test_other_ports_of_dhcp_and_dns(provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    with ExitStack() as stack:
        document = with_options(isolated("a", "virbr10"), "dhcp-alternate-port=6767", "port=5353")
        stack.enter_context(networks(document))
        guest = guest_on(stack, "guest", "virbr10", "10.0.0.5")
        assert guest.dig("www.example.test", "-p", "5353", server="10.0.0.1")


@pytest.mark.parametrize(
    ("served", "option"),
    [(True, "listen-address=10.0.0.1"), (False, "interface=virbr*")],
    ids=["service", "hooks"],
)
def test_twins_that_name_their_address(served: bool, option: str, provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    names = {"a": "virbr10", "b": "virbr11", "c": "virbr12"}
    documents = [with_options(isolated(name, bridge), option) for name, bridge in names.items()]
    with ExitStack() as stack:
        if served:
            stack.enter_context(Service())
        stack.enter_context(networks(*documents))
        for name, bridge in names.items():
            guest = stack.enter_context(FastGuest(bridge, name=f"guest-{name}"))
            guest.dhcp()
            assert guest.dig("www.example.test")
        assert natns("check").stdout == ""
        virsh("net-destroy", "b")
        virsh("net-start", "b")


def test_a_dnsmasq_that_serves_the_host_as_well_is_left_alone(provider: Provider) -> None:
    """libvirt's own dnsmasq, which has an address of the host."""
    write_config(provider.config(more="probe = 0"))
    named = "<dns><host ip='10.0.0.77'><hostname>web.test</hostname></host></dns><ip "
    plain = isolated("a", "virbr10").replace("<ip ", named, 1)
    with networks(with_options(plain, "listen-address=10.0.0.1,127.0.0.1")):
        for transport in ("+notcp", "+tcp"):
            asked = run("dig", "+short", "+tries=1", transport, "@127.0.0.1", "web.test")
            assert asked.stdout.strip() == "10.0.0.77"
        assert natns("check").stdout == ""
