# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examinations of ``virt-natns doctor`` that concern libvirt, the host, networks and guests."""

from libvirt_natns.cli import hook_files
from libvirt_natns.cli.access import Engines
from libvirt_natns.daemons import libvirt, libvirtd_reload
from libvirt_natns.engine.host.policy import BRIDGE_NF
from libvirt_natns.engine.reconcile import comparison, obstacles
from libvirt_natns.errors import (
    InstallError,
    LibvirtError,
    NatnsError,
)
from libvirt_natns.model.configuration import Config

DROP_IN_SINCE = (6, 5, 0)
"""The first libvirt that runs the hooks in a directory such as hooks/network.d."""


def hooks() -> str:
    """Examine whether all hooks are installed as this version writes them."""
    installed = hook_files.installed()
    missing = [
        hook for hook in hook_files.HOOKS if not set(hook_files.places(hook)) & set(installed)
    ]
    if missing:
        raise InstallError(f"not installed: {', '.join(missing)}", "run virt-natns install")
    old = [str(file) for file in installed if not hook_files.is_current(file)]
    if old:
        raise InstallError(f"not this version's: {', '.join(old)}", "run virt-natns install")
    return ", ".join(map(str, installed))


def connection() -> str:
    """Examine whether libvirt answers, and runs hooks where ours are."""
    version = libvirt.version()
    dotted = ".".join(map(str, version))
    beside = [file for file in hook_files.installed() if file.name == hook_files.DROP_IN]
    if beside and version < DROP_IN_SINCE:
        raise LibvirtError(
            f"libvirt {dotted} does not run {beside[0]}",
            f"call it from {beside[0].parent.with_suffix('')}",
        )
    return f"version {dotted} answers"


def hooks_seen() -> str:
    """Examine whether each running daemon has looked for hooks since ours were installed."""
    if not hook_files.installed():
        raise InstallError("no hook is installed", "run virt-natns install")
    blind = libvirtd_reload.blind(hook_files.newest())
    if blind:
        raise LibvirtError(
            f"{', '.join(blind)} has not looked for hooks since ours were installed",
            f"systemctl reload {' '.join(blind)}",
        )
    return "every running libvirt daemon has looked for the hooks"


def host_rules(engine: Engines, settings: Config) -> str:
    """Examine our part of the host's firewall."""
    with engine(settings) as verbs:
        bridged = verbs.kernel.host.sysctls.get(BRIDGE_NF) == "1"
        differences = comparison.host_differences(verbs)
    if differences:
        raise NatnsError(
            f"our rules differ, {len(differences)} in all ({differences[0]})", "run virt-natns sync"
        )
    if bridged:
        return "sees bridged frames (bridge-nf-call-iptables is 1); our rules accept them"
    return "does not see bridged frames"


def networks(engine: Engines, settings: Config) -> str:
    """Examine whether each active network that is to have a router has it."""
    with engine(settings) as verbs:
        missed = comparison.missed(verbs, libvirt.active_networks)
    if missed:
        facts = "; ".join(f"{name} {what}" for name, what in missed)
        raise NatnsError(facts, "run virt-natns sync")
    return "all active networks have their routers"


def guests(engine: Engines, settings: Config) -> str:
    """Examine whether running guests publish what their metadata says."""
    with engine(settings) as verbs:
        differences = comparison.guest_differences(verbs, libvirt.active_domains)
    if differences:
        facts = "; ".join(f"{name}: {what}" for name, what in differences)
        raise NatnsError(facts, "run virt-natns sync")
    return "all running guests publish the ports and addresses of their metadata"


def ways_out(engine: Engines, settings: Config) -> str:
    """Examine whether guests of each network that is up get to the outside, and have names."""
    with engine(settings) as verbs:
        records = [record for record in verbs.store.networks.all("up") if record.this_boot]
        found = obstacles.find(verbs, records)
    facts = [
        f"{record.name}: {each.reason}"
        for record in records
        for each in found.of(record.uuid)
        if each.sure
    ]
    if facts:
        raise NatnsError("; ".join(facts))
    return "guests of all networks get to the outside, and have a DNS server to ask"
