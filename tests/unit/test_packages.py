# SPDX-License-Identifier: LGPL-2.1-or-later
"""Packages: versions, dependencies and contents agree with the source."""

import configparser
import re
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from libvirt_natns import __version__
from libvirt_natns.state.schema import VERSION

CHECKOUT = Path(__file__).resolve().parents[2]
DEBIAN = CHECKOUT / "debian"
SPEC = CHECKOUT / "contrib" / "rpm" / "libvirt-natns.spec"
CONTROL = (DEBIAN / "control").read_text()

OTHERS = {"dh-sequence-python3": "dh-python", "debhelper-compat": "debhelper"}
"""Packages by a name that they provide."""

PYTHON = {
    "libvirt-python": "python3-libvirt",
    "lxml": "python3-lxml",
    "prometheus-client": "python3-prometheus-client",
    "pyroute2": "python3-pyroute2",
    "python-iptables": "python3-iptables",
}


def field(name: str) -> set[str]:
    """The packages in a field of debian/control, without those of its tests."""
    value = re.search(rf"(?m)^{name}:((?:.*\n)(?:[ \t].*\n)*)", CONTROL)
    assert value
    wanted = [entry for entry in value[1].split(",") if "<!nocheck>" not in entry]
    entries = [re.sub(r"\(.*?\)", "", entry).strip() for entry in wanted]
    return {OTHERS.get(entry, entry) for entry in entries if not entry.startswith("$")}


def purpose(name: str) -> set[str]:
    """The packages of a purpose in contrib/packages."""
    text = (CHECKOUT / "contrib" / "packages").read_text()
    return {word for line in re.findall(rf"(?m)^{name}: (.*)$", text) for word in line.split()}


def settings() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CHECKOUT / "setup.cfg")
    return parser


def test_versions_agree() -> None:
    changelog = (DEBIAN / "changelog").read_text()
    assert changelog.startswith(f"libvirt-natns ({__version__}) ")
    spec = SPEC.read_text()
    assert re.findall(r"(?m)^Version: +(.*)$", spec) == [__version__]
    assert re.findall(r"(?m)^\* .* - (.*)-\d+$", spec)[0] == __version__


def test_a_package_depends_on_what_the_program_needs() -> None:
    needed = purpose("run-time")
    assert needed <= field("Depends") | field("Recommends") | {"python3"}
    modules = settings()["options"]["install_requires"].split()
    assert {PYTHON[module] for module in modules} <= field("Depends")


def test_build_tools_agree() -> None:
    assert field("Build-Depends") == purpose("package") | {"python3"}


def test_pip_installs_each_page_unit_and_completion() -> None:
    patterns = " ".join(settings()["options.data_files"].values()).split()
    found = {file for pattern in patterns for file in CHECKOUT.glob(pattern)}
    for directory in ("man", "contrib/systemd", "contrib/completion"):
        shipped = {file for file in (CHECKOUT / directory).glob("*") if file.suffix != ".py"}
        assert shipped <= found


def test_sources_agree() -> None:
    """A file that the build needs is copied wherever a copy is built."""
    script = (CHECKOUT / "contrib" / "build-package").read_text()
    listed = re.search(r"(?s)CHANGELOG\.md .*?(?= \|)", script)
    role = CHECKOUT / "contrib/ansible/roles/libvirt_natns/tasks/source.yml"
    copied = re.search(r"(?s)CHANGELOG\.md .*?(?=&&)", role.read_text())
    assert listed
    assert copied
    names = set(listed[0].replace("\\", "").split())
    assert names == set(copied[0].split())
    for name in names:
        assert (CHECKOUT / name).exists()


@pytest.mark.parametrize("place", ["contrib/systemd", "contrib/ifupdown", "contrib/ansible"])
def test_no_path_of_the_program(place: str) -> None:
    for file in (CHECKOUT / place).rglob("*"):
        if file.is_file():
            assert "/usr/local/bin" not in file.read_text(), file


def test_licenses_are_named() -> None:
    for file in (*DEBIAN.glob("libvirt-natns.p*"), DEBIAN / "rules", SPEC):
        if file.name.endswith(("inst", "rm", "rules", ".spec")):
            assert "SPDX-License-Identifier: LGPL-2.1-or-later\n" in file.read_text()


# The state's format


def preinst(tmp_path: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run the script as dpkg does, over another state."""
    text = (DEBIAN / "libvirt-natns.preinst").read_text()
    text = text.replace("#STATE_FORMAT#", str(VERSION)).replace("#VERSION#", __version__)
    text = text.replace("/var/lib/libvirt-natns", str(tmp_path)).replace("#DEBHELPER#", "")
    text = text.replace("/usr/local/", f"{tmp_path}/")
    script = tmp_path / "preinst"
    script.write_text(text)
    return subprocess.run(
        ["/bin/sh", script, *arguments],
        env={"PATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(params=["with Python", "without"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A PATH; at a package's first installation, Python need not be there."""
    if request.param == "with Python":
        return "/usr/bin:/bin"
    (tmp_path / "bin").mkdir()
    for program in ("head", "tr", "od"):
        (tmp_path / "bin" / program).symlink_to(f"/usr/bin/{program}")
    return str(tmp_path / "bin")


@pytest.mark.parametrize("found", [0, 1, VERSION, VERSION + 1, 258])
def test_a_later_format_is_refused(found: int, path: str, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "state.db")) as database:
        database.execute("CREATE TABLE writer (format INTEGER, version TEXT)")
        database.execute(f"PRAGMA user_version = {found}")
        database.commit()
    for verb in (("install",), ("upgrade", "0.1.0")):
        done = preinst(tmp_path, *verb, path=path)
        assert done.returncode == (1 if found > VERSION else 0), done.stderr
        assert done.stdout == ""
        if found > VERSION:
            assert f"has format {found}, written by a later version (version " in done.stderr
            assert done.stderr.count("\n") == 1
    assert preinst(tmp_path, "abort-upgrade", "9", path=path).returncode == 0


@pytest.mark.parametrize("content", [b"", b"SQLite", b"no database" * 99])
def test_any_other_file_is_none_of_it(content: bytes, path: str, tmp_path: Path) -> None:
    (tmp_path / "state.db").write_bytes(content)
    assert preinst(tmp_path, "install", path=path).returncode == 0
    (tmp_path / "state.db").unlink()
    assert preinst(tmp_path, "install", path=path).returncode == 0
