# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine with libvirt gets the package, and works; its daemons are killed and restarted."""

from pathlib import Path

from lab import FastGuest, run, virsh, wait_for
from lab_machine import (
    BOX_PORT,
    LAB,
    LAB_PORT,
    LIBVIRT,
    LONG,
    NIC,
    SERVICE,
    TWIN,
    TWIN_PORT,
    answers,
    assert_nothing_wrong,
    box,
    box_answers,
    guest_in,
    install,
    is_active,
    main_pid,
    passes,
    settled,
    start,
    stream,
    systemctl,
    virt_natns,
)

CONFIG = Path("/etc/libvirt-natns/config.toml")
WAN = f'''
[upstreams.wan]
kind = "router"
nic = "{NIC}"
host_ports = ["tcp/22", "tcp/{LAB_PORT}", "tcp/{BOX_PORT}"]
'''


def test_libvirt_is_confined() -> None:
    virsh("net-list", "--all", "--name")  # has systemd start it
    mode = Path("/proc", main_pid(LIBVIRT), "attr/current").read_text()
    assert mode.rstrip("\0\n").endswith("(enforce)")


def test_the_package_makes_routers_of_active_networks_at_once() -> None:
    start(LAB)
    assert "inet 10.0.0.1/24" in run("ip", "address", "show", "virbr10").stdout
    install()
    assert is_active(SERVICE)
    settled("lab")
    assert "inet 10.0.0.1/24" not in run("ip", "address", "show", "virbr10").stdout


def test_a_guest_reaches_the_outside_and_is_reached(guest: FastGuest) -> None:
    passes(guest)


def test_twins_have_the_same_addresses_at_once(guest: FastGuest) -> None:
    start(TWIN)
    settled("lab", "twin")
    with guest_in("virbr11", "intwin") as twin:
        assert (twin.mac, twin.addresses()) == (guest.mac, guest.addresses())
        passes(twin, TWIN_PORT)
        passes(guest)
    assert not answers(TWIN_PORT)


def test_a_domain_boots_fetches_and_serves() -> None:
    guest = box().start()
    virsh("autostart", "box")
    guest.wait_ready()
    assert guest.fetched == "outside"
    wait_for(box_answers, LONG, f"port {BOX_PORT} to answer")
    # Emulation in an emulated machine: even an idle guest needs most of a core.
    virsh("suspend", "box")


def test_a_killed_service_comes_back_and_nothing_notices(guest: FastGuest) -> None:
    before = main_pid(SERVICE)
    with stream(LAB_PORT) as connection:
        systemctl("kill", "--kill-whom=main", "--signal=KILL", SERVICE)
        # A hook finds no service, and does the work itself.
        virsh("net-destroy", "twin")
        virsh("net-start", "twin")
        wait_for(lambda: is_active(SERVICE) and main_pid(SERVICE) not in ("0", before), LONG)
        connection.sendall(b"still there?")
        assert connection.recv(100) == b"still there?"
    passes(guest)
    settled("lab", "twin")


def test_a_restarted_service_takes_its_networks_over(guest: FastGuest) -> None:
    with stream(LAB_PORT):
        systemctl("restart", SERVICE)
    passes(guest)
    settled("lab", "twin")


def test_restarted_libvirt_keeps_networks_and_domain(guest: FastGuest) -> None:
    with stream(LAB_PORT):
        systemctl("restart", LIBVIRT)
        virsh("net-destroy", "twin")
        virsh("net-start", "twin")
    passes(guest)
    virsh("resume", "box")
    wait_for(box_answers, LONG, f"port {BOX_PORT} to answer")
    virsh("suspend", "box")
    settled("lab", "twin")


def test_a_router_without_a_confirmation(guest: FastGuest) -> None:
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text(WAN)
    virt_natns("router", "up", "wan", "--confirm-within", "30m")
    assert not Path("/sys/class/net", NIC).exists()
    # Ports of the host's own answer as before, and lab's are among them.
    passes(guest)


def test_nothing_went_wrong() -> None:
    assert_nothing_wrong()
