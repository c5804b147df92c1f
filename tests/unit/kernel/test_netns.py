# SPDX-License-Identifier: LGPL-2.1-or-later
"""Namespaces and their names: what others may do to the directory they stand in."""

import errno
import os
import time
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.kernel import locks, netns
from libvirt_natns.kernel.locks import locked


def test_anybodys_lock_is_waited_for_a_moment_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may open /run/netns may lock it; ours is where only root may."""
    mounted: list[bytes] = []

    def call(function: str, *arguments: object) -> None:
        if function == "mount" and arguments[0] == b"" and not mounted:
            raise OSError(errno.EINVAL, "no mount point")
        if arguments[0]:
            assert isinstance(arguments[1], bytes)
            mounted.append(arguments[1])

    monkeypatch.setattr(netns, "_call", call)
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "natns")
    monkeypatch.setattr(names, "NETNS_DIRECTORY", tmp_path / "netns")
    monkeypatch.setattr(names, "namespace_path", lambda name: str(tmp_path / "netns" / name))
    (tmp_path / "netns").mkdir()
    with locked(tmp_path / "netns"):
        began = time.monotonic()
        netns.bind("nat-a", 0)
        assert netns.IP_LIMIT <= time.monotonic() - began < locks.LIMIT
        began = time.monotonic()
        netns.bind("nat-b", 0)
        assert time.monotonic() - began < netns.IP_LIMIT
    inside = os.fsencode(tmp_path / "netns")
    assert mounted == [inside, inside + b"/nat-a", inside + b"/nat-b"]
    # The lock leaves nothing behind.
    assert list((tmp_path / "natns").iterdir()) == []
