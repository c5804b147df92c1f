# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's package, by dpkg: installed, replaced, refused, removed and purged, beside networks.

The sandbox's own /usr is written to, and ends with the sandbox.
"""

import json
import re
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    FastGuest,
    Libvirtd,
    Provider,
    Result,
    define_network,
    isolated,
    remove_config,
    run,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_package import SOURCES, WRITABLE, built
from lab_sides import HOOKS, MAC, STATE, two_networks
from views import namespaces

REAL_INTERPRETER = True

PROGRAM = Path("/usr/bin/virt-natns")
MODULES = Path("/usr/lib/python3/dist-packages/libvirt_natns")
CONFIG = Path("/etc/libvirt-natns/config.toml")
DATABASE = STATE / "state.db"
WANTS = Path("/etc/systemd/system")
FOREIGN = "#!/bin/sh\n# An administrator's own.\nexec cat >/dev/null\n"


@pytest.fixture(scope="module", autouse=True)
def package(libvirtd: Libvirtd) -> Path:
    """The package, on a machine of its own."""
    package = built()
    run("sh", "-euc", WRITABLE)
    return package


@pytest.fixture(autouse=True)
def purged(nothing_left: None) -> Iterator[None]:
    """No package before the test, and none after it."""
    yield
    dpkg("--purge", "libvirt-natns", check=False)
    remove_config()
    for file in STATE.glob("*"):
        file.unlink()


def dpkg(*arguments: str | Path, check: bool = True) -> Result:
    return run("dpkg", *arguments, check=check, timeout=120)


def state_of_package() -> str:
    return run(
        "dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "libvirt-natns", check=False
    ).stdout


def repacked(package: Path, directory: Path, version: str) -> Path:
    """The package as another version, with another module in it."""
    tree = directory / version
    run("dpkg-deb", "--raw-extract", package, tree)
    control = tree / "DEBIAN" / "control"
    control.write_text(re.sub(r"(?m)^Version: .*", f"Version: {version}", control.read_text()))
    module = tree / MODULES.relative_to("/") / "__init__.py"
    module.write_text(re.sub('(?m)^__version__ = .*"', f'__version__ = "{version}"',
                             module.read_text()))  # fmt: skip
    run("dpkg-deb", "--root-owner-group", "--build", tree, directory)
    return directory / f"libvirt-natns_{version}_all.deb"


def ours() -> set[str]:
    """All files of ours on the machine, without those of the checkout."""
    found = set()
    for place in ("/etc", "/var/lib", "/usr", "/run"):
        named = run("find", place, "-path", "*natns*", "-not", "-type", "d", check=False).stdout
        found |= set(named.splitlines())
    # dpkg's own record of a package is gone after a purge only.
    return {each for each in found if not each.startswith(("/run/layers", "/run/tmp"))}


# -- the package itself ------------------------------------------------------


def test_lintian_has_nothing_to_say(package: Path) -> None:
    assert run("lintian", "--fail-on", "error,warning", package, timeout=120).stdout == ""


def test_the_same_source_makes_the_same_package(package: Path, tmp_path: Path) -> None:
    """In another directory, at another time, with other modes."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in SOURCES:
        run("cp", "-R", CHECKOUT / name, elsewhere)
    run("chmod", "-R", "go-rwx", elsewhere)
    run(elsewhere / "contrib" / "build-package", tmp_path, timeout=300)
    (again,) = tmp_path.glob("*.deb")
    assert again.read_bytes() == package.read_bytes()


# -- coming and going --------------------------------------------------------


def test_networks_are_taken_over_and_given_back(package: Path, provider: Provider) -> None:
    before = ours()
    write_config(provider.config(more="probe = 0"))
    define_network(isolated("a", "virbr10"))
    virsh("net-start", "a")
    installed = dpkg("--install", package)
    assert "networks that get a NAT router from now on:\n  a\n" in installed.stdout
    assert "a: is active in libvirt, but has no router: made a router\n" in installed.stdout
    for hook in ("network", "qemu", "lxc"):
        assert f"\nlibrary={MODULES.parent}\n" in (HOOKS / hook).read_text()
    assert run(PROGRAM, "check").stdout == ""
    with FastGuest("virbr10", MAC) as guest:
        guest.dhcp()
        assert guest.curl(f"http://{provider.gateway}/").startswith("192.168.0.100:")

        removed = dpkg("--remove", "libvirt-natns")
        assert "a: given back to libvirt\n" in removed.stdout
        assert namespaces() == set()
        assert not any(HOOKS.iterdir())
        assert "10.0.0.1/24" in run("ip", "-br", "address", "show", "virbr10").stdout
        assert "router" not in guest.dhcp()
    assert DATABASE.exists()
    assert CONFIG.exists()

    # The networks have their addresses again: a removal forgets nothing.
    define_network(isolated("b", "virbr11", address="10.1.0.1"))
    dpkg("--install", package)
    virsh("net-start", "b")
    listed = json.loads(run(PROGRAM, "status", "--json").stdout)["networks"]
    assert {each["network"]: each["address"] for each in listed} == {
        "a": "192.168.0.100", "b": "192.168.0.101",
    }  # fmt: skip
    for name in ("a", "b"):
        virsh("net-destroy", name)

    dpkg("--purge", "libvirt-natns")
    assert state_of_package() == ""
    assert ours() == before


def test_units_are_enabled_and_forgotten(package: Path) -> None:
    dpkg("--install", package)
    links = {file.name: file for file in WANTS.glob("*.wants/libvirt-natns*")}
    assert set(links) == {"libvirt-natns.service", "libvirt-natns.socket"}
    assert all(link.resolve(strict=True) for link in links.values())
    # An administrator's choice outlives another version, and another installation.
    links["libvirt-natns.service"].unlink()
    dpkg("--install", package)
    assert not links["libvirt-natns.service"].is_symlink()
    dpkg("--remove", "libvirt-natns")
    dpkg("--install", package)
    assert not links["libvirt-natns.service"].is_symlink()
    assert links["libvirt-natns.socket"].is_symlink()
    dpkg("--purge", "libvirt-natns")
    assert not any(link.is_symlink() for link in links.values())


def test_an_administrators_hook_stays(package: Path) -> None:
    hook = HOOKS / "network"
    hook.write_text(FOREIGN)
    hook.chmod(0o755)
    try:
        dpkg("--install", package)
        assert hook.read_text() == FOREIGN
        assert (HOOKS / "network.d" / "libvirt-natns").exists()
        start_network(isolated("a", "virbr10"))
        assert namespaces() == {"nat-a"}
        dpkg("--purge", "libvirt-natns")
        assert hook.read_text() == FOREIGN
        assert [file.name for file in HOOKS.rglob("*")] == ["network"]
    finally:
        hook.unlink()


def test_a_wrong_configuration_leaves_no_half_package(package: Path) -> None:
    write_config("scope = 1\n")
    done = dpkg("--install", package)
    assert f"virt-natns: {CONFIG}: scope: is 1" in done.stderr
    assert "libvirt-natns: not everything is set up" in done.stderr
    assert state_of_package().startswith("installed ")
    remove_config()
    run(PROGRAM, "install")
    assert (HOOKS / "network").exists()


@pytest.mark.parametrize("name", ["program", "networks"])
def test_debians_own_tests_pass(name: str, package: Path) -> None:
    """The scripts that autopkgtest runs on a machine with the package."""
    dpkg("--install", package)
    done = run("sh", CHECKOUT / "debian" / "tests" / name, timeout=120)
    assert done.stdout.splitlines()[-1] in ("both networks had their routers",
                                            "virt-natns 0.2.0 is whole")  # fmt: skip


# -- another version ---------------------------------------------------------


def test_another_version_interrupts_nothing(package: Path, tmp_path: Path) -> None:
    later, earlier = (repacked(package, tmp_path, version) for version in ("9.9", "0.1.9"))
    dpkg("--install", package)
    with two_networks("auto") as world:
        run(PROGRAM, "sync")
        sides = (world.a, world.b)
        kept = [(side.indexes(), side.dnsmasq()) for side in sides]
        for other, version in ((later, "9.9"), (earlier, "0.1.9"), (package, "")):
            done = dpkg("--install", other)
            assert "networks that" not in done.stdout
            assert state_of_package().endswith(version)
            assert version in run(PROGRAM, "--version").stdout
            assert [(side.indexes(), side.dnsmasq()) for side in sides] == kept
            assert all(side.talks() for side in sides)
            assert run(PROGRAM, "check").stdout == ""


def test_a_version_that_cannot_read_the_state_is_refused(package: Path) -> None:
    dpkg("--install", package)
    start_network(isolated("a", "virbr10"))
    with closing(sqlite3.connect(DATABASE)) as database, database:
        database.execute("INSERT INTO writer VALUES (99, '7.0.0')")
        database.execute("PRAGMA user_version = 99")
        database.commit()
        # The change is in the log alone, as long as this connection is open.
        refused = dpkg("--install", package, check=False)
    assert refused.returncode != 0
    assert (
        f"libvirt-natns: state database {DATABASE}: has format 99, written by version 7.0.0"
        " (version 0.2.0 reads formats 1 to 3): keep version 7.0.0, or move" in refused.stderr
    )
    # All goes on as before.
    assert state_of_package().startswith("installed ")
    assert namespaces() == {"nat-a"}
    assert (HOOKS / "network").exists()
    for file in STATE.glob("state.db*"):
        file.unlink()
    run(PROGRAM, "sync")
    dpkg("--install", package)
    assert run(PROGRAM, "check").stdout == ""


def test_a_damaged_state_does_not_hinder(package: Path) -> None:
    STATE.mkdir(exist_ok=True)
    DATABASE.write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    DATABASE.write_text("this is no database\n" * 300)
    assert dpkg("--install", package).returncode == 0


def test_hooks_wait_for_the_last_module(package: Path) -> None:
    """A hook would find modules of two versions while dpkg puts one after the other in place."""
    dpkg("--install", package)
    marker, module = MODULES / "values.py.dpkg-new", MODULES / "hook.py"
    text = module.read_text()
    define_network(isolated("a", "virbr10"))
    marker.touch()
    module.write_text("from libvirt_natns.values import not_there_yet\n")
    command = ["virsh", "-q", "net-start", "a"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as start:
        try:
            hook = f"{HOOKS}/network a start begin"
            wait_for(lambda: run("pgrep", "-f", hook, check=False).returncode == 0)
            module.write_text(text)
        finally:
            marker.unlink()
        assert start.wait(60) == 0, start.stderr
    assert namespaces() == {"nat-a"}


# -- where it must not go ----------------------------------------------------


def test_beside_an_installation_below_usr_local_it_is_refused(package: Path) -> None:
    place = Path("/usr/local/lib/python3.11/dist-packages/libvirt_natns")
    place.mkdir(parents=True)
    try:
        refused = dpkg("--install", package, check=False)
        assert refused.returncode != 0
        assert f"libvirt-natns: {place}: an installation without the package" in refused.stderr
        assert not PROGRAM.exists()
    finally:
        place.rmdir()


def test_a_router_that_is_up_keeps_the_package(package: Path) -> None:
    dpkg("--install", package)
    journal = STATE / "routers" / "wan.json"
    journal.parent.mkdir()
    journal.write_text("{}")
    try:
        refused = dpkg("--remove", "libvirt-natns", check=False)
        assert refused.returncode != 0
        assert "router wan is up: virt-natns router down wan" in refused.stderr
        assert state_of_package().startswith("installed ")
        assert (HOOKS / "network").exists()
    finally:
        journal.unlink()
        journal.parent.rmdir()


def test_a_chroot_gets_files_alone(package: Path) -> None:
    """An image is made on a host that has networks of its own."""
    dpkg("--install", package)
    start_network(isolated("a", "virbr10"))
    root = Path("/run/tmp/image")
    with ExitStack() as cleanup:
        for each in ("", ".upper", ".work"):
            Path(f"{root}{each}").mkdir()
            cleanup.callback(run, "rm", "-rf", f"{root}{each}")
        layers = f"lowerdir=/,upperdir={root}.upper,workdir={root}.work"
        run("mount", "-t", "overlay", "-o", layers, "image", root)
        cleanup.callback(run, "umount", root)
        run("mount", "-t", "proc", "proc", root / "proc")
        cleanup.callback(run, "umount", root / "proc")
        inner = root / "tmp" / package.name
        inner.write_bytes(package.read_bytes())
        for verb, there in ((("--install", f"/tmp/{package.name}"), True),
                            (("--purge", "libvirt-natns"), False)):  # fmt: skip
            run("chroot", root, "dpkg", *verb, timeout=120)
            assert (root / "etc/libvirt/hooks/network").exists() == there
            assert (root / "usr/bin/virt-natns").exists() == there
            assert run(PROGRAM, "check").stdout == "", "the host's network is as it was"
    assert namespaces() == {"nat-a"}
