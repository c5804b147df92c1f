# SPDX-License-Identifier: LGPL-2.1-or-later
"""Full file systems, and a log that takes no line.

Telling about work never fails the work.  What starts is refused where nothing can be
recorded, and leaves nothing; what runs goes on, and always ends.
"""

import os
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
from views import namespaces

MAC = "52:54:00:00:00:05"
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
