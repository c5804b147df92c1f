# SPDX-License-Identifier: LGPL-2.1-or-later
"""The same machine after a reboot, beside other programs for firewalls and resolvers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import FastGuest, run, virsh, wait_for
from lab_hosts_resolvers import RESOLV_CONF, dns, resolves, write_resolvers
from lab_machine import (
    BOX_PORT,
    LAB_PORT,
    LONG,
    NIC,
    OUTSIDE,
    PUBLIC,
    PUBLIC_PORT,
    SERVICE,
    assert_nothing_wrong,
    box_answers,
    guest_in,
    healthy,
    install,
    is_active,
    passes,
    running,
    settled,
    start,
    stream,
    systemctl,
    virt_natns,
)
from lab_vps import GATEWAY

BRIDGE_NF = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
SECOND = "198.51.100.53"
"""Another DNS server outside, beside GATEWAY."""


def test_networks_and_domain_started_with_the_machine() -> None:
    wait_for(lambda: healthy("lab", "twin"), LONG, "networks to be up", 1.0)
    assert virsh("domstate", "box").stdout.strip() == "running"
    wait_for(box_answers, LONG, f"port {BOX_PORT} to answer", 1.0)
    virsh("suspend", "box")


def test_the_unconfirmed_router_is_rolled_back() -> None:
    assert Path("/sys/class/net", NIC).exists()
    assert "natns-router-wan" not in run("ip", "netns").stdout
    assert "wan: up" not in virt_natns("router", "status", check=False).stdout


def test_packets_pass_as_before(guest: FastGuest) -> None:
    passes(guest)


def test_nftables_restarted(guest: FastGuest) -> None:
    with stream(LAB_PORT):
        systemctl("restart", "nftables.service")
        passes(guest)
        settled("lab", "twin")
    systemctl("stop", "nftables.service")
    settled("lab", "twin")
    passes(guest)


def test_firewalld_starts_reloads_and_ends(guest: FastGuest) -> None:
    with running("firewalld.service"):
        passes(guest)
        settled("lab", "twin")
        run("firewall-cmd", "--reload")
        passes(guest)
        settled("lab", "twin")
    passes(guest)
    settled("lab", "twin")


def test_ufw_is_enabled_and_disabled(guest: FastGuest) -> None:
    run("ufw", "--force", "enable")
    try:
        passes(guest)
    finally:
        run("ufw", "disable")
    passes(guest)
    settled("lab", "twin")


def test_docker_drops_what_is_not_its_own(guest: FastGuest) -> None:
    with running("docker.service"):
        run("modprobe", "br_netfilter")
        BRIDGE_NF.write_text("1")
        assert "-P FORWARD DROP" in run("iptables", "-S", "FORWARD").stdout
        passes(guest)
        settled("lab", "twin")
    BRIDGE_NF.write_text("0")
    systemctl("stop", "docker.socket", "containerd.service")
    run("iptables", "-P", "FORWARD", "ACCEPT")
    run("ip", "link", "del", "docker0")
    settled("lab", "twin")


@contextmanager
def two_servers() -> Iterator[None]:
    """DNS servers at GATEWAY and SECOND that answer all names with different addresses."""
    run("ip", "-n", OUTSIDE, "address", "add", f"{SECOND}/32", "dev", "lo")
    with (
        dns(OUTSIDE, "192.0.2.1", address=GATEWAY),
        dns(OUTSIDE, "192.0.2.2", address=SECOND),
    ):
        yield
    run("ip", "-n", OUTSIDE, "address", "del", f"{SECOND}/32", "dev", "lo")


def asks(guest: FastGuest, answer: str) -> None:
    """Wait until a guest is answered by the server that answers so."""
    names = (f"name{number}.example.test" for number in range(10_000))
    wait_for(lambda: resolves(guest, next(names), answer), LONG, f"{answer} as the answer", 0.5)


def test_systemd_resolved_changes_its_servers(guest: FastGuest) -> None:
    with two_servers():
        asks(guest, "192.0.2.1")
        with running("systemd-resolved.service"):
            run("resolvectl", "dns", NIC, SECOND)
            run("resolvectl", "domain", NIC, "~.")
            RESOLV_CONF.unlink()
            RESOLV_CONF.symlink_to("/run/systemd/resolve/stub-resolv.conf")
            asks(guest, "192.0.2.2")
            run("resolvectl", "dns", NIC, GATEWAY)
            asks(guest, "192.0.2.1")
            RESOLV_CONF.unlink()
            write_resolvers(GATEWAY)
        asks(guest, "192.0.2.1")
        settled("lab", "twin")


def test_an_upgrade_under_a_stream(guest: FastGuest) -> None:
    with stream(LAB_PORT):
        install()
        assert is_active(SERVICE)
    passes(guest)
    settled("lab", "twin")


def test_a_router_with_a_network_of_its_own(guest: FastGuest) -> None:
    virt_natns("router", "up", "wan")
    systemctl("enable", "libvirt-natns-router@wan.service")
    passes(guest)
    start(PUBLIC)
    with guest_in("virbr12", "inpublic") as public:
        passes(public, PUBLIC_PORT)
    settled("lab", "twin", "public")


def test_nothing_went_wrong() -> None:
    assert_nothing_wrong()
