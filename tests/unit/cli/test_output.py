# SPDX-License-Identifier: LGPL-2.1-or-later
"""Commands whose output cannot be written do their work all the same."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[3]
PROGRAM = f"""
import sys
sys.path.append({str(CHECKOUT)!r})
from pathlib import Path
from libvirt_natns.cli import commands, status

def work(options):
    for number in range(20000):
        print("a line of output")
        print("a warning", file=sys.stderr)
    Path(sys.argv[1]).touch()
    return 3

status.run = work
sys.exit(commands.main(["status"]))
"""


@pytest.mark.parametrize(
    ("redirections", "status"),
    [
        (">/dev/null 2>/dev/null", 3),
        (">/dev/full 2>/dev/null", 1),
        (">/dev/null 2>/dev/full", 3),
        (">/dev/full 2>/dev/full", 1),
        (">&- 2>&-", 3),
        ("2>/dev/null | head -n 1", 3),
        ("2>&1 >/dev/null | head -n 1", 3),
    ],
)
def test_the_work_is_done(redirections: str, status: int, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirections}; exit ${{PIPESTATUS[0]}}', "bash",
         sys.executable, "-c", PROGRAM, str(tmp_path / "done")],
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert (tmp_path / "done").exists()
    assert b"Traceback" not in done.stderr


def test_a_full_disk_is_told() -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" >/dev/full', "bash", sys.executable, "-m", "libvirt_natns", "metrics"],
        capture_output=True, text=True, check=False, cwd=CHECKOUT,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
