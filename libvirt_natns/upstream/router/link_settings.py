# SPDX-License-Identifier: LGPL-2.1-or-later
"""Settings of a link below /proc/sys/net, by directory and key, without the link's name."""

from contextlib import suppress
from pathlib import Path

from libvirt_natns.kernel import netns

ROOT = Path("/proc/sys/net")
DIRECTORIES = ("ipv6/conf", "ipv4/conf", "ipv4/neigh", "ipv6/neigh")
"""Each of them has a directory for each link."""


def read(namespace: str | None, link: str) -> dict[str, str]:
    """Return all settings of a link that can be read."""
    settings = {}
    with netns.entered(namespace):
        for directory in DIRECTORIES:
            place = ROOT / directory / link
            for file in place.iterdir() if place.is_dir() else ():
                # The kernel lets some be read only after they were set.
                with suppress(OSError):
                    settings[f"{directory}/{file.name}"] = file.read_text().strip()
    return settings


def write(namespace: str | None, link: str, settings: dict[str, str]) -> None:
    """Set those that differ, except settings that the kernel does not have or refuses."""
    present = read(namespace, link)
    with netns.entered(namespace):
        for key, text in settings.items():
            if present.get(key, text) != text:
                directory, _, leaf = key.rpartition("/")
                # The kernel refuses some values that it shows itself.
                with suppress(OSError):
                    (ROOT / directory / link / leaf).write_text(text)
