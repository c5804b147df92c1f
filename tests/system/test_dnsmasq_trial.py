# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dnsmasq that is started on trial is confined as the others, and leaves nothing."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import natns

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq_process, dnsmasq_trial
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import DnsmasqError
from libvirt_natns.kernel import processes
from libvirt_natns.model.network import Network

UUID = "6f2b9c1e-0000-4000-8000-0000000000e7"
EndAll = Callable[[int | None, Path], None]


def network(*options: str) -> Network:
    listed = "".join(f"<dnsmasq:option value='{option}'/>" for option in options)
    return libvirt_xml.parse_network(
        f"""<network xmlns:dnsmasq='http://libvirt.org/schemas/network/dnsmasq/1.0'>
        <name>a</name><uuid>{UUID}</uuid><metadata>
        <natns:nat xmlns:natns='urn:libvirt-natns:1'><natns:ip address='10.0.0.1' prefix='24'/>
        </natns:nat></metadata><bridge name='virbr10'/>
        <dnsmasq:options>{listed}</dnsmasq:options></network>""".encode()
    )


def trials() -> list[Path]:
    return sorted(names.RUN_DIRECTORY.glob("trial-*"))


def running() -> list[int]:
    """The processes that are a dnsmasq on trial."""
    mark = f"--conf-file={names.RUN_DIRECTORY}/trial-"
    pids = (int(each.name) for each in Path("/proc").iterdir() if each.name.isdigit())
    return [pid for pid in pids if any(w.startswith(mark) for w in processes.command(pid))]


def capabilities(pid: int) -> int:
    """The bounding set of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("CapBnd:")), 16)


def die(pid: int | None, configuration: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def be_killed(tried: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """Try a network in a process that is killed while its dnsmasq runs."""
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(dnsmasq_process, "end_all", die)
        dnsmasq_trial.check(tried)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    assert not trials()
    assert not running()
    names.RUN_DIRECTORY.rmdir()


def test_an_own_pid_file_hides_no_daemon(tmp_path: Path) -> None:
    dnsmasq_trial.check(network(f"pid-file={tmp_path}/own"))
    assert not running()


def test_it_is_confined_as_every_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real: EndAll = dnsmasq_process.end_all
    found: list[int] = []

    def look(pid: int | None, configuration: Path) -> None:
        found.extend(map(capabilities, running()))
        # Another network's trial, or sync, meanwhile.
        assert dnsmasq_trial.tidy() == []
        assert configuration.exists()
        real(pid, configuration)

    monkeypatch.setattr(dnsmasq_process, "end_all", look)
    dnsmasq_trial.check(network("log-queries"))
    assert found
    # CAP_CHOWN, DAC_OVERRIDE, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_ADMIN, NET_RAW.
    assert set(found) == {sum(1 << bit for bit in (0, 1, 6, 7, 8, 10, 12, 13))}


@pytest.mark.parametrize("option", ["log-queries", "pid-file=/run/own-pid"])
def test_one_that_was_killed_goes_with_the_next(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_killed(network(option), monkeypatch)
    assert trials()
    assert running()
    with pytest.raises(DnsmasqError, match="no-such-user"):
        dnsmasq_trial.check(network("user=no-such-user"))
    Path("/run/own-pid").unlink(missing_ok=True)


def test_one_that_was_killed_goes_with_sync(
    installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_killed(network("log-queries"), monkeypatch)
    assert "dnsmasq: removed a trial of dnsmasq that was killed" in natns("sync").stdout
    assert dnsmasq_trial.tidy() == []
