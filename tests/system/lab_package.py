# SPDX-License-Identifier: LGPL-2.1-or-later
"""Debian's package of this checkout, and a machine on which it can be installed."""

import hashlib
import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp

from lab_base import CHECKOUT, run

PLACE = CHECKOUT / ".cache" / "package"
"""Packages by the digest of their source: below the checkout, where each sandbox sees them."""

OLD = 3600.0
"""Seconds after which no test can use a package of another source any more."""

SOURCES = (
    "CHANGELOG.md", "LICENSE", "README.md", "contrib", "debian", "docs", "hooks",
    "libvirt_natns", "man", "pyproject.toml", "setup.cfg", "xml",
)  # fmt: skip

WRITABLE = """
    over() {
        layer=/run/layers$1
        mkdir -p $layer/upper $layer/work
        mount -t overlay -o lowerdir=$1,upperdir=$layer/upper,workdir=$layer/work sandbox $1
    }
    over /usr
    # libvirt's log is the sandbox's own already.
    mkdir -p /run/layers/libvirt
    mount --bind /var/log/libvirt /run/layers/libvirt
    over /var/log
    mount --bind /run/layers/libvirt /var/log/libvirt
    for directory in apt debconf ldconfig man; do
        [ ! -d /var/cache/$directory ] || over /var/cache/$directory
    done
    # The index of all manual pages of the machine is not what is tested.
    rm -f /var/lib/man-db/auto-update
"""
"""Lines of a script: apt-get and dpkg may write, and the machine's own files stay as they are.

/etc and /var/lib are the sandbox's own."""


def built() -> Path:
    """The package of this checkout; it is built once for a state of the source."""
    place = PLACE / digest()
    if not place.is_dir():
        PLACE.mkdir(parents=True, exist_ok=True)
        _forget_old()
        fresh = Path(mkdtemp(dir=PLACE))
        run(CHECKOUT / "contrib" / "build-package", fresh, timeout=300)
        fresh.chmod(0o755)
        # Another process may have built it meanwhile.
        with suppress(OSError):
            fresh.rename(place)
    (package,) = place.glob("*.deb")
    return package


def _forget_old() -> None:
    for other in PLACE.iterdir():
        if other.stat().st_mtime < time.time() - OLD:
            shutil.rmtree(other, ignore_errors=True)


def digest() -> str:
    """A digest of all files that the package is made from."""
    whole = hashlib.sha256()
    for name in SOURCES:
        place = CHECKOUT / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.is_file() and "__pycache__" not in file.parts:
                whole.update(os.fsencode(file.relative_to(CHECKOUT)))
                whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def inside(script: str, timeout: float = 600) -> dict[str, str]:
    """Run a shell script in a sandbox with a fresh libvirt; the output by its "== WORD" lines."""
    sandbox = CHECKOUT / "contrib" / "sandbox"
    done = run(sandbox, "--libvirt", "--", "sh", "-euc", script, timeout=timeout)
    parts = re.split(r"(?m)^== (.*)\n", "== start\n" + done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
