# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an administrator sees of the service: status, doctor, metrics; and its unit's limits."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    PYTHON,
    CommandError,
    FastGuest,
    Host,
    Provider,
    Service,
    forward_at_once,
    install_natns,
    isolated,
    natns,
    run,
    spawn,
    start_network,
    uninstall_natns,
    virsh,
    wait_for,
    write_config,
)
from lab_base import end
from lab_service import SOCKET

MAC = "52:54:00:00:00:05"
NETWORK = isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")])
UNITS = CHECKOUT / "contrib" / "systemd"
UNDO = "ip -n nat-a route del default 2>/dev/null"
UNTAKEN = '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:upstream name="gone"/></natns:nat>'


class Metrics:
    """All metrics at one moment, by calling: None for one that is not there."""

    def __init__(self) -> None:
        self.text = natns("metrics").stdout

    def __call__(self, name: str, **labels: str) -> float | None:
        for line in self.text.splitlines():
            match = re.fullmatch(rf"libvirt_natns_{name}(?:{{(.*)}})? (\S+)", line)
            if match and dict(re.findall(r'(\w+)="([^"]*)"', match[1] or "")) == labels:
                return float(match[2])
        return None


def dnsmasq() -> int:
    """The process id of the network's dnsmasq."""
    (file,) = Path("/run/libvirt-natns/networks").glob("*/dnsmasq.pid")
    return int(file.read_text())


@pytest.fixture
def guest(installed: None) -> Iterator[FastGuest]:
    """A guest in the network a, which is up, on the default upstream."""
    start_network(NETWORK)
    forward_at_once("virbr10")
    with FastGuest("virbr10", MAC) as guest:
        yield guest


@pytest.fixture
def alone(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge as the default upstream, and no service."""
    write_config(provider.config(more="probe = 0"))
    yield provider


# -- without a service ---------------------------------------------------------


def test_metrics_without_a_service(alone: Provider, guest: FastGuest) -> None:
    metric = Metrics()
    assert metric.text.startswith("# The service does not answer: ")
    assert metric("networks", state="up") == 1
    assert metric("pool_used_addresses", upstream="provider", kind="ipv4") == 1
    assert metric("dhcp_leases", network="a") == 0
    assert metric("dnsmasq_running", network="a") == 1
    limit = Path("/proc/sys/net/netfilter/nf_conntrack_max").read_text()
    assert metric("conntrack_entries_limit", network="a") == float(limit)
    guest.dhcp()
    assert guest.curl(f"http://{alone.gateway}/").startswith("192.168.0.1")
    os.kill(dnsmasq(), signal.SIGKILL)
    metric = Metrics()
    assert metric("dhcp_leases", network="a") == 1
    assert (metric("conntrack_entries", network="a") or 0) >= 1
    assert metric("dnsmasq_running", network="a") == 0
    virsh("net-destroy", "a")
    metric = Metrics()
    assert metric("networks", state="up") == 0
    assert metric("dnsmasq_running", network="a") is None
    assert metric("pool_used_addresses", upstream="provider", kind="ipv4") == 0
    assert (metric("pool_leased_addresses", upstream="provider", kind="ipv4") or 0) >= 1


def test_status_and_doctor_without_a_service(alone: Provider) -> None:
    assert natns("status").stdout.endswith("service: not running: hooks do the work themselves\n")
    said = "ok      service: not running: hooks do the work themselves\n"
    assert said in natns("doctor").stdout


# -- with one ------------------------------------------------------------------


def test_status_and_doctor_with_a_service(service: Service) -> None:
    running = rf"service: running \(pid {service.pid}, version \S+, since [-\d]+ [:\d]+\)\n"
    assert re.search(rf"{running}\Z", natns("status").stdout)
    assert re.search(rf"ok +{running}", natns("doctor").stdout)
    assert f'"pid": {service.pid}' in natns("status", "--json").stdout
    SOCKET.chmod(0o666)
    told = natns("doctor", check=False)
    assert told.returncode == 1
    assert f"broken  service: {SOCKET} has owner 0 and mode" in told.stdout
    SOCKET.chmod(0o600)
    service.signal(signal.SIGSTOP)
    assert "service: does not answer: hooks do the work themselves\n" in natns("status").stdout
    assert natns("doctor", check=False).returncode == 1
    service.signal(signal.SIGCONT)
    service.kill()
    # Its socket is still there.
    assert SOCKET.is_socket()
    assert "service: not running: hooks" in natns("status").stdout
    service.start()
    assert re.search(rf"service: running \(pid {service.pid}, ", natns("status").stdout)


def test_metrics_of_a_service(service: Service, guest: FastGuest) -> None:
    hooks = {"hook": "network", "outcome": "done"}
    refused = {"hook": "network", "operation": "start", "outcome": "refused"}
    metric = Metrics()
    for operation in ("start", "started"):
        assert metric("hook_duration_seconds_count", **hooks, operation=operation) == 1
    assert metric("networks", state="up") == 1
    assert metric("networks_given_up") == 0
    assert metric("hook_duration_seconds_count", **refused) is None
    heals = metric("heal_duration_seconds_count") or 0
    # It compares everything when it has connected to libvirt, and would find it so.
    service.idle()
    marked = len(service.log())
    os.kill(dnsmasq(), signal.SIGKILL)
    wait_for(lambda: service.logged("event=healed", "dnsmasq of nat-a", since=marked), timeout=20)
    with pytest.raises(CommandError, match="there is no upstream gone"):
        start_network(isolated("b", "virbr11", metadata=UNTAKEN))
    metric = Metrics()
    assert (metric("heal_duration_seconds_count") or 0) > heals
    assert metric("dnsmasq_running", network="a") == 1
    assert metric("hook_duration_seconds_count", **refused) == 1
    (memory,) = re.findall(r"(?m)^process_resident_memory_bytes (\S+)$", metric.text)
    pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
    assert float(memory) == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.1)


def test_what_is_given_up_is_seen(service: Service, guest: FastGuest) -> None:
    marked = len(service.log())
    fighter = spawn("sh", "-c", f"while sleep 0.1; do {UNDO}; done")
    try:
        wait_for(lambda: service.logged('"given up" network=a', since=marked), timeout=60)
        assert re.search(r"(?m)^a .* given up \(.*default", natns("status").stdout)
        assert Metrics()("networks_given_up") == 1
        told = natns("doctor", check=False)
        assert told.returncode == 1
        assert "broken  service: the service has given up healing (" in told.stdout
    finally:
        end(fighter)
    virsh("net-destroy", "a")
    virsh("net-start", "a")
    assert re.search(r"(?m)^a .* ok$", natns("status").stdout)
    assert Metrics()("networks_given_up") == 0


def test_uninstall_ends_the_service(service: Service) -> None:
    assert f"ended the service (pid {service.pid})\n" in uninstall_natns().stdout
    assert not service.runs
    install_natns()


def test_the_timer_writes_a_whole_file(service: Service, tmp_path: Path) -> None:
    unit = (UNITS / "libvirt-natns-metrics.service").read_text()
    script = re.search(r"(?m)^ExecStart=/bin/sh -c '(.*)'$", unit)
    assert script
    command = script[1].replace("virt-natns metrics", f"{PYTHON} -m libvirt_natns metrics")
    file = tmp_path / "x.prom"
    environment = {"FILE": os.fspath(file), "PYTHONPATH": os.fspath(CHECKOUT)}
    run("sh", "-c", command, env=environment)
    assert "\nlibvirt_natns_networks_given_up 0.0\n" in file.read_text()
    # What cannot be had replaces nothing.
    kept = file.read_text()
    run("sh", "-c", command.replace(" metrics ", " no-such "), env=environment, check=False)
    assert file.read_text() == kept


# -- the unit ------------------------------------------------------------------


def confined() -> list[str]:
    """The command that limits another one to what the unit leaves to the service."""
    unit = (UNITS / "libvirt-natns.service").read_text()
    lines = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", unit)
    names = [word.removeprefix("CAP_").lower() for line in lines for word in line.split()]
    bounding = ",".join(["-all", *(f"+{name}" for name in names)])
    return ["setpriv", f"--bounding-set={bounding}", "--inh-caps=-all"]


def test_the_units_capabilities_suffice(installed: None, provider: Provider, backend: str) -> None:
    with Service(*confined()) as service:
        marked = len(service.log())
        start_network(NETWORK)
        forward_at_once("virbr10")
        # It was not the hook itself.
        assert service.logged("event=up", "network=a", since=marked)
        with FastGuest("virbr10", MAC) as guest:
            guest.dhcp()
            assert guest.curl(f"http://{provider.gateway}/").startswith("192.168.0.1")
            # It sees, ends and starts processes of another user.
            wait_for(lambda: service.logged("event=reconciled", since=marked), timeout=20)
            service.idle()
            os.kill(before := dnsmasq(), signal.SIGKILL)
            wait_for(lambda: service.logged("=healed", "dnsmasq of", since=marked), timeout=20)
            assert (after := dnsmasq()) != before
            service.stop()
            # What it has started outlives it.
            assert dnsmasq() == after
            assert guest.dhcp()["ip"] == "10.0.0.5"
            service.start()
            assert natns("check").stdout == ""
        virsh("net-destroy", "a")
        assert "nat-a" not in run("ip", "netns", "list").stdout
        assert not service.logged("level=error", since=marked)
