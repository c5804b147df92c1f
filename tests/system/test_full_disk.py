# SPDX-License-Identifier: LGPL-2.1-or-later
"""Full file systems, and a log that takes no line.

Telling about work never fails the work.  What starts is refused where nothing can be
recorded, and leaves nothing; what runs goes on, and always ends.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    virsh,
    wait_for,
    write_config,
)
from lab_domains import create, destroy, domain, nat, networks, nic, ports, settle, unordered
from views import namespaces, refusal

MAC, OTHER = "52:54:00:00:00:05", "52:54:00:00:00:06"
DISK = Path("/run/tmp/disk")


@pytest.fixture
def upstream(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge as the upstream; no service runs yet."""
    write_config(provider.config(more="probe = 0"))
    yield provider
    remove_config()


@contextmanager
def mounted(directory: Path, options: str = "size=64k") -> Iterator[None]:
    """A small file system in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "tmpfs", "-o", options, "disk", directory)
    try:
        yield
    finally:
        run("umount", "--lazy", directory)


@contextmanager
def filled(directory: Path) -> Iterator[None]:
    """No room left in a file system."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


def works(provider: Provider) -> None:
    """A network starts, serves its guests, is as it should be, and ends."""
    virsh("net-start", "a")
    assert "nat-a" in namespaces()
    with FastGuest("virbr10", MAC) as guest:
        guest.dhcp()
        assert guest.ping(provider.gateway)
    checked = natns("check", check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    virsh("net-destroy", "a")
    assert namespaces() == set()


# -- the log -------------------------------------------------------------------


def test_a_log_on_a_full_disk(upstream: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    log = DISK / "service.log"
    with mounted(DISK), ExitStack() as disk:
        disk.enter_context(filled(DISK))
        with Service(log=log):
            works(upstream)
            assert not log.read_text()
            disk.close()
            works(upstream)
            told = log.read_text().splitlines()
    assert told[0].startswith("level=warning event=lost lines="), told
    assert any("event=up network=a" in line for line in told), told


@pytest.mark.parametrize(
    "command",
    ['exec "$@" 2>&-', 'exec "$@" 2> >(exit)', 'exec "$@" <&- >&- 2>&-'],
    ids=["closed", "no reader", "all closed"],
)
def test_no_log_at_all(command: str, upstream: Provider) -> None:
    define_network(isolated("a", "virbr10"))
    with Service("bash", "-c", command, "bash") as service:
        works(upstream)
        # Healing is told of, too.
        virsh("net-start", "a")
        service.idle()
        run("ip", "-n", "nat-a", "link", "delete", "upstream")
        wait_for(lambda: natns("check", check=False).returncode == 0, timeout=20, what="healing")
        virsh("net-destroy", "a")
        assert service.runs
        streams = [os.fspath(Path(f"/proc/{service.pid}/fd/{n}").readlink()) for n in range(3)]
        assert not any("socket:" in each or "state.db" in each for each in streams), streams


# -- what is recorded ----------------------------------------------------------


@contextmanager
def without_inodes(directory: Path) -> Iterator[None]:
    """No file more in a file system."""
    made: list[Path] = []
    with suppress(OSError):
        while True:
            file = directory / f"filler-{len(made)}"
            file.touch()
            made.append(file)
    try:
        yield
    finally:
        for file in made:
            file.unlink()


SCRIPT = re.compile(r"libvirt_leaseshelper (add|old|del)")

CASES = {
    "database": (Path("/var/lib/libvirt-natns"), "size=8m", filled),
    "run": (Path("/run/libvirt-natns"), "size=192k", filled),
    "inodes": (Path("/run/libvirt-natns"), "size=1m,nr_inodes=60", without_inodes),
}


@pytest.mark.parametrize("serve", [False, True], ids=["hooks", "service"])
@pytest.mark.parametrize("case", CASES)
def test_starts_are_refused_and_ends_succeed(case: str, serve: bool, upstream: Provider) -> None:
    directory, options, fill = CASES[case]
    define_network(isolated("new", "virbr15"))
    with mounted(directory, options), ExitStack() as cleanup:
        if serve:
            cleanup.enter_context(Service())
        cleanup.enter_context(networks(isolated("a", "virbr10"), dual_host("c", "virbr12")))
        cleanup.callback(destroy, "web")
        create(domain("web", nic("a", MAC), publishes=ports("start='2222' to='22'")))
        for bridge in ("virbr10", "virbr12"):
            settle(bridge)
        guest = cleanup.enter_context(FastGuest("virbr10", MAC))
        with fill(directory):
            guest.dhcp()
            assert guest.ping(upstream.gateway)
            # dnsmasq runs its lease script after it has answered.
            wait_for(lambda: not SCRIPT.search(str(unordered())), what="the lease script's end")
            before = unordered()
            for _ in range(2):
                told = refusal("new")
                assert "internal error" not in told, told
                assert re.search(r"full|No space|disk I/O|unable to open", told), told
            assert not before.diff(unordered())
            second = domain("mail", nic("a", OTHER), publishes=ports("start='2525' to='25'"))
            # A guest needs no room in files, but its mark and its record.
            started = create(second, check=False).returncode == 0
            assert started == (case == "run")
            destroy("mail")
            assert not before.diff(unordered())
            assert guest.ping(upstream.gateway)
            virsh("destroy", "web")
            virsh("net-destroy", "c")
            virsh("net-destroy", "a")
            assert namespaces() == set()
            assert not run("ip", "-o", "link", "show", "type", "veth").stdout.count("natin-")
        natns("sync")
        checked = natns("check", check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        virsh("net-start", "new")
        virsh("net-destroy", "new")


def dual_host(name: str, bridge: str) -> str:
    """A network behind the host's own upstream."""
    return isolated(name, bridge, metadata=nat('<natns:upstream name="host"/>'))
