# SPDX-License-Identifier: LGPL-2.1-or-later
"""Removing all of it, whatever is broken: each part is tried, and none needs another."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.cli import firewalld_files, hook_files, service_control, uninstall
from libvirt_natns.daemons import libvirtd_reload
from libvirt_natns.engine.reconcile import release
from libvirt_natns.engine.reconcile.repairs import Outcome
from libvirt_natns.errors import FormatError, InstallError, NatnsError, RouterError
from libvirt_natns.firewall import host_firewall

CHECKOUT = Path(__file__).resolve().parents[3]
PARTS = ("end the service", "release", "remove hooks", "reload", "release", "remove state")


class Parts:
    """What was called, in order; a part named in ``broken`` fails."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.stores: list[Path] = []
        self.broken: dict[str, Exception] = {}
        self.errors: list[str] = []

    def part(self, name: str, result: object) -> Callable[..., object]:
        def do(*_: object, **__: object) -> object:
            self.called.append(name)
            if name in self.broken:
                raise self.broken[name]
            return result

        return do


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """No part does anything."""
    found = Parts()

    @contextmanager
    def engine(_settings: object, directory: Path) -> Iterator[None]:
        found.stores.append(directory)
        if directory == names.STATE_DIRECTORY and "store" in found.broken:
            raise found.broken["store"]
        yield

    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "state")
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "config.toml")
    monkeypatch.setattr(uninstall, "open_engine", engine)
    monkeypatch.setattr(firewalld_files, "DIRECTORY", tmp_path / "firewalld")
    monkeypatch.setattr(service_control, "end", found.part("end the service", "ended"))
    monkeypatch.setattr(
        release, "release_all", found.part("release", Outcome([("a", "given back")], found.errors))
    )
    monkeypatch.setattr(libvirtd_reload, "running", list)
    monkeypatch.setattr(hook_files, "installed", lambda: (Path("/gone/network"),))
    monkeypatch.setattr(hook_files, "remove", found.part("remove hooks", ()))
    monkeypatch.setattr(libvirtd_reload, "reload", found.part("reload", ("libvirtd",)))
    monkeypatch.setattr(uninstall, "remove_state", found.part("remove state", None))
    monkeypatch.setattr(host_firewall, "remove", found.part("remove rules", None))
    return found


def test_all_of_it_in_order(parts: Parts, capsys: pytest.CaptureFixture[str]) -> None:
    uninstall.run(lambda: None)
    assert tuple(parts.called) == PARTS
    assert capsys.readouterr().out == (
        "ended\nremoved /gone/network\ntold libvirtd\na: given back\na: given back\n"
    )


@pytest.mark.parametrize("broken", ["end the service", "release", "remove hooks", "reload"])
@pytest.mark.parametrize(
    "error", [NatnsError("it is", "broken"), ModuleNotFoundError(name="lxml"), ValueError("it is")]
)
def test_whatever_fails_the_rest_goes(broken: str, error: Exception, parts: Parts) -> None:
    parts.broken[broken] = error
    with pytest.raises(InstallError, match="run virt-natns uninstall again") as caught:
        uninstall.run(lambda: None)
    assert set(PARTS) - {"remove state"} <= set(parts.called)
    assert "remove state" not in parts.called
    assert "\n" not in str(caught.value)
    # Rules do not need what networks need.
    assert ("remove rules" in parts.called) == (broken == "release")


def test_a_database_that_cannot_be_read_is_done_without(parts: Parts) -> None:
    parts.broken["store"] = FormatError("the state database", "is newer")
    uninstall.run(lambda: None)
    assert parts.called[-1] == "remove state"
    assert "remove rules" in parts.called
    assert [each == names.STATE_DIRECTORY for each in parts.stores] == [True, False] * 2
    assert not any(each.exists() for each in parts.stores)


def test_what_the_records_cannot_give_back_the_kernel_shows(parts: Parts) -> None:
    parts.errors.append("network a: the state database is damaged")
    with pytest.raises(InstallError, match="network a"):
        uninstall.run(lambda: None)
    assert len(parts.stores) == 4


@pytest.mark.parametrize("text", ['scope = "isolated', "upstream = 5\n"])
def test_a_broken_configuration_does_not_matter(text: str, parts: Parts) -> None:
    names.CONFIG_FILE.write_text(text)
    uninstall.run(lambda: None)
    assert parts.called[-1] == "remove state"


def test_a_router_is_put_back_first(parts: Parts) -> None:
    routers = names.STATE_DIRECTORY / "routers"
    routers.mkdir(parents=True)
    (routers / "wan.json").touch()
    with pytest.raises(RouterError, match="virt-natns router down wan"):
        uninstall.run(lambda: None)
    assert not parts.called


PROGRAM = """
import sys
sys.path.append(sys.argv[1])
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lxml", "pyroute2", "iptc", "libvirt", "prometheus_client"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Gone())
from libvirt_natns import __main__
from libvirt_natns.cli import service_control, uninstall
from libvirt_natns.firewall import host_firewall
uninstall.run = lambda ask, **options: print("uninstalled", ask(), options)
sys.argv[1:] = sys.argv[2:]
sys.exit(__main__.main())
"""


LAST = "sys.exit(__main__.main())\n"


def without_libraries(*arguments: str, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", program, str(CHECKOUT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_libraries_it_uninstalls_all_the_same() -> None:
    for words, package in ((["uninstall"], False), (["uninstall", "--package"], True)):
        done = without_libraries(*words)
        said = f"uninstalled None {{'package': {package}}}\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("OSError(28, 'No space left on device', '/x')", "cannot write /x (No space left on"),
        ("KeyError('x')", "internal error (KeyError: 'x'): see the system log"),
        ("NatnsError('it is', 'broken')", "it is: broken"),
    ],
)
def test_without_libraries_an_error_is_one_line(error: str, told: str) -> None:
    fails = f"""
def run(ask, **_):
    from libvirt_natns.errors import NatnsError
    raise {error}
import syslog
syslog.syslog = lambda *_: None
uninstall.run = run
sys.exit(__main__.main())
"""
    done = without_libraries("uninstall", program=PROGRAM.replace(LAST, fails))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"virt-natns: {told}")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["status", "check", "sync"])
def test_without_libraries_other_commands_say_so(command: str) -> None:
    done = without_libraries(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("virt-natns: cannot load ")
    assert done.stderr.count("\n") == 1
