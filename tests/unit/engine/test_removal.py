# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files that go with a network, and the files that stay."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq, dnsmasq_process
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.engine import removal
from libvirt_natns.kernel.session import Kernel

UUID = "c0ffee00-0000-4000-8000-000000000001"
OTHER = "c0ffee00-0000-4000-8000-000000000002"


def test_the_guests_leases_go_with_their_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a host without libvirt's lease helper; with it, libvirt has the file."""
    for name in ("RUN_DIRECTORY", "STATE_DIRECTORY", "NETNS_DIRECTORY"):
        monkeypatch.setattr(names, name, tmp_path / name)
    monkeypatch.setattr(dnsmasq_process, "lease_options", list)
    links = SimpleNamespace(delete_group=lambda *_: None)
    kernel = cast("Kernel", SimpleNamespace(host=SimpleNamespace(links=links)))
    files = [names.STATE_DIRECTORY / "leases" / uuid for uuid in (UUID, OTHER)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.write_text("1795980001 52:54:00:00:00:05 10.0.0.5 web *\n")
    dnsmasq.ensure(Daemon(UUID, "nat-a", "virbr10", None))
    dnsmasq.stop(UUID)
    assert all(file.exists() for file in files), "a restart keeps the leases"
    removal.remove(kernel, UUID, None)
    assert [file.exists() for file in files] == [False, True]
    removal.remove(kernel, UUID, None)
    removal.remove(kernel, OTHER, None)
    assert not files[0].parent.exists()
