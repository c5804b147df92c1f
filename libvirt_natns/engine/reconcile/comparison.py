# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command check: how the kernel and libvirt differ from the records.

The module does not call libvirt, and makes no change.  The caller hands over a way to ask which
networks and guests are active. libvirt is asked after the records were read.
"""

from libvirt_natns.documents import libvirt_xml, xml_sniff
from libvirt_natns.engine import shared_host
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.host.stops import HostStops
from libvirt_natns.engine.reconcile.active import (
    NOT_ACTIVE,
    AskGuests,
    AskNetworks,
    Finding,
    is_active,
    leftovers,
    name_of,
    network_of_ours,
    stopped_guests,
    why_over,
)
from libvirt_natns.errors import NatnsError
from libvirt_natns.operations.carry_out import plan_differences
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.upstream import dhcp

NO_ROUTER = "is active in libvirt, but has no router"


def network_differences(engine: Engine, record: NetworkRecord) -> list[str]:
    """Return how the kernel differs from the plan of a network that is up, in words."""
    if record.state != "up":
        return []
    try:
        network = libvirt_xml.parse_network(record.document)
        run = engine.planner.run(network, record.document, record)
        if run.lacks:
            return [f"no {what} of upstream {run.segment.name} is leased" for what in run.lacks]
        plan = engine.planner.plan(run)
        lines = dhcp.differences(engine.store, record, network, run.segment)
        return lines + plan_differences(engine.kernel, plan)
    except NatnsError as error:
        return [str(error)]


def host_differences(engine: Engine) -> list[str]:
    """Return how the host differs from the networks' needs, in words."""
    try:
        return shared_host.differences(engine)
    except NatnsError as error:
        return [str(error)]


def host_stops(engine: Engine) -> HostStops:
    """Return the chains of others that stop packets of networks.

    They are no differences: the chain is an administrator's, and no repair changes it.
    """
    try:
        return shared_host.of(engine).stops()
    except NatnsError as error:
        return HostStops((str(error),))


def missed(engine: Engine, ask: AskNetworks) -> list[Finding]:
    """Return starts and stops without a hook's event, and leftovers without a record."""
    records = engine.store.networks.all("preparing", "starting", "up")
    active = ask()
    # A network that was up before a reboot has left nothing.
    findings = [
        (record.name, why_over(record))
        for record in records
        if record.this_boot and not is_active(engine, record, active)
    ]
    for uuid, xml in (active or {}).items():
        findings += [(name_of(xml), what) for what in _unhandled(engine, uuid, xml)]
    findings += [
        (namespace or uuid, "is left over")
        for uuid, namespace in leftovers(engine)
        if uuid not in (active or {})
    ]
    return findings


def _unhandled(engine: Engine, uuid: str, xml: bytes) -> list[str]:
    """Return why an active network of ours is not up; empty if it is up, or not ours."""
    record = engine.store.networks.get(uuid)
    up = record is not None and record.runs
    try:
        if up or network_of_ours(engine, xml) is None:
            return []
    except NatnsError as error:
        return [f"{NO_ROUTER}: {error}"]
    return [NO_ROUTER]


def guest_differences(engine: Engine, ask: AskGuests) -> list[Finding]:
    """Return stopped guests, and guests with forwards that differ from their metadata."""
    recorded = Guests(engine).store.guests.all()
    running = ask()
    if running is None:
        return []
    findings = [(record.name, NOT_ACTIVE) for record in stopped_guests(recorded, running)]
    for xml in running.domains.values():
        name = xml_sniff.at_domain(xml).name
        findings += [(name, what) for what in Guests(engine).differences(xml)]
    return findings
