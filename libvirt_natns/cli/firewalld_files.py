# SPDX-License-Identifier: LGPL-2.1-or-later
"""Our zone and policies in firewalld's directory: write them, compare them, and remove them.

A file has a digest of itself in a comment.  firewalld writes a file anew, without comments,
when an administrator changes the zone or policy.  So a file that an administrator has changed
is told from a file of an earlier version of ours, and is neither overwritten nor removed.

The files are written whether firewalld is there or not: it may be installed later.
"""

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from libvirt_natns.daemons.firewalld import ZONE
from libvirt_natns.errors import InstallError
from libvirt_natns.model.transit_segment import RELAY_PORT

DIRECTORY = Path("/etc/firewalld")
SETTINGS = "firewalld.conf"
"""The file in the directory that firewalld's own package brings."""

ZONE_FILE = f"zones/{ZONE}.xml"
OUT_FILE, IN_FILE = f"policies/{ZONE}-out.xml", f"policies/{ZONE}-in.xml"

DECLARATION = '<?xml version="1.0" encoding="utf-8"?>\n'
MARK = re.compile(r"<!-- libvirt-natns: ([0-9a-f]{64}) -->\n")
USES_ZONE = re.compile(rf"""<(?:in|e)gress-zone\s+name\s*=\s*["']{ZONE}["']""")


ZONE_TEXT = f"""<zone>
  <short>{ZONE}</short>
  <description>For the transit bridges of libvirt-natns, which puts them here. Guests of
isolated networks reach the services of this zone on the host, and nothing else of the host.
Port {RELAY_PORT} is the DNS relay, which the networks themselves ask for the names of the host.
The policies {ZONE}-out and {ZONE}-in are about packets that the host forwards.</description>
  <service name="dns"/>
  <service name="ssh"/>
  <port port="{RELAY_PORT}" protocol="udp"/>
  <port port="{RELAY_PORT}" protocol="tcp"/>
  <protocol value="icmp"/>
  <protocol value="ipv6-icmp"/>
</zone>
"""
POLICY_TEXT = """<policy target="ACCEPT">
  <short>{}</short>
  <description>{} The rules of libvirt-natns itself let nothing else pass.</description>
  <ingress-zone name="{}"/>
  <egress-zone name="{}"/>
</policy>
"""
OUT = "Guests of the networks of libvirt-natns reach places outside of the host."
IN = "Published ports, and addresses of guests that are not translated, are reached from outside."
FILES = {
    ZONE_FILE: ZONE_TEXT,
    OUT_FILE: POLICY_TEXT.format(f"{ZONE}-out", OUT, ZONE, "ANY"),
    IN_FILE: POLICY_TEXT.format(f"{ZONE}-in", IN, "ANY", ZONE),
}
"""The zone first: firewalld refuses all of its configuration if a policy's zone is missing."""


def render(name: str) -> str:
    """Return the text of a file."""
    text = DECLARATION + FILES[name]
    mark = f"<!-- libvirt-natns: {_digest(text)} -->\n"
    return text.replace(DECLARATION, DECLARATION + mark, 1)


def is_untouched(file: Path) -> bool:
    """True if a file is as some version of ours has written it."""
    try:
        text = file.read_text()
    except (OSError, ValueError):
        return False
    mark = MARK.search(text)
    return mark is not None and mark[1] == _digest(text.replace(mark[0], "", 1))


def install() -> list[str]:
    """Write all files, and return a line for each that was written, or is an administrator's.

    Raises InstallError.
    """
    lines = []
    try:
        for name in FILES:
            file, text = DIRECTORY / name, render(name)
            if file.exists() and not is_untouched(file):
                lines.append(f"kept {file}, which was changed here")
            elif not file.exists() or file.read_text() != text:
                _write(file, text)
                lines.append(f"installed {file}")
    except OSError as error:
        raise InstallError(
            f"cannot write {error.filename} ({error.strerror})",
            "networks will not pass firewalld; run virt-natns install again",
        ) from error
    return lines


def remove() -> list[str]:
    """Remove our files, and return a line for each that was removed or is kept.

    A file that an administrator has changed is kept, and so is a zone that a policy uses.
    Raises InstallError.
    """
    lines = []
    try:
        for name in reversed(FILES):
            file = DIRECTORY / name
            if not file.exists():
                continue
            if not is_untouched(file):
                lines.append(f"kept {file}, which was changed here")
            elif name == ZONE_FILE and _zone_is_used():
                lines.append(f"kept {file}, as a policy of firewalld uses the zone")
            else:
                file.unlink()
                lines.append(f"removed {file}")
    except OSError as error:
        raise InstallError(f"cannot remove {error.filename} ({error.strerror})") from error
    if not (DIRECTORY / SETTINGS).exists():
        _remove_empty()
    return lines


def _remove_empty() -> None:
    """Remove directories that ``install`` has made, as firewalld is not installed."""
    for directory in (DIRECTORY / "policies", DIRECTORY / "zones", DIRECTORY):
        # A directory with something else in it, or none, is left alone.
        with suppress(OSError):
            directory.rmdir()


def _zone_is_used() -> bool:
    """True if a policy is about our zone, which must not vanish then."""
    policies = (DIRECTORY / "policies").glob("*.xml")
    return any(USES_ZONE.search(file.read_text(errors="replace")) for file in policies)


def _write(file: Path, text: str) -> None:
    for directory in (DIRECTORY, file.parent):
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
    # firewalld may read the directory at any moment, files named *.xml alone.
    fresh = file.with_name(f".{file.name}.new")
    fresh.write_text(text)
    fresh.chmod(0o644)
    fresh.replace(file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
