# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service at its start: what it gets ready for."""

from contextlib import closing
from pathlib import Path

import pytest

from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.service.daemon import expects_a_start
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.state.store import Store


@pytest.mark.parametrize(
    ("state", "boot", "expected"),
    [("down", boot_id(), True), ("up", "before the reboot", True), ("up", boot_id(), False)],
)
def test_a_start_is_expected_where_a_network_does_not_run(
    state: NetworkState, boot: str, expected: bool, tmp_path: Path
) -> None:
    with closing(Store(tmp_path)) as store:
        assert not expects_a_start(store)
        store.networks.put(
            NetworkRecord("uuid-a", "a", "nat-a", "virbr10", "office", "bridge",
                          (), True, state, boot, 0.0, b"")
        )  # fmt: skip
        assert expects_a_start(store) == expected
