# SPDX-License-Identifier: LGPL-2.1-or-later
"""contrib/install-packages with an apt-get that does nothing, or kills it."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "contrib" / "install-packages"
ADMINISTRATORS = "#!/bin/sh\nexit 101\n"
KILL = "kill -9 $PPID"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Where a copy of the script has its policy; there is one by the administrator."""
    policy = tmp_path / "policy-rc.d"
    text = SCRIPT.read_text()
    assert text.count("/usr/sbin/policy-rc.d") == 1
    (tmp_path / "script").write_text(text.replace("/usr/sbin/policy-rc.d", str(policy)))
    (tmp_path / "packages").write_text("test: a b\n")
    (tmp_path / "bin").mkdir()
    program(tmp_path, "id", "echo 0")
    program(tmp_path, "dpkg-query", "exit 1")
    policy.write_text(ADMINISTRATORS)
    return policy


def program(directory: Path, name: str, text: str) -> None:
    file = directory / "bin" / name
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)


def run(policy: Path, apt_get: str) -> int:
    """Run the script; returns its exit status."""
    here = policy.parent
    program(here, "apt-get", apt_get)
    path = f"{here / 'bin'}:/usr/bin:/bin"
    done = subprocess.run(
        ["/bin/sh", str(here / "script"), "test"],
        env={"PATH": path, "TMPDIR": str(here)}, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode


def test_nothing_starts_meanwhile(policy: Path) -> None:
    assert run(policy, f"cp {policy} {policy}.seen") == 0
    assert "exit 101" in policy.with_name("policy-rc.d.seen").read_text()
    assert policy.read_text() == ADMINISTRATORS
    policy.unlink()
    assert run(policy, "exit 1") == 1
    assert not policy.exists()


@pytest.mark.parametrize("before", [True, False])
def test_what_a_killed_run_left_is_not_taken_for_the_administrators(
    policy: Path, before: bool
) -> None:
    if not before:
        policy.unlink()
    for _ in range(2):
        assert run(policy, KILL) == -9
        assert policy.read_text() != ADMINISTRATORS
    assert run(policy, "exit 0") == 0
    assert policy.exists() == before
    assert not before or policy.read_text() == ADMINISTRATORS


def test_nothing_left_to_install(policy: Path) -> None:
    assert run(policy, KILL) == -9
    program(policy.parent, "dpkg-query", "echo installed")
    assert run(policy, "exit 1") == 0
    assert policy.read_text() == ADMINISTRATORS
    assert not policy.with_name("policy-rc.d.kept-by-natns").exists()


def test_a_link_that_leads_nowhere_is_not_written_through(policy: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    policy.unlink()
    policy.symlink_to(target)
    assert run(policy, f"cp -P {policy} {policy}.seen; test ! -e {target}") == 0
    assert not policy.with_name("policy-rc.d.seen").is_symlink()
    assert policy.is_symlink()
    assert not target.exists()
    # Nor is what it leads to taken for ours.
    target.write_text(ADMINISTRATORS)
    assert run(policy, "exit 0") == 0
    assert policy.is_symlink()
    assert target.read_text() == ADMINISTRATORS
