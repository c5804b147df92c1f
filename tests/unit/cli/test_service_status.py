# SPDX-License-Identifier: LGPL-2.1-or-later
"""What status and doctor say of the service, and how it is started and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from libvirt_natns import __version__
from libvirt_natns.cli import service_control
from libvirt_natns.cli.service_control import ServiceHealth, as_object, end, examine, start
from libvirt_natns.cli.status import with_health
from libvirt_natns.cli.status_report import Status
from libvirt_natns.errors import InstallError, ServiceError
from libvirt_natns.kernel import processes
from libvirt_natns.service import client

UUID = "c0ffee00-0000-4000-8000-000000000001"
Speak = Callable[..., None]


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the service listens; nobody does yet, and there is no systemd."""
    path = tmp_path / "s"
    monkeypatch.setattr(client, "SOCKET", os.fspath(path))
    monkeypatch.setattr(client, "GREETING_LIMIT", 0.3)
    monkeypatch.setattr(service_control, "SYSTEMD", tmp_path / "no")
    return path


@pytest.fixture
def speak(path: Path) -> Iterator[Speak]:
    """Call it to have a service answer every question with a text; None keeps silent."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(os.fspath(path))
    path.chmod(0o600)
    said: list[str | None] = [None]
    links = []

    def serve() -> None:
        while True:
            try:
                link, _ = listener.accept()
            except OSError:
                return
            text = said[0]
            if text is None:
                links.append(link)
                continue
            # A client that only looks who listens goes at once.
            with suppress(ConnectionError), link:
                link.sendall(client.GREETING)
                assert link.recv(1024) in (b"question health - 0\n", b"")
                link.sendall(b"done\n" + text.encode())

    thread = threading.Thread(target=serve)

    def begin(text: str | None) -> None:
        said[0] = text
        if not thread.is_alive():
            listener.listen()
            thread.start()

    yield begin
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for link in links:
        link.close()
    if thread.is_alive():
        thread.join()


def told(**changes: object) -> str:
    known = {"pid": 77, "version": __version__, "since": 0.0, "given_up": {}}
    return json.dumps({**known, **changes})


# -- how it is -----------------------------------------------------------------


def test_absent(path: Path) -> None:
    assert str(service_control.ask()) == "not running: hooks do the work themselves"
    # One that was killed leaves its socket behind.
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(os.fspath(path))
    assert service_control.ask() == ServiceHealth("absent")


def test_absent_with_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that systemd knows can be started; without units there is nothing to type."""
    program = tmp_path / "systemctl"
    monkeypatch.setattr(processes, "program", lambda _: os.fspath(program))
    monkeypatch.setattr(service_control, "SYSTEMD", tmp_path)
    absent = "not running: hooks do the work themselves"
    for status, more in ((0, " (systemctl start libvirt-natns)"), (1, "")):
        program.write_text(f"#!/bin/sh\nexit {status}\n")
        program.chmod(0o755)
        assert str(ServiceHealth("absent")) == absent + more
    program.unlink()
    assert str(ServiceHealth("absent")) == absent


def test_stuck(speak: Speak) -> None:
    speak(None)
    assert str(service_control.ask()) == "does not answer: hooks do the work themselves"
    with pytest.raises(ServiceError, match="does not answer: systemctl restart libvirt-natns"):
        examine()


def test_running(speak: Speak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    speak(told(given_up={UUID: "nft table inet natns is deleted again and again"}))
    health = service_control.ask()
    assert str(health).startswith(f"running (pid 77, version {__version__}, since 1970-01-01 ")
    assert as_object(health) == {
        "state": "running", "pid": 77, "version": __version__, "since": 0.0,
    }  # fmt: skip
    assert health.given_up == {UUID: "nft table inet natns is deleted again and again"}


@pytest.mark.parametrize("text", ["", "null", "{}", "[]", "\N{SNOWMAN}"])
def test_nonsense_is_an_error(text: str, speak: Speak) -> None:
    speak(text)
    with pytest.raises(ServiceError, match="invalid answer"):
        service_control.ask()


def test_given_up_stands_for_health() -> None:
    one = Status(
        "a", UUID, "up", "nat-a", "virbr10", (), "host", None, 0, "damaged (1)", ("x is missing",)
    )
    other = Status("b", "u", "up", "nat-b", "virbr11", (), "host", None, 0, "ok", ())
    shown = with_health([one, other], ServiceHealth("running", 1, "0", 0.0, {UUID: "x goes again"}))
    assert [each.health for each in shown] == ["given up (x goes again)", "ok"]
    assert shown[0].differences == ("x is missing",)
    assert service_control.of_host(ServiceHealth("running", 1, "0", 0.0, {"": "y"})) == [
        "given up (y)"
    ]
    assert service_control.of_host(ServiceHealth("running", 1, "0", 0.0, {UUID: "y"})) == []


# -- doctor --------------------------------------------------------------------


def test_doctor_takes_a_missing_service_for_well() -> None:
    assert examine() == "not running: hooks do the work themselves"


def test_doctor_on_a_service(speak: Speak, path: Path) -> None:
    speak(told())
    assert examine().startswith("running (pid 77, ")
    speak(told(version="0.0.1"))
    with pytest.raises(ServiceError, match=r"version 0\.0\.1 runs, and .* is installed: systemctl"):
        examine()
    speak(told(given_up={UUID: "x goes again"}))
    with pytest.raises(ServiceError, match=r"given up healing \(x goes again\)"):
        examine()
    path.chmod(0o666)
    with pytest.raises(ServiceError, match=r"has owner 0 and mode 0666 \(expected 0 and 0600\)"):
        examine()


def test_doctor_on_a_file_in_the_sockets_place(path: Path) -> None:
    path.touch(mode=0o600)
    with pytest.raises(ServiceError, match="is not a socket"):
        examine()


# -- starting and ending -------------------------------------------------------

SYSTEMCTL = """\
#!/bin/sh
echo "$*" >>{log}
case $* in *" cat "*) exit {known} ;; *) echo "no bus" >&2; exit {status} ;; esac
"""


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], Path]:
    """Call it to have a systemd that knows the units, and does as told, by exit status."""

    def make(known: int, status: int) -> Path:
        log = tmp_path / "log"
        program = tmp_path / "systemctl"
        program.write_text(SYSTEMCTL.format(log=log, known=known, status=status))
        program.chmod(0o755)
        # The system's directories come first, whatever root's PATH says.
        monkeypatch.setattr(processes, "PATH", os.fspath(tmp_path))
        monkeypatch.setattr(service_control, "SYSTEMD", tmp_path)
        return log

    return make


def test_start_and_end_by_systemd(systemd: Callable[[int, int], Path]) -> None:
    log = systemd(0, 0)
    assert start() == "systemd runs libvirt-natns.socket and libvirt-natns.service"
    assert end() == "stopped libvirt-natns.socket and libvirt-natns.service"
    both = "libvirt-natns.socket libvirt-natns.service"
    asked = [line.removeprefix("--no-ask-password ") for line in log.read_text().splitlines()]
    assert [line for line in asked if not line.startswith("cat")] == [
        f"enable --now {both}",
        f"disable --now {both}",
    ]


def test_systemd_that_cannot(systemd: Callable[[int, int], Path]) -> None:
    systemd(0, 1)
    with pytest.raises(InstallError, match="systemd cannot start the service: no bus"):
        start()
    with pytest.raises(InstallError, match="systemd cannot stop the service: no bus"):
        end()


def test_systemd_without_the_units(systemd: Callable[[int, int], Path]) -> None:
    log = systemd(1, 1)
    assert start() == "systemd does not know the service's units: see contrib/systemd"
    assert end() is None
    assert all("cat" in line for line in log.read_text().splitlines())


def test_without_systemd() -> None:
    assert start() == "systemd does not run here: start the service with virt-natns serve"
    assert end() is None


def test_end_of_one_that_was_started_by_hand(speak: Speak) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        speak(told(pid=process.pid))
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        assert end() == f"ended the service (pid {process.pid})"
        reaper.join()
        assert process.returncode == -15


@pytest.mark.parametrize("units", [True, False])
def test_end_of_one_that_was_started_by_hand_beside_the_units(
    units: bool, speak: Speak, systemd: Callable[[int, int], Path]
) -> None:
    systemd(0 if units else 1, 0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        speak(told(pid=process.pid))
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        stopped = "stopped libvirt-natns.socket and libvirt-natns.service, " if units else ""
        assert end() == f"{stopped}ended the service (pid {process.pid})"
        reaper.join()
        assert process.returncode == -15


def test_end_of_one_whose_answer_has_another_form(
    speak: Speak, monkeypatch: pytest.MonkeyPatch
) -> None:
    speak("{}")
    monkeypatch.setattr(service_control, "STUCK_LIMIT", 0.3)
    # The test itself listens, and is no service.
    with pytest.raises(InstallError, match="does not answer: end the process"):
        end()


def test_end_of_one_that_is_stuck(speak: Speak) -> None:
    speak(None)
    with pytest.raises(InstallError, match="does not answer: end the process"):
        end()


LISTENER = """
import signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listens", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("state", ["deaf", "silent", "stopped"])
def test_end_of_a_service_that_is_stuck(
    state: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_control, "STUCK_LIMIT", 0.3)
    command = [sys.executable, "-c", LISTENER, os.fspath(path), "virt-natns", "serve", state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"listens\n"
        if state == "stopped":
            process.send_signal(signal.SIGSTOP)
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        assert end() == f"ended the service (pid {process.pid})"
        reaper.join()
        assert process.returncode == (-9 if state == "deaf" else -15)


def test_systemctl_of_the_system_comes_first(
    systemd: Callable[[int, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = systemd(0, 0)
    other = tmp_path / "other"
    other.mkdir()
    (other / "systemctl").write_text(f"#!/bin/sh\ntouch {tmp_path}/wrong\n")
    (other / "systemctl").chmod(0o755)
    monkeypatch.setenv("PATH", os.fspath(other), prepend=":")
    start()
    assert "enable --now" in log.read_text()
    assert not (tmp_path / "wrong").exists()
