# SPDX-License-Identifier: LGPL-2.1-or-later
"""The package for Fedora, as far as Debian's rpm can build it, and rpmlint can judge it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import CHECKOUT, PYTHON, run
from lab_package import SOURCES

from libvirt_natns import __version__

SPEC = CHECKOUT / "contrib" / "rpm" / "libvirt-natns.spec"

MACROS = rf"""
%python3 {PYTHON}
%python3_sitelib /usr/lib/python3.13/site-packages
%_unitdir /usr/lib/systemd/system
%_sharedstatedir /var/lib
%pyproject_files %{{_builddir}}/files
%pyproject_buildrequires true
%pyproject_wheel {PYTHON} -I -m pip -q wheel --no-deps --no-index --no-build-isolation -w dist .
%pyproject_install \
    {PYTHON} -I -m installer --no-compile-bytecode --destdir %{{buildroot}}.deb dist/*.whl 2>&1 \
    mkdir -p %{{buildroot}}/usr/lib %{{buildroot}}%{{python3_sitelib}} \
    cd %{{buildroot}}.deb/usr/local \
    cp -R bin share %{{buildroot}}/usr \
    cp -R lib/systemd %{{buildroot}}/usr/lib \
    cp -R lib/python3*/dist-packages/* %{{buildroot}}%{{python3_sitelib}} \
    cd - \
    rm -r %{{buildroot}}.deb
%pyproject_save_files() echo '%{{python3_sitelib}}/libvirt_natns*' >%{{pyproject_files}}
%systemd_post() true %*
%systemd_preun() true %*
%systemd_postun_with_restart() true %*
"""
"""What Fedora's own macros do, with the tools of Debian, whose pip has places of its own."""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    top = tmp_path_factory.mktemp("rpm")
    source = top / f"libvirt-natns-{__version__}"
    source.mkdir()
    for name in SOURCES:
        run("cp", "-R", CHECKOUT / name, source)
    (top / "SOURCES").mkdir()
    archive = top / "SOURCES" / f"{source.name}.tar.gz"
    run("tar", "-czf", archive, "-C", top, "--exclude=__pycache__", source.name)
    (top / "macros").write_text(MACROS)
    options = ("-bb", "--nodeps", "--load", top / "macros", "--define", f"_topdir {top}")
    run("rpmbuild", *options, SPEC, timeout=300)
    (built,) = (top / "RPMS").rglob("*.rpm")
    yield built


def query(package: Path, *options: str) -> list[str]:
    return run("rpm", "-qp", "--nosignature", *options, package).stdout.splitlines()


def test_the_package_is_whole(package: Path) -> None:
    files = set(query(package, "--list"))
    assert "/usr/bin/virt-natns" in files
    for unit in (CHECKOUT / "contrib" / "systemd").iterdir():
        assert f"/usr/lib/systemd/system/{unit.name}" in files
    for page in (CHECKOUT / "man").iterdir():
        assert any(file.startswith(f"/usr/share/man/man{page.suffix[1:]}/{page.name}")
                   for file in files)  # fmt: skip
    modules = {file for file in files if file.endswith(".py")}
    there = len(list((CHECKOUT / "libvirt_natns").rglob("*.py")))
    assert len(modules) == there
    assert not [file for file in files if "/usr/local" in file]
    # The legacy backend is not Fedora's.
    assert "nftables" in query(package, "--requires")


def test_scripts_call_the_program(package: Path) -> None:
    scripts = "\n".join(query(package, "--scripts"))
    assert "virt-natns install --package || :" in scripts
    assert '[ "$1" -gt 0 ] || virt-natns uninstall --package' in scripts


def test_rpmlint_has_no_error(package: Path) -> None:
    assert "1 specfiles checked; 0 errors" in run("rpmlint", SPEC).stdout
