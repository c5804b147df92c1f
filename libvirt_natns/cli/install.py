# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command install: hooks, service, and routers for the networks that are active now."""

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.cli import (
    access,
    check,
    chroot,
    doctor,
    firewalld_files,
    firewalld_reload,
    hook_files,
    scope,
    service_control,
)
from libvirt_natns.daemons import libvirt, libvirtd_reload
from libvirt_natns.documents import config, libvirt_xml, xml_sniff
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import InstallError, LibvirtError, NatnsError, StoreError
from libvirt_natns.firewall import backends
from libvirt_natns.upstream import selection


def run(options: argparse.Namespace) -> int:
    """Install the hooks, start the service, and repair all networks; print each step.

    For a package, the service is the package manager's.  Steps are not printed then, and
    networks are listed by the first installation only.
    """
    access.require_root()
    report: Callable[[str], None] = _nothing if options.package else print
    in_chroot = chroot.is_chroot()
    settings = config.load()
    if not in_chroot:
        backends.choose(settings.firewall)
    if options.scope:
        report(f"wrote {scope.write(options.scope)}: scope = {options.scope}")
    is_first = not hook_files.installed()
    for file in hook_files.install():
        report(f"installed {file}")
    _prepare_firewalld(report, in_chroot=in_chroot)
    if in_chroot:
        report(f"virt-natns {chroot.SAID}")
        return 0
    code = doctor.trusted()
    if code.state != "ok":
        print(f"virt-natns: {code.said}", file=sys.stderr)
    daemons = libvirtd_reload.reload()
    told = f"told {', '.join(daemons)} to look for hooks"
    report(told if daemons else "no libvirt daemon runs now")
    if not options.package:
        print(service_control.start())
    return _handle_networks(explain=is_first or not options.package)


def _nothing(_: str) -> None:
    """Say nothing."""


def _handle_networks(*, explain: bool) -> int:
    """Set up or repair the networks that are active now; return the exit status."""
    with suppress(LibvirtError, StoreError):
        # Without libvirt, the next sync rebuilds the database.
        check.rebuild_state()
    with access.engine() as engine:
        try:
            networks = libvirt.networks()
            if explain:
                _explain(engine, networks)
        except LibvirtError as error:
            print(f"virt-natns: {error}: networks that are active now", file=sys.stderr)
            print("  are handled after virt-natns sync, or when they start again", file=sys.stderr)
            return 0
        return check.repair(engine)


def _prepare_firewalld(report: Callable[[str], None], *, in_chroot: bool) -> None:
    """Write our zone and policies of firewalld; a failure must not keep the rest."""
    try:
        lines = firewalld_files.install()
    except InstallError as error:
        print(f"virt-natns: {error}", file=sys.stderr)
        return
    for line in lines:
        report(line)
    if in_chroot:
        return
    said = firewalld_reload.make_known(renewed=any(line.startswith("installed") for line in lines))
    if said:
        report(said)


def _explain(engine: Engine, networks: dict[str, bytes]) -> None:
    """Say which networks are handled from now on, and how to keep a network isolated."""
    handled: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    up = {record.name for record in engine.store.networks.all("up") if record.this_boot}
    for name, xml in sorted(networks.items()):
        verdict = _verdict(engine, xml)
        note = "; keeps its router until it stops" if name in up else ""
        (handled if verdict.handled else others).append((name, verdict.reason + note))
    print("networks that get a NAT router from now on:")
    print("".join(f"  {name}\n" for name, _ in handled) or "  none yet\n", end="")
    if others:
        print("networks that are not touched:")
        print("".join(f"  {name}: {reason}\n" for name, reason in others), end="")
    print(
        "To keep a network isolated,"
        " put this into its XML (virsh net-edit) and restart the network:\n"
        f'  <metadata><natns:nat xmlns:natns="{names.XML_NAMESPACE}" enabled="no"/></metadata>'
    )


def _verdict(engine: Engine, xml: bytes) -> selection.Verdict:
    """Return whether a network will be handled; False for a network that will not start."""
    try:
        return selection.verdict(libvirt_xml.parse_any_network(xml), engine.config)
    except NatnsError as error:
        if xml_sniff.at_network(xml).untouched:
            return selection.Verdict(None, "has <forward> or enabled='no'")
        return selection.Verdict(None, f"will not start: {error}")
