# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a router uses of its NIC's DHCP lease."""

from pathlib import Path
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.upstream.router import nic_lease
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target


def test_values_of_a_lease_that_a_router_does_not_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routes into its own sides; and a lease that is refused changes nothing at all."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    target = Target(
        name="wan", nic="ens3", backend="nftables", host_subnet="198.19.248.0/30", ports=(),
        addresses6=(), transit="198.19.252.0/22", leased=True,
    )  # fmt: skip
    directory = nic_lease.client_directory(target)
    directory.mkdir(parents=True)
    file = directory / "lease"
    good = "ip=192.0.2.9\nmask=24\nrouter=192.0.2.1\n"
    routes = "routes=0.0.0.0/0 192.0.2.1 198.19.252.0/22 192.0.2.7 198.19.248.0/30 192.0.2.7\n"
    file.write_text(good)
    assert nic_lease.left_out(target) == []
    file.write_text(good + routes)
    used = nic_lease.used_lease(target, nic_lease.current(target))
    assert used is not None
    assert used.routes == ()
    assert str(used.gateway) == "192.0.2.1"
    assert (
        "198.19.252.0/22 via 192.0.2.7: leads into the private subnet"
        in nic_lease.left_out(target)[0]
    )
    for hostile in ("ip=198.19.252.9\nmask=24\n", "ip=192.0.2.9\nmask=0\n"):
        file.write_text(hostile)
        assert nic_lease.used_lease(target, nic_lease.current(target)) is None
        (told,) = nic_lease.left_out(target)
        assert told.startswith("the DHCP lease is not used: ")
        # Nothing is asked of the kernel: there is no such namespace.
        nic_lease.apply(target, cast("Capture", None))
