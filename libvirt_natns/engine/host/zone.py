# SPDX-License-Identifier: LGPL-2.1-or-later
"""firewalld's zone of the transit bridges, beside our own rules.

firewalld forgets the zone of a bridge at each start and each reload.  Both make its nftables
table anew, so the table's number tells that firewalld must be asked again.  The host's record
has the number.  firewalld is asked outside of the host's lock: it may hang for seconds.

Limit: with firewalld's backend iptables there is no table.  Then firewalld is asked again when
the host's rules are compared as a whole, and by ``sync`` and the service.
"""

from collections.abc import Iterable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.daemons import firewalld
from libvirt_natns.engine.host.record import HostRecord, load, save
from libvirt_natns.errors import FirewallError, describe, log
from libvirt_natns.firewall import nfnetlink
from libvirt_natns.kernel.locks import locked

TABLES = ("inet firewalld", "ip firewalld", "ip6 firewalld")
NO_TABLE = "no table"
"""Stands in the record for a firewalld without tables; "" there is for unsure."""


def bridges() -> list[str]:
    """Return the transit bridges that there are, where firewalld may be running; else none."""
    return load().bridges if firewalld.may_run() else []


def follow(before: Iterable[str]) -> None:
    """Bring the bridges' zones to today's bridges, after a change of one network.

    ``before`` are the bridges from before the change.  An error stops no network: it goes to
    the system log, and the next event tries again.
    """
    if not firewalld.may_run():
        return
    try:
        gone = set(before) - set(load().bridges)
        _leave(gone)
        # Another network may have made the bridge again since.
        record = load()
        is_unsure = gone.intersection(record.bridges) or record.zones_of != _noted_state()
        if record.bridges and is_unsure:
            _place(record.bridges)
    except FirewallError as error:
        log([describe(error)[0]])


def ensure(before: Iterable[str]) -> list[str]:
    """Bring the bridges' zones to today's bridges, and return what differed.

    Raises FirewallError where firewalld refuses, or does not answer.
    """
    if not firewalld.may_run():
        return []
    with suppress(FirewallError):
        _leave(set(before) - set(load().bridges))
    there = load().bridges
    return [_line(bridge) for bridge in _place(there)] if there else []


def differences() -> list[str]:
    """Return how the bridges' zones differ from what they should be, in words."""
    there = bridges()
    try:
        return [_line(bridge) for bridge in firewalld.outside_zones(there)] if there else []
    except FirewallError as error:
        return [str(error)]


def notes() -> list[str]:
    """Return why firewalld drops packets of networks that run, a line each; none for no reason.

    An administrator must change that: no repair does.
    """
    return [line for line in (problem(),) if line] if bridges() else []


def problem() -> str:
    """Return why firewalld would drop packets of networks, and the remedy; "" for no reason."""
    try:
        running = firewalld.is_running()
        if running and not firewalld.knows_zone():
            return (
                f"firewalld: it does not know the zone {firewalld.ZONE}, and drops packets of"
                f" networks on the upstream host: virt-natns install, then {firewalld.RELOAD}"
            )
    except FirewallError as error:
        return str(error)
    if firewalld.may_run() and not running and _state():
        return "firewalld: it has ended, but its rules stay: systemctl start firewalld"
    return ""


def _line(bridge: str) -> str:
    return f"firewalld: {bridge} is in no zone"


def _leave(gone: Iterable[str]) -> None:
    firewalld.withdraw(sorted(gone))


def _place(there: list[str]) -> list[str]:
    """Put bridges into our zone, and note that firewalld, as it is now, has them."""
    state = _noted_state()
    placed = firewalld.place(there)
    with locked(names.RUN_DIRECTORY):
        record = load()
        if record != HostRecord() and record.zones_of != state:
            record.zones_of = state
            save(record)
    return placed


def _noted_state() -> str:
    """Return the state as the record has it."""
    return _state() or NO_TABLE


def _state() -> str:
    """Return what changes whenever firewalld loads its rules; "" without rules of firewalld's."""
    numbers = nfnetlink.table_numbers()
    return " ".join(f"{table} {numbers[table]}" for table in TABLES if table in numbers)
