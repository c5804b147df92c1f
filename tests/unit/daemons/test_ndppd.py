# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ndppd is told, and whom it is taken for; that it answers, system tests see."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ProxyError
from libvirt_natns.kernel import processes

UUID = "c7308e5b-a296-4b40-a0cb-069d4253d364"
SUBNET = IPv6Network("2001:db8:77::/64")
PROXY = ndppd.Proxy(UUID, None, "upstream", "virbr10", (SUBNET,))

CONFIGURATION = """\
# upstream is link 3, virbr10 is link 2
proxy upstream {
    router no
    timeout 500
    ttl 30000
    rule 2001:db8:77::/64 {
        iface virbr10
    }
}
"""


def span(first: str, last: str = "") -> AddressRange:
    return AddressRange(IPv6Address(first), IPv6Address(last or first))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    made = names.network_directory(UUID)
    made.mkdir(parents=True)
    return made


def test_configuration() -> None:
    assert ndppd.configuration(PROXY, (3, 2)) == CONFIGURATION
    assert ndppd.configuration(PROXY, (5, 2)) != CONFIGURATION


@pytest.mark.parametrize(
    ("without", "outside", "inside"),
    [
        ([span("2001:db8:77::1")], ["::1"], ["::", "::2", ":0:ffff:ffff:ffff:ffff"]),
        # They overlap, and touch both ends.
        (
            [span("2001:db8:77::", "2001:db8:77::1ff"), span("2001:db8:77::100"),
             span("2001:db8:77::f000", "2001:db8:77:ffff::")],
            ["::", "::1ff", "::f000", ":0:ffff:ffff:ffff:ffff"],
            ["::200", "::efff"],
        ),
        ([span("2001:db8:78::1"), span("fe80::1")], [], ["::", ":0:ffff:ffff:ffff:ffff"]),
        ([span("::", "ffff::")], ["::", "::1"], []),
    ],
)  # fmt: skip
def test_what_is_known_to_be_elsewhere(
    without: list[AddressRange], outside: list[str], inside: list[str]
) -> None:
    parts = replace(PROXY, without=tuple(without)).answered
    for texts, answered in ((outside, False), (inside, True)):
        for text in texts:
            address = IPv6Address(f"2001:db8:77{text}")
            assert any(address in part for part in parts) == answered, text
    assert all(part.subnet_of(SUBNET) for part in parts)


@pytest.fixture
def somebody(directory: Path) -> Iterator[int]:
    """A process that another one's pid file names."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        (directory / "ndppd-host.pid").write_text(f"{process.pid}\n")
        yield process.pid
        assert process.poll() is None
        process.kill()


def test_a_process_that_is_none_of_ours(somebody: int) -> None:
    """Its number was ndppd's once.  It is not stopped, either."""
    assert ndppd.running(UUID, None) is None
    assert ndppd.differences(PROXY, (3, 2)) == ["ndppd on upstream in the host is not running"]
    ndppd.stop(UUID)
    assert ndppd.running(UUID, None) is None


NO_PID_FILES = (None, b"", b"none", b"0", b"\xff", b"1", b"4194305")


@contextmanager
def pretender(word: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with that word in its command line."""
    command = ["sh", "-c", "echo ready; read line", "sh", word]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


@pytest.mark.parametrize("content", NO_PID_FILES)
@pytest.mark.parametrize("namespace", [None, "nat-a"])
def test_a_daemon_without_a_readable_pid_file_is_ended(
    namespace: str | None, content: bytes | None, directory: Path
) -> None:
    """On a full disk its pid file stays empty."""
    proxy = replace(PROXY, namespace=namespace)
    proxy.file("conf").write_text(CONFIGURATION)
    if content is not None:
        proxy.file("pid").write_bytes(content)
    with pretender(str(proxy.file("conf"))) as stray, pretender("other") as other:
        ndppd.stop(UUID)
        assert stray.poll() is not None
        assert other.poll() is None
    assert list(directory.iterdir()) == []


def test_a_routers_daemon_without_a_pid_file_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    PROXY.file("conf").write_text(CONFIGURATION)
    lives_there = True
    monkeypatch.setattr(processes, "lives_in", lambda _pid, _namespace: not lives_there)
    with pretender(str(PROXY.file("conf"))) as stray:
        lives_there = False
        ndppd.stop_in("natns-router-wan")
        assert stray.poll() is None
        lives_there = True
        ndppd.stop_in("natns-router-wan")
        assert stray.poll() is not None


def test_processes_are_not_searched_without_a_configuration(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "with_word", lambda _: 1 / 0)
    ndppd.stop(UUID)


def test_files_that_are_no_pid_files(directory: Path) -> None:
    for content in (b"", b"none", b"0", b"\xff", b"1"):
        (directory / "ndppd-host.pid").write_bytes(content)
        assert ndppd.running(UUID, None) is None


def test_nothing_is_wrong_where_none_is_wanted() -> None:
    assert ndppd.differences(replace(PROXY, prefixes=()), (3, 2)) == []
    assert not ndppd.is_wanted(UUID, None)
    ndppd.stop(UUID)


def test_a_program_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(processes, "PATH", "/nowhere")
    with pytest.raises(ProxyError, match="install the package ndppd"):
        ndppd.ensure(PROXY, (3, 2))


def test_a_daemon_is_not_spared_where_memory_runs_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = tmp_path / "score"
    monkeypatch.setattr(processes, "OOM_SCORE", score)
    for spared in (True, False):
        score.write_text("-500\n" if spared else "200\n")
        words = processes.confined("net_raw", "net_admin")
        assert ("-n" in words) == spared, "root may not lower it again everywhere"
        assert words[-2:] == ("-all,+net_raw,+net_admin", "--")
        assert "--no-new-privs" in words
        words = processes.confined("net_raw", no_new_privs=False)
        assert words[-2:] == ("-all,+net_raw", "--")
        assert "--no-new-privs" not in words
    monkeypatch.setattr(processes, "PATH", "/nowhere")
    monkeypatch.setenv("PATH", "/nowhere")
    assert processes.confined("net_raw") == ()
