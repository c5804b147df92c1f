# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command's edges: usage, root, broken pipes, files that are none."""

import errno
import os
import signal
import subprocess
import sys
import syslog
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from libvirt_natns import daemons, names, service
from libvirt_natns.cli import access, check, commands, look_rules, status
from libvirt_natns.daemons import libvirt
from libvirt_natns.errors import LibvirtError, NatnsError
from libvirt_natns.firewall import backends, nftables
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.link_addresses import LinkAddresses
from libvirt_natns.kernel.links import Links
from libvirt_natns.kernel.routes import Routes
from libvirt_natns.service import client
from libvirt_natns.values import quoted

CHECKOUT = Path(__file__).resolve().parents[3]
XML = CHECKOUT / "xml"
LOOKS_WITHOUT_SERVICE = (
    "only root can do this while the service does not run:"
    " use sudo, or start the service: systemctl start libvirt-natns"
)
COMMANDS = (
    "install", "uninstall", "status", "check", "sync", "plan", "exec", "diagram", "doctor",
    "metrics", "serve", "report", "watch",
)  # fmt: skip
"""Commands that need root."""
IP = "<ip address='10.0.0.1' prefix='24'/>"
NAT = "<metadata><natns:nat xmlns:natns='urn:libvirt-natns:1' enabled='{}'/></metadata>"
INSIDE = {
    "default": f"<forward mode='nat'/>{IP}",
    "stopped": IP,
    "idle": NAT.format("no") + IP,
    "wrong": NAT.format("maybe") + IP,
}
UUIDS = {name: f"c0ffee00-0000-4000-8000-00000000000{number}" for number, name in enumerate(INSIDE)}
DEFINED = {
    name: (
        f"<network><name>{name}</name><uuid>{UUIDS[name]}</uuid>"
        f"<bridge name='virbr{number}'/>{inside}</network>"
    ).encode()
    for number, (name, inside) in enumerate(INSIDE.items())
}
"""Networks of libvirt's, by name."""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of the test's own, without libvirt and without anything set up."""
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "etc" / "config.toml")
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "lib")
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    monkeypatch.setattr(client, "SOCKET", os.fspath(tmp_path / "service.sock"))
    monkeypatch.setattr(backends, "choose", lambda *_, **__: nftables)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(libvirt, "connected", unreachable)
    monkeypatch.setattr(Links, "get", lambda *_: None)
    monkeypatch.setattr(LinkAddresses, "beyond_link", lambda *_: set())
    for name in ("destinations", "links"):
        monkeypatch.setattr(Routes, name, lambda *_, **__: set())
    return tmp_path


def unreachable(**_: object) -> None:
    raise LibvirtError("libvirt does not answer", "no socket")


@pytest.mark.parametrize("name", ["-dash", "my lab", "it's", "100%", 'say "hi"'])
def test_odd_names_are_arguments(name: str) -> None:
    parse = commands.make_parser().parse_args
    for command in ("status", "check", "plan"):
        assert parse([command, "--", name]).network == name
    options = parse(["exec", "--", name, "--", "ls", "-l"])
    assert (options.network, options.argv) == (name, ["--", "ls", "-l"])
    assert parse(["forward", "list", "--", name]).guest == name
    assert parse(["forward", "add", f"--network={name}", "--", name, "1:2"]).network == name


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a-b.1", "a-b.1"),
        ("-dash", "'-dash'"),
        ("my lab", "'my lab'"),
        ("100%", "'100%'"),
        ("it's", '"it\'s"'),
        ("a\x9b", "'a\\x9b'"),
    ],
)
def test_odd_names_are_quoted(name: str, said: str) -> None:
    assert quoted(name) == said


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        commands.main(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for name in (*COMMANDS, "validate"):
        assert f"\n    {name}" in out


@pytest.mark.parametrize("name", COMMANDS)
def test_without_root(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    operands = {"plan": ["a"], "exec": ["a", "--", "true"]}
    assert commands.main([name, *operands.get(name, [])]) == 1
    said = capsys.readouterr()
    looks = look_rules.command_of([name]) or name == "watch"
    line = LOOKS_WITHOUT_SERVICE if looks else "only root can do this: use sudo"
    assert (said.out, said.err) == ("", f"virt-natns: {line}\n")


def test_looking_makes_no_state(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["status"]) == 0
    assert capsys.readouterr().out.startswith("no network has been handled yet")
    assert commands.main(["check"]) == 0
    assert commands.main(["metrics"]) == 0
    assert commands.main(["diagram"]) == 0
    assert commands.main(["plan", os.fspath(XML / "twin-a.xml")]) == 0
    assert not (machine / "lib").exists()


@pytest.mark.parametrize(
    ("library", "package", "command"),
    [
        ("prometheus_client", "python3-prometheus-client", "metrics"),
        ("prometheus_client", "python3-prometheus-client", "serve"),
        ("libvirt", "python3-libvirt", "serve"),
    ],
)
def test_a_missing_library_is_one_line(
    library: str,
    package: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    for room, module in (
        (service, "metrics"), (service, "daemon"), (service, "libvirt_watch"),
        (daemons, "libvirt_events"),
    ):  # fmt: skip
        monkeypatch.delitem(sys.modules, f"{room.__name__}.{module}", raising=False)
        monkeypatch.delattr(room, module, raising=False)
    assert commands.main([command]) == 1
    assert capsys.readouterr().err == (
        f"virt-natns: the Python module {library} is missing: install {package}\n"
    )


def test_plan_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["plan", os.fspath(XML / "twin-a.xml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "transit bridge natns-host (natns-transit-host)"
    assert "namespace nat-twin-a" in lines
    assert "address 10.0.0.1/24 on virbr10 in nat-twin-a" in lines
    assert lines[-1] == "dnsmasq in nat-twin-a on virbr10"


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", ""), (b"<network>", ""), (b"<domain/>", "network"), (b"\xff\xfe", "")],
)
def test_plan_of_a_wrong_file(
    content: bytes, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.xml"
    file.write_bytes(content)
    assert commands.main(["plan", os.fspath(file)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"virt-natns: {file}: ")
    assert told in said.err
    assert said.err.count("\n") == 1


def test_plan_of_an_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.xml"
    file.touch()
    denied = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "read_bytes", lambda _: (_ for _ in ()).throw(denied))
    assert commands.main(["plan", os.fspath(file)]) == 1
    assert capsys.readouterr().err == f"virt-natns: cannot read {file}: Permission denied\n"


@pytest.mark.parametrize("command", ["status", "check", "exec"])
@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("default", "network default is not touched: has <forward mode='nat'>"),
        (UUIDS["default"], "network default is not touched: has <forward mode='nat'>"),
        ("stopped", "network stopped is not active: virsh net-start stopped"),
        ("idle", "network idle is not touched: its metadata says enabled='no'"),
        ("wrong", "network wrong is not active, and cannot start: network 'wrong', line 1: "),
        ("defalt", "there is no network defalt (did you mean default?): see virsh net-list --all"),
        ("zzz", "there is no network zzz: see virsh net-list --all"),
    ],
)
def test_a_network_without_a_router(
    command: str,
    named: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(libvirt, "networks", lambda: DEFINED)
    active = {UUIDS[name]: DEFINED[name] for name in ("default",)}
    monkeypatch.setattr(libvirt, "active_networks", lambda **_: active)
    monkeypatch.setattr(libvirt, "uuids", lambda: list(UUIDS.values()))
    more = ["--", "true"] if command == "exec" else []
    assert commands.main([command, named, *more]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"virt-natns: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["check", "exec"])
@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("stopped", "is active in libvirt, but has no router: run virt-natns sync"),
        ("idle", "is not touched: its metadata says enabled='no'"),
        ("wrong", "is active in libvirt, but has no router: network 'wrong', line 1: "),
    ],
)
def test_an_active_network_without_a_router(
    command: str,
    named: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(libvirt, "networks", lambda: DEFINED)
    active = {UUIDS[name]: xml for name, xml in DEFINED.items()}
    monkeypatch.setattr(libvirt, "active_networks", lambda **_: active)
    assert commands.main([command, named, *(["true"] if command == "exec" else [])]) == 1
    assert capsys.readouterr().err.startswith(f"virt-natns: network {named} {said}")


@pytest.mark.parametrize("command", ["status", "check", "exec"])
def test_a_network_without_a_router_and_without_libvirt(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert commands.main([command, "a", *(["true"] if command == "exec" else [])]) == 1
    assert capsys.readouterr().err == "virt-natns: network a is not up: see virt-natns status\n"


def test_plan_of_a_misspelt_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(libvirt, "network_xml", lambda _: None)
    monkeypatch.setattr(libvirt, "networks", lambda: DEFINED)
    assert commands.main(["plan", "stoped"]) == 1
    assert capsys.readouterr().err == (
        "virt-natns: there is no file and no network stoped (did you mean stopped?):"
        " see virsh net-list --all\n"
    )


def test_plan_of_a_name_without_libvirt(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["plan", "a"]) == 1
    assert capsys.readouterr().err == "virt-natns: libvirt does not answer: no socket\n"


def test_a_wrong_configuration_is_one_line(
    machine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names.CONFIG_FILE.parent.mkdir()
    names.CONFIG_FILE.write_text("scope = 1\n")
    assert commands.main(["status"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"virt-natns: {names.CONFIG_FILE}: scope: is 1: expected ")
    assert said.err.count("\n") == 1


def test_an_error_is_one_line_whatever_it_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(_: object) -> int:
        raise NatnsError("something\nwith two lines", "mend\tit")

    monkeypatch.setattr(status, "run", failing)
    assert commands.main(["status"]) == 1
    assert capsys.readouterr().err == "virt-natns: something with two lines: mend it\n"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/hosts"),
            "cannot write /run/hosts (No space left on device): free some space",
        ),
        (KeyError("x"), "internal error (KeyError: 'x'): see the system log and report it"),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            "internal error (UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position"
            " 0: invalid start byte): see the system log and report it",
        ),
    ],
)
def test_an_error_of_any_kind_is_one_line(
    error: Exception,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(_: object) -> int:
        raise error

    logged: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _, line: logged.append(line))
    monkeypatch.setattr(status, "run", failing)
    assert commands.main(["status"]) == 1
    assert capsys.readouterr().err == f"virt-natns: {told}\n"
    # A fault of ours leaves its traceback in the system log.
    assert any("Traceback" in line for line in logged) == ("internal error" in told)


def test_a_reader_that_has_had_enough_is_no_error() -> None:
    program = (
        "import sys; from libvirt_natns.cli import commands, status;"
        " status.run = lambda _: print('x' * 100_000) or 0; sys.exit(commands.main(['status']))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=write, stderr=subprocess.PIPE, cwd=CHECKOUT, check=False,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_command_of_exec_has_the_usual_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that writes into a closed pipe must end, as in any shell."""
    numbers = (signal.SIGPIPE, signal.SIGXFSZ)
    seen: list[object] = []

    def execvp(*_: object) -> None:
        seen.extend(signal.getsignal(number) for number in numbers)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(access, "engine", lambda **_: nullcontext())
    monkeypatch.setattr(check, "networks_up", lambda *_: [SimpleNamespace(namespace="nat-a")])
    monkeypatch.setattr(netns, "entered", lambda _: nullcontext())
    monkeypatch.setattr(os, "execvp", execvp)
    earlier = [signal.getsignal(number) for number in numbers]
    try:
        assert commands.main(["exec", "a", "--", "no-such"]) == 1
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)
    assert seen == [signal.SIG_DFL, signal.SIG_DFL]
