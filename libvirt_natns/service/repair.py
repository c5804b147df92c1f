# SPDX-License-Identifier: LGPL-2.1-or-later
"""Repairs of one network, or of the host: compare it with what it should be, and bring it up.

The verb changes only what differs, so the intact parts stay untouched.
"""

from collections.abc import Callable

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.observer import HOST
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.engine.up import NotUpError
from libvirt_natns.errors import NatnsError
from libvirt_natns.state.networks import NetworkRecord


class NoBridgeError(NatnsError):
    """libvirt's bridge is missing."""


RepairVerb = Callable[[Engine, str, NetworkRecord | None], list[str] | None]


def repair(engine: Engine, uuid: str, record: NetworkRecord | None) -> list[str] | None:
    """Repair a network, or HOST, and return the differences that there were.

    Returns None while a start goes on: an unfinished start is no damage.

    Raises NotUpError for a network that is not up, and RecordChangedError where the
    network has another record by now.  Raises NoBridgeError, or the error of a verb.
    """
    # Another process may have changed what there is to watch.
    with engine.observer.changing(uuid):
        pass
    if uuid == HOST:
        return _repair_host(engine)
    if record is None or not record.runs:
        raise NotUpError(f"network {uuid} is not up")
    if record.state != "up":
        return None
    if engine.kernel.host.links.get(record.bridge) is None:
        raise NoBridgeError(f"bridge {record.bridge} is missing", "start the network anew")
    # The look takes no lock, so it delays no verb; and the watch goes on hearing of damage.
    if not comparison.network_differences(engine, record):
        return []
    repaired = engine.repair(record)
    # The network's upstream may be gone from the configuration.
    Guests(engine).follow_move(record, libvirt_xml.parse_network(record.document))
    return repaired


def _repair_host(engine: Engine) -> list[str] | None:
    starts = engine.store.networks.all("preparing", "starting")
    if any(record.unfinished for record in starts):
        # A start makes most of the host's part, unless it is given up or needs little of it.
        return None
    return engine.ensure_host() if comparison.host_differences(engine) else []
