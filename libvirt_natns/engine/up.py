# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb up: a network's namespace and all that is in it, as its XML says now.

The verb converges: it changes only what differs, and can be called again at any time.
"""

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine import leases, shared_host
from libvirt_natns.engine.apply.carry_out import carry_out
from libvirt_natns.engine.context import Context, discard_directory
from libvirt_natns.engine.down import return_routes
from libvirt_natns.engine.network_record import is_outdated, new_record, publishes_as
from libvirt_natns.engine.operations.operation import Plan
from libvirt_natns.engine.plan.network import withdrawals
from libvirt_natns.engine.publication.scopes import scopes
from libvirt_natns.engine.removal import end_client, remove
from libvirt_natns.engine.rivals import end_rivals
from libvirt_natns.engine.start_checks import check
from libvirt_natns.engine.undo import Undo
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.network import Network
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.state.claims import Claims
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp, selection


class NotUpError(NatnsError):
    """A network went down before it could be repaired."""


class RecordChangedError(NatnsError):
    """A network's record was replaced before the network could be repaired: read it anew."""


def up(context: Context, network: Network, xml: bytes) -> list[str]:
    """Make the network's namespace and all that is in it, and return what differed.

    Runs in `started`, when the bridge is there, and whenever a network must be
    repaired.  Raises a NatnsError and takes back its own work.
    """
    return _up(context, network, xml)


def repair(context: Context, record: NetworkRecord) -> list[str]:
    """Bring a network to its record if it is still up, and return what differed.

    Waits for all of the work, so that a look after it sees the result.  Raises NotUpError
    or RecordChangedError, before anything is changed, and otherwise as ``up`` does.
    """
    network = libvirt_xml.parse_network(record.document)
    return _up(context.waiting(), network, record.document, only_if_up=True)


def refresh(context: Context, network: Network, xml: bytes) -> list[str]:
    """Apply a changed network XML (`net-update`) to a network that is up.

    libvirt has written its dnsmasq's files by now.  Connections live on.
    """
    record = context.store.networks.get(network.uuid)
    if record is None or record.state != "up":
        return []
    return up(context, network, xml)


def follow_lease(context: Context, uuid: str) -> list[str]:
    """Bring a network to its DHCP client's lease, or to the loss of it; return what differed."""
    if context.state(uuid) == "down":
        return []
    # A start looks at the lease itself, but may have done so a moment ago.
    with locked(names.network_directory(uuid)):
        context.discard_lock(uuid)
        record = context.store.networks.get(uuid)
    if record is None or record.state != "up" or not record.this_boot:
        return []
    if context.kernel.host.links.get(record.bridge) is None:
        # The network is stopping.
        return []
    return up(context, libvirt_xml.parse_network(record.document), record.document)


def _up(context: Context, network: Network, xml: bytes, *, only_if_up: bool = False) -> list[str]:
    upstream = context.planner.upstream(network)
    if not only_if_up and context.state(network.uuid) not in ("starting", "up"):
        # No hook has answered the network's `start`.
        check(context, network, upstream)
        end_rivals(context, network, active=True)
    with context.changing("up", network.uuid, network.name) as repaired, Undo() as undo:
        if only_if_up:
            _check_up(context, network, xml)
        made = _built_ahead(context, network.uuid)
        _admit(context, network, xml, upstream, undo)
        if upstream.by_dhcp:
            # A DHCP server may have leased another address since.
            upstream = context.planner.upstream(network)
        elif names.dhcp_directory(network.uuid).is_dir():
            _end_leasing(context, network, upstream, undo)
        if made:
            namespace = names.namespace(network.name)
            undo.add(remove, context.kernel, network.uuid, namespace)
        undo.add(return_routes, context, network)
        repaired += _take_over(context, network, undo)
        repaired += _apply(context, network, upstream, made, undo)
        if repaired or context.state(network.uuid) != "up":
            context.step("note that it is up")
            context.store.networks.set_state(network.uuid, "up")
        undo.pop_all()
    return repaired


def _built_ahead(context: Context, uuid: str) -> Plan:
    """Return the operations that ``build`` has carried out for the start that goes on."""
    record = context.store.networks.get(uuid)
    if context.built is None or record is None:
        return ()
    made = context.built.take(uuid, record.since)
    goes_on = context.state(uuid) == "starting" and netns.exists(record.namespace)
    return made if goes_on else ()


def _check_up(context: Context, network: Network, xml: bytes) -> None:
    """Raise NotUpError or RecordChangedError unless a network is up with that document."""
    record = context.store.networks.get(network.uuid)
    if record is None or record.state != "up" or not record.this_boot:
        raise NotUpError(f"network {network.name} is not up")
    if record.document != xml:
        raise RecordChangedError(f"network {network.name} was changed")


def _admit(context: Context, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
    """Record a network; ``undo`` forgets a network that was not up."""
    state = context.state(network.uuid)
    if state != "up":
        # Last of all, when the network's state is set back and does not count.
        undo.add(shared_host.adjust, context, network.uuid)
        undo.add(discard_directory, network.uuid)
    if state not in ("starting", "up"):
        leases.reserve(context, network, xml, upstream, undo)
        return
    if state == "starting":
        undo.add(context.store.networks.set_state, network.uuid, "down")
        if upstream.by_dhcp:
            # `start` has made a part of the namespace, to be leased an address.
            namespace = names.namespace(network.name)
            undo.add(remove, context.kernel, network.uuid, namespace)
    record = context.store.networks.get(network.uuid)
    if record is not None and record.upstream != upstream.name:
        # The lease of another upstream's server is of no use here.
        end_client(context.kernel, network.uuid, record.namespace)
    if state == "starting" or record is None or is_outdated(record, network, xml, upstream):
        context.step("record the network")
        context.store.networks.put(new_record(network, xml, upstream, state))
        if state == "up" and record is not None:
            _publish_anew(context, record, network, upstream, undo)


def _publish_anew(
    context: Context, earlier: NetworkRecord, network: Network, upstream: Upstream, undo: Undo
) -> None:
    """Claim the forwards of a running network's edited metadata, in place of earlier ones."""
    if publishes_as(earlier, network):
        return
    undo.add(context.store.networks.put, earlier)
    before = Claims(network.uuid, context.store.claims.forwards(owner=network.uuid))
    undo.add(context.store.claims.put, before, scopes(context.store, [network.uuid]), True)
    leases.renew(context, network, upstream)
    leases.claim_own(context, network, upstream, before.forwards)


def _end_leasing(context: Context, network: Network, upstream: Upstream, undo: Undo) -> None:
    """Release a DHCP server's lease: the network's upstream leased by DHCP before."""
    held = dhcp.held(network.uuid)
    end_client(context.kernel, network.uuid, names.namespace(network.name))
    leased = context.store.leases.of(upstream.name, network.uuid).address
    if held is not None and held.address.ip == leased:
        # From now on the server may lease the address to others.
        undo.add(context.store.leases.restore, context.store.leases.all_of(network.uuid))
        context.store.leases.release(upstream.name, network.uuid, "ipv4")


def _take_over(context: Context, network: Network, undo: Undo) -> list[str]:
    """Take libvirt's addresses off the bridge, ahead of all else.

    Starts of networks with an overlapping subnet wait for nothing more.
    """
    repaired = carry_out(context.kernel, withdrawals(network), undo, context.before)
    if context.state(network.uuid) == "starting":
        context.step("let others start")
        context.store.networks.set_state(network.uuid, "up")
    return repaired


def _apply(
    context: Context, network: Network, upstream: Upstream, made: Plan, undo: Undo
) -> list[str]:
    """Renew a network's leases and carry out its plan; return what differed."""
    repaired: list[str] = []
    leases.renew(context, network, upstream)
    if upstream.by_dhcp:
        repaired += dhcp.news(network, selection.upstream_of(network, context.config))
    for address in context.planner.outside(network, upstream).addresses:
        context.store.claims.move(network.uuid, address)
    shared_host.adjust(context, network.uuid)
    operations = context.planner.plan(network, upstream)
    repaired += carry_out(
        context.kernel, operations, undo, context.before, later=context.later, done=made
    )
    repaired += ["joined what was built ahead"] if made else []
    if network.needs_dnsmasq:
        dnsmasq.check_started(network.uuid, names.namespace(network.name))
    return repaired
