# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doctor says of an upstream that no network could use, and of errors of any kind."""

import subprocess
import sys
import syslog
from pathlib import Path
from typing import NoReturn, cast

import pytest

from libvirt_natns import names
from libvirt_natns.cli import access, doctor, machine_checks, trust
from libvirt_natns.daemons import dns_relay, libvirtd_reload
from libvirt_natns.errors import KernelError, NatnsError
from libvirt_natns.kernel import netns
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import HOST_UPSTREAM, RouterUpstream, Upstream


@pytest.mark.parametrize(
    ("upstream", "said"),
    [(RouterUpstream(name="wan", nic="ens3"), "the router of upstream wan is down")],
)
def test_upstreams_that_this_version_does_not_serve(upstream: Upstream, said: str) -> None:
    settings = Config(upstream="wan", upstreams={"host": HOST_UPSTREAM, "wan": upstream})
    no_engine = cast("access.Engines", None)
    examination = dict(doctor.examinations(no_engine, settings))["upstream"]
    with pytest.raises(NatnsError, match=said):
        examination()


NOT_TEXT = UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
CHECKOUT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("error", [NatnsError("it is broken"), NOT_TEXT, FileNotFoundError("x")])
def test_an_error_of_any_kind_keeps_no_other_examination(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise error

    logged: list[str] = []
    monkeypatch.setattr(syslog, "syslog", lambda _, line: logged.append(line))
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "config.toml")
    monkeypatch.setattr(
        doctor, "examinations", lambda *_: [("hooks", fail), ("service", lambda: "runs")]
    )
    monkeypatch.setattr(trust, "findings", fail)
    said = {each.what: each for each in doctor.examine(fail)}
    assert said["hooks"].state == said["code"].state == "broken"
    assert said["service"].state == "ok"
    text = doctor.text(said.values())
    assert type(error).__name__ in text or str(error) in text
    assert any("Traceback" in line for line in logged) != isinstance(error, NatnsError)
    # An engine that does not open is reported by the examinations.
    assert ("foreign chains" in said) != isinstance(error, NatnsError)


@pytest.mark.parametrize("error", [KernelError("no veth"), NOT_TEXT, OSError("x")])
def test_a_trial_that_fails_is_an_error_of_any_kind(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trial() -> NoReturn:
        raise error

    monkeypatch.setattr(netns, "leave", lambda: None)
    with pytest.raises(type(error)) as raised:
        netns.in_scratch_namespace(trial)
    assert raised.value is error


@pytest.mark.parametrize("note", ["null", "[]", '{"told": 5}', '{"told": null}', "{", "\xff"])
def test_a_damaged_note_of_reloads_counts_as_none(
    note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    daemon = libvirtd_reload.Process("libvirtd", 1, 0)
    monkeypatch.setattr(libvirtd_reload, "running", lambda: [daemon])
    (tmp_path / "told.json").write_text(note, encoding="latin-1")
    assert libvirtd_reload.blind(daemon.start_time + 10) == ("libvirtd",)


WITHOUT_LIBVIRT = """
import sys
sys.path.append(sys.argv[1])
sys.modules["libvirt"] = None
from libvirt_natns.cli import commands, libvirt_checks, machine_checks
from libvirt_natns.errors import NatnsError
for examine in (machine_checks.python_modules, libvirt_checks.connection):
    try:
        examine()
    except NatnsError as error:
        print(error)
"""


def test_doctor_reports_a_missing_libvirt_python() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LIBVIRT, str(CHECKOUT)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == (
        "the module libvirt is missing: install python3-libvirt\n"
        "the Python module libvirt cannot be loaded (import of libvirt halted; None in"
        " sys.modules): install python3-libvirt\n"
    )


def test_a_host_that_names_no_resolver_has_none_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns_relay, "RESOLV_CONF", tmp_path / "resolv.conf")
    (tmp_path / "resolv.conf").write_text("search example.test\n")
    assert machine_checks.silent_resolvers() == f"{tmp_path}/resolv.conf names none"


def test_nothing_is_judged_by_the_defaults_where_the_configuration_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks on an upstream of that configuration would seem damaged, and sync would harm."""

    def judged(*_: object) -> NoReturn:
        raise NatnsError("1 of our rules differ", "run virt-natns sync")

    file = tmp_path / "config.toml"
    file.write_text("scoop = 1\n")
    monkeypatch.setattr(names, "CONFIG_FILE", file)
    by_name = [(what, judged) for what in doctor.BY_CONFIGURATION]
    monkeypatch.setattr(doctor, "examinations", lambda *_: [*by_name, ("hooks", lambda: "there")])
    text = doctor.text(doctor.examine(judged))
    assert "rules differ" not in text
    assert f"broken  configuration: {file}: scoop: unknown key: expected scope" in text
    assert "ok      hooks: there" in text
    skipped = next(line for line in text.splitlines() if line.startswith("warn    others: "))
    assert all(what in skipped for what in doctor.BY_CONFIGURATION)
    file.write_text("")
    assert "rules differ" in doctor.text(doctor.examine(judged))


def test_subjects_that_the_configuration_decides_are_examined() -> None:
    no_engine = cast("access.Engines", None)
    examined = {what for what, _ in doctor.examinations(no_engine, Config())}
    assert doctor.BY_CONFIGURATION - examined == {"foreign chains", "neighbour tables"}
