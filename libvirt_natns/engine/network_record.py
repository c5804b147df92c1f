# SPDX-License-Identifier: LGPL-2.1-or-later
"""The record of a network in the state database, as the verbs write and compare it."""

from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.boot_clock import boot_id, now
from libvirt_natns.model.metadata import PortForward
from libvirt_natns.model.network import Network
from libvirt_natns.model.segment import Segment
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.state.networks import NetworkRecord, NetworkState
from libvirt_natns.upstream.selection import named_upstream


def new_record(
    network: Network, xml: bytes, upstream: Upstream, state: NetworkState
) -> NetworkRecord:
    """Return a record of a network that has had its state since now."""
    return NetworkRecord(
        uuid=network.uuid,
        name=network.name,
        namespace=names.namespace(network.name),
        bridge=network.bridge,
        upstream=upstream.name,
        kind=upstream.kind,
        subnets=tuple(subnet.network for subnet in network.subnets),
        taken_over=network.taken_over,
        state=state,
        boot=boot_id(),
        since=now(),
        document=xml,
    )


def state_of(record: NetworkRecord | None) -> NetworkState:
    """Return a network's state; a state from before a reboot counts as "down"."""
    return record.state if record and record.this_boot else "down"


def is_start_of(record: NetworkRecord, xml: bytes) -> bool:
    """True if a record tells of a start by that XML, between `start` and `started`."""
    return record.state == "starting" and record.this_boot and record.document == xml


def is_outdated(record: NetworkRecord, network: Network, xml: bytes, segment: Segment) -> bool:
    """True if today's XML and configuration differ from a record."""
    if is_moved(record, segment):
        return True
    if record.document == xml:
        return False
    with suppress(NatnsError):
        return libvirt_xml.parse_network(record.document) != network
    return True


def present_upstream(record: NetworkRecord | None, network: Network, xml: bytes) -> str | None:
    """Return the upstream that a running network stays on, unless its metadata names another.

    None for a network that does not run, or that has named its upstream itself until now.
    """
    if record is None or state_of(record) not in ("starting", "up"):
        return None
    if record.document != xml and named_upstream(network) is None:
        with suppress(NatnsError):
            if named_upstream(libvirt_xml.parse_network(record.document)) is not None:
                return None
    return record.upstream


def is_moved(record: NetworkRecord, segment: Segment) -> bool:
    """True if a network's upstream is another than the recorded one, or of another kind."""
    return (record.upstream, record.kind) != (segment.name, segment.kind)


def move_in_words(record: NetworkRecord, upstream: str, kind: str) -> str | None:
    """Return in words that a network goes to an upstream; None if the network is there."""
    if record.upstream != upstream:
        return f"moves from upstream {record.upstream} to {upstream}"
    if record.kind != kind:
        return f"moves with upstream {upstream} from kind {record.kind} to {kind}"
    return None


def publishes_as(record: NetworkRecord, network: Network) -> bool:
    """True if a record's document has the same forwards as a network."""
    with suppress(NatnsError):
        return _forwards(libvirt_xml.parse_network(record.document)) == _forwards(network)
    return False


def _forwards(network: Network) -> tuple[PortForward, ...]:
    return network.nat.forwards if network.nat else ()
