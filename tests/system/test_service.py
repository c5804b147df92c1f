# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service as hooks see it: well, gone, stuck, killed, of another version.

Whatever it is, libvirt gets its answer, and what is set up is the same.
"""

import json
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from lab import (
    ECHO_PORT,
    FastGuest,
    Libvirtd,
    Node,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    snapshot,
    spawn,
    virsh,
    wait_for,
    write_config,
)
from lab_base import Closing
from lab_domains import asked, create, destroy, domain, nic, ports, uuid_of
from lab_service import GREETING, SOCKET
from views import addresses, namespaces, refusal, settled, upstream_address

from libvirt_natns.kernel.locks import locked
from libvirt_natns.names import network_directory
from libvirt_natns.service import look

MAC = "52:54:00:00:00:05"
GUEST = "10.0.0.5"
NATNS_IP = (
    '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:ip address="10.0.0.1" prefix="24">'
    '<natns:dhcp><natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp>'
    "</natns:ip></natns:nat>"
)
KILLS = 12
SPAN = 0.4
"""Seconds after a net-start's begin within which the service is killed."""


@pytest.fixture
def upstream(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge as the upstream; no service runs yet."""
    write_config(provider.config(more="probe = 0"))
    yield provider
    remove_config()


def check_well(network: str) -> None:
    """A network whose parts all hold, its guests and the host included."""
    __tracebackhide__ = True
    assert f"nat-{network}" in namespaces()
    checked = natns("check", check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def succeeds(process: subprocess.Popen[str]) -> None:
    """Wait for a command that must do."""
    __tracebackhide__ = True
    _, error = process.communicate(timeout=90)
    assert process.returncode == 0, error


# -- well ----------------------------------------------------------------------


def test_events_of_ours_are_answered_by_the_service(service: Service, provider: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    check_well("a")
    with FastGuest("virbr10", MAC) as guest:
        guest.dhcp()
        assert guest.ping(provider.gateway)
    virsh("net-destroy", "a")
    assert namespaces() == set()
    for verb in ("prepare", "up", "down"):
        assert service.logged(f"event={verb}", "network=a", "seconds="), service.log()


def test_a_refusal_reaches_the_user_as_one_line(service: Service) -> None:
    before = settled()
    metadata = NATNS_IP.replace('prefix="24"', 'prefix="99"')
    define_network(isolated("bad", "virbr10", address=None, metadata=metadata))
    told = refusal("bad")
    assert "prefix" in told
    assert service.logged("event=refused", "name=bad"), service.log()
    assert snapshot() == before


def test_nobody_but_root_reaches_it(service: Service) -> None:
    assert stat.S_IMODE(SOCKET.stat().st_mode) == 0o600
    tried = run(
        "setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c",
        f"import socket; socket.socket(socket.AF_UNIX).connect({os.fspath(SOCKET)!r})",
        check=False,
    )  # fmt: skip
    assert "PermissionError" in tried.stderr
    # Not even over a socket that somebody opened up.
    SOCKET.chmod(0o666)
    told = run(
        "setpriv", "--reuid=65534", "--clear-groups", "/usr/bin/python3", "-c",
        "import socket; s = socket.socket(socket.AF_UNIX);"
        f"s.connect({os.fspath(SOCKET)!r}); print(s.recv(100))",
    )  # fmt: skip
    assert told.stdout.strip() == "b''"


def test_a_second_one_refuses_to_run(service: Service) -> None:
    done = natns("serve", check=False)
    assert done.returncode == 1
    assert "already" in done.stderr
    assert service.answers()


def test_a_slow_network_delays_no_other(service: Service, provider: Provider) -> None:
    for name, bridge in (("slow", "virbr10"), ("b", "virbr11")):
        define_network(isolated(name, bridge, address=None, metadata=NATNS_IP))
    # By uuid: libvirt looks for a name by locking one network after the other.
    slow, other = uuid_of("slow"), uuid_of("b")
    with locked(network_directory(slow)):
        waiting = spawn("virsh", "net-start", "--network", slow)
        wait_for(lambda: service.answering)
        virsh("net-start", "--network", other)
        with FastGuest("virbr11", MAC) as guest:
            guest.dhcp()
            assert guest.ping(provider.gateway)
        assert waiting.poll() is None
    succeeds(waiting)
    check_well("slow")


# -- gone, or somebody else ----------------------------------------------------


class Impostor(Closing):
    """Takes the service's place and says what a test wants, then hangs up."""

    def __init__(self, says: bytes, *, reads: bool = True) -> None:
        self._says, self._reads = says, reads
        self.asked = 0
        SOCKET.parent.mkdir(exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(os.fspath(SOCKET))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def down(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        SOCKET.unlink()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            self.asked += 1
            with link:
                link.sendall(self._says)
                if self._reads:
                    link.recv(1000)


@pytest.mark.parametrize(
    "says",
    [b"", b"libvirt-natns 1\n", b"libvirt-natns 1 2\n", GREETING, GREETING + b"done"],
    ids=["nothing", "another version", "another format", "no answer", "half an answer"],
)
def test_the_hook_does_the_work_where_the_service_does_not(upstream: Provider, says: bytes) -> None:
    define_network(isolated("a", "virbr10"))
    with Impostor(says) as impostor:
        virsh("net-start", "a")
        assert impostor.asked == 2
        check_well("a")
        virsh("net-destroy", "a")
        assert impostor.asked == 3
    assert namespaces() == set()


def test_a_socket_that_nobody_listens_on_is_no_hindrance(upstream: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    with Service() as dead:
        dead.kill()
    assert SOCKET.exists()
    virsh("net-start", "a")
    check_well("a")
    # The next service takes the place of the dead one, and looks after its network.
    with Service() as alive:
        virsh("net-destroy", "a")
        assert alive.logged("event=down", "network=a")
    assert not SOCKET.exists()


# -- killed --------------------------------------------------------------------


@pytest.mark.parametrize("metadata", ["", NATNS_IP], ids=["stock", "natns-ip"])
def test_killed_at_many_points_of_a_start(upstream: Provider, metadata: str) -> None:
    """Whoever was killed when: the start succeeds, and all that it needs is there."""
    before = settled()
    address = None if metadata else "10.0.0.1"
    define_network(isolated("a", "virbr10", address=address, metadata=metadata))
    resident = Service()
    for point in range(KILLS):
        resident.start()
        starting = spawn("virsh", "net-start", "a")
        time.sleep(SPAN * point / KILLS)
        resident.kill()
        succeeds(starting)
        check_well("a")
        virsh("net-destroy", "a")
        assert namespaces() == set()
    for file in (SOCKET, look.path()):
        file.unlink()
    virsh("net-undefine", "a")
    wait_for(lambda: snapshot() == before)


# -- stuck ---------------------------------------------------------------------


@contextmanager
def stuck(service: Service) -> Iterator[None]:
    """Stop the service for as long as the body lasts; clients stay in its queue."""
    service.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.signal(signal.SIGCONT)


def test_what_is_not_ours_starts_beside_a_stuck_service(service: Service) -> None:
    """Its hooks do not even ask: no start waits for an answer that does not come."""
    off = '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>'
    define_network(isolated("off", "virbr12", metadata=off))
    with stuck(service):
        virsh("net-start", "off")
        assert create(domain("plain", nic("off", MAC))).returncode == 0
        assert addresses("virbr12") == ["10.0.0.1/24"]
        assert namespaces() == set()
        destroy("plain")
        virsh("net-destroy", "off")
        assert not service.is_asked
    service.idle()
    assert not service.logged("network=off"), service.log()
    assert not service.logged("guest=plain"), service.log()


def test_what_is_ours_starts_beside_a_stuck_service(service: Service, provider: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    with stuck(service):
        virsh("net-start", "a")
        assert service.is_asked
        check_well("a")
        create(domain("web", nic("a", MAC), publishes=ports('start="8080" to="80"')))
        listed = json.loads(natns("forward", "list", "--json").stdout)
        assert "8080" in json.dumps(listed)
        destroy("web")
        virsh("net-destroy", "a")
        assert namespaces() == set()
    # It must not do late what it was never given.
    assert service.answers()
    service.idle()
    assert namespaces() == set()
    assert not service.logged("event=up", "network=a"), service.log()


# -- restarted -----------------------------------------------------------------


def test_connections_outlive_the_service_and_libvirtd(
    service: Service, provider: Provider, libvirtd: Libvirtd
) -> None:
    """One TCP stream runs through the service's restart, its death, sync and libvirtd's restart."""
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    inode = Path("/run/netns/nat-a").stat().st_ino
    with FastGuest("virbr10", MAC) as guest:
        guest.dhcp()
        with guest.connect(provider.gateway, ECHO_PORT) as stream:
            stream.settimeout(5)
            stream.recv(100)

            def flows(word: bytes) -> None:
                stream.sendall(word)
                assert stream.recv(100) == word

            flows(b"before")
            service.stop()
            flows(b"without it")
            service.start()
            flows(b"with the next")
            service.kill()
            natns("sync")
            flows(b"after sync")
            service.start()
            libvirtd.restart()
            wait_for(lambda: service.logged("event=reconciled"))
            service.idle()
            flows(b"after libvirtd's restart")
            define_network(isolated("b", "virbr11"))
            virsh("net-start", "b")
            flows(b"beside another network")
    check_well("a")
    assert Path("/run/netns/nat-a").stat().st_ino == inode


def test_events_in_progress_are_answered_before_it_ends(service: Service) -> None:
    define_network(isolated("a", "virbr10", address=None, metadata=NATNS_IP))
    with locked(network_directory(uuid_of("a"))):
        starting = spawn("virsh", "net-start", "a")
        wait_for(lambda: service.answering)
        service.signal(signal.SIGTERM)
        time.sleep(0.2)
    succeeds(starting)
    wait_for(lambda: not service.runs)
    check_well("a")
    assert service.logged("event=prepare", "network=a"), service.log()


# -- others on the machine -----------------------------------------------------


def test_nobody_else_can_hold_a_lock(service: Service) -> None:
    """Whoever could open the directories could lock them, and stop all networks from starting."""
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    directories = [Path("/run/libvirt-natns"), network_directory(uuid_of("a"))]
    for directory in (*directories, directories[1].parent):
        tried = run(
            "setpriv", "--reuid=65534", "--clear-groups", "flock", "-n", "-x",
            os.fspath(directory), "true", check=False,
        )  # fmt: skip
        assert tried.returncode != 0, directory
        assert "Permission denied" in tried.stderr
    # dnsmasq still reads its hosts, as whoever it has become.
    virsh("net-update", "a", "add", "ip-dhcp-host", f"<host mac='{MAC}' ip='{GUEST}'/>", "--live")
    with FastGuest("virbr10", MAC) as guest:
        assert guest.dhcp()["ip"] == GUEST


# -- addresses -----------------------------------------------------------------


ARP_REQUEST, ARP_REPLY = 1, 2


@contextmanager
def answering_late(node: Node, address: str, delay: float) -> Iterator[None]:
    """Have a machine answer for an address ``delay`` seconds after it was asked for it."""
    mac, wanted = bytes.fromhex(node.mac.replace(":", "")), IPv4Address(address).packed
    over = threading.Event()

    def answer() -> None:
        while not over.is_set():
            try:
                frame = packet.recv(2048)
            except TimeoutError:
                continue
            if frame[12:14] != b"\x08\x06" or frame[21] != ARP_REQUEST or frame[38:42] != wanted:
                continue
            asker = frame[6:12]
            time.sleep(delay)
            head = asker + mac + frame[12:20] + bytes([0, ARP_REPLY])
            packet.send(head + mac + wanted + asker + frame[28:32])

    with node.packet_socket(timeout=0.1) as packet:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(5)


def test_an_address_that_is_claimed_late_is_given_up(service: Service, provider: Provider) -> None:
    """A machine that answers too late for `start` to wait for it keeps its address."""
    forward = '<natns:portForward guestAddress="10.0.0.5"><natns:range start="8080" to="7"/>'
    metadata = (
        f'<natns:nat xmlns:natns="urn:libvirt-natns:1">{forward}</natns:portForward></natns:nat>'
    )
    define_network(isolated("a", "virbr10", metadata=metadata))
    virsh("net-start", "a")
    first = upstream_address("a")
    virsh("net-destroy", "a")
    sleepy = provider.neighbour("sleepy", "192.168.0.60/24")
    with answering_late(sleepy, first, 0.05):
        virsh("net-start", "a")
        # For a moment it has none.
        wait_for(lambda: addresses("upstream", "nat-a") not in ([], [f"{first}/24"]), timeout=10)
        wait_for(lambda: natns("check", check=False).returncode == 0, timeout=10)
    second = upstream_address("a")
    assert service.logged("event=relocate", "network=a", first, second), service.log()
    with FastGuest("virbr10", MAC) as guest:
        guest.static(f"{GUEST}/24", "10.0.0.1")
        guest.serve("tcp", ECHO_PORT)
        wait_for(lambda: asked(sleepy.name, "tcp", second, 8080) is not None)
        assert asked(sleepy.name, "tcp", first, 8080) is None
