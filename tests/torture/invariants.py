# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold after each step: nothing more and nothing less than libvirt's word asks for."""

import re
import sqlite3
from collections.abc import Collection, Iterable
from contextlib import closing, suppress
from pathlib import Path

from lab import run
from model import Net
from world import World

from libvirt_natns import names
from libvirt_natns.daemons import libvirt
from libvirt_natns.engine.factory import Once
from libvirt_natns.engine.reconcile import active
from libvirt_natns.engine.reconcile.comparison import (
    guest_differences,
    host_differences,
    missed,
    network_differences,
)
from libvirt_natns.errors import LibvirtError

RUN = Path("/run/libvirt-natns")
DATABASE = Path("/var/lib/libvirt-natns/state.db")
OUR_DNSMASQ = re.compile(r"/run/libvirt-natns/networks/([0-9a-f-]+)/")
OURS = re.compile(r"^(nat[iu][np]-|natns-)")
BRIDGES = re.compile(r"^virbr\d+$")


def problems(world: World) -> list[str]:
    """Differences between the kernel, files, database and what runs; quick."""
    active = world.active()
    ours = [net for net in active if not net.disabled]
    uuids = {net.uuid for net in ours}
    links = {link.name for link in Path("/sys/class/net").iterdir()}
    found = _compare("namespaces", {net.namespace for net in ours}, _namespaces())
    found += _compare("links", _links(ours), {link for link in links if OURS.match(link)})
    found += _compare("bridges", {n.bridge for n in active}, set(filter(BRIDGES.match, links)))
    found += _compare("directories", uuids, _listed(RUN / "networks"))
    found += _compare("dnsmasq", {n.uuid for n in ours if n.has_dnsmasq}, _dnsmasqs())
    found += _compare("records", uuids, _recorded("SELECT uuid FROM network WHERE state != 'down'"))
    found += _guest_problems(world, {net.name for net in ours})
    return found + _others(world)


def _compare(what: str, wanted: Iterable[str], found: Iterable[str]) -> list[str]:
    missing, surplus = set(wanted) - set(found), set(found) - set(wanted)
    lines = [f"{what} missing: {', '.join(sorted(missing))}"] if missing else []
    return lines + ([f"{what} left over: {', '.join(sorted(surplus))}"] if surplus else [])


def _namespaces() -> set[str]:
    return {file.name for file in names.NETNS_DIRECTORY.glob("nat-*")}


def _links(nets: list[Net]) -> set[str]:
    found = {names.private_patch(net.uuid) for net in nets}
    found |= {names.upstream_patch(net.uuid) for net in nets}
    return found | ({"natns-host"} if any(net.kind == "host upstream" for net in nets) else set())


def _listed(directory: Path) -> set[str]:
    return {each.name for each in directory.iterdir()} if directory.exists() else set()


def _dnsmasqs() -> set[str]:
    found = set()
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (directory / "comm").read_text() != "dnsmasq\n":
                continue
            line = (directory / "cmdline").read_bytes().decode(errors="replace")
            if match := OUR_DNSMASQ.search(line):
                found.add(match[1])
    return found


def _recorded(query: str) -> set[str]:
    with closing(sqlite3.connect(f"file:{DATABASE}?mode=ro", uri=True)) as database:
        return {str(row[0]) for row in database.execute(query)}


def _guest_problems(world: World, networks: set[str]) -> list[str]:
    """Recorded guests are those that run with a NIC in a network of ours, at most."""
    run_now = world.active_guests()
    wanted = {
        guest.uuid
        for guest in world.model.guests
        if guest.name in run_now and _connected(run_now[guest.name], networks)
    }
    possible = {guest.uuid for guest in world.model.guests if guest.name in run_now}
    recorded = _recorded("SELECT uuid FROM guest")
    found = _compare("guests", wanted, recorded & wanted)
    found += _compare("guests", possible, recorded | possible)
    return found + _compare("guests' directories", possible, _listed(RUN / "guests") | possible)


def _connected(xml: str, networks: set[str]) -> bool:
    return any(name in networks for name in re.findall(r"<source network='([^']+)'", xml))


def _others(world: World) -> list[str]:
    """What is not ours is as it was."""
    found = []
    if not Path("/sys/class/net/virbr-stock").exists():
        found.append("the stock network's bridge has gone")
    if not world.processes("dnsmasq", "/var/lib/libvirt/dnsmasq/stock.conf"):
        found.append("the stock network's dnsmasq has gone")
    return found


def broken_streams(world: World) -> list[str]:
    """Streams that do not answer; those whose own network was damaged are opened anew."""
    broken = []
    for name, stream in world.streams.items():
        if stream.carries():
            continue
        if name in world.excused:
            world.reopen(name)
        else:
            broken.append(f"the stream of {name} has broken")
    return broken


def foreign_rules() -> str:
    """The host's rules that are not ours, without counters."""
    lines = run("nft", "-s", "list", "ruleset").stdout.splitlines()
    return "\n".join(sorted(line for line in lines if "virbr-stock" in line or "admin" in line))


def check(concerned: Collection[str] | None = None) -> list[active.Finding]:
    """Return what `virt-natns check` finds, without starting an interpreter.

    ``concerned``: look at these networks alone, and at the host if "host" is among them.
    """
    with Once().engine() as engine:
        records = [record for record in engine.store.networks.all("up") if record.this_boot]
        found = [
            (record.name, what)
            for record in records
            if concerned is None or record.name in concerned
            for what in network_differences(engine, record)
        ]
        if concerned is None or "host" in concerned:
            found += [("host", what) for what in host_differences(engine)]
        found += missed(engine, _active)
        return found + guest_differences(engine, _running)


def _active() -> active.Active | None:
    with suppress(LibvirtError):
        return libvirt.active_networks()
    return None


def _running() -> libvirt.ActiveDomains | None:
    with suppress(LibvirtError):
        return libvirt.active_domains()
    return None
