# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns.

Exit status: 0 done, 1 it could not (one line on standard error says what, and
what to do), 2 wrong usage.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from libvirt_natns import (
    __version__,
    config,
    connection,
    document,
    firewall,
    install,
    names,
    netns,
    plan,
    reconcile,
    selection,
    status,
)
from libvirt_natns.engine import Engine
from libvirt_natns.errors import InstallError, LibvirtError, NatnsError
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Network
from libvirt_natns.store import Store

Command = Callable[[argparse.Namespace], int]


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        return command(options)
    except NatnsError as error:
        print(f"virt-natns: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader, head(1) for one, has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="virt-natns", description="NAT routers for libvirt's isolated networks."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    sub = add("install", _install, "install libvirt's hooks and handle networks from now on")
    sub.add_argument(
        "--scope",
        choices=("isolated", "annotated"),
        help="handle every isolated network, or only those that carry <natns:nat>",
    )
    add("uninstall", _uninstall, "remove the hooks and give active networks back to libvirt")
    sub = add("status", _status, "show the networks and how they are")
    sub.add_argument("network", nargs="?", help="only this one")
    sub.add_argument("--json", action="store_true", help="for programs")
    sub = add("check", _check, "compare what was set up with the kernel; 1 if anything differs")
    sub.add_argument("network", nargs="?", help="only this one")
    add("sync", _sync, "repair what differs, and nothing else")
    sub = add("plan", _plan, "print what would be done for a network; changes nothing")
    sub.add_argument("network", metavar="FILE|NETWORK", help="a network's XML, or its name")
    sub = add("exec", _exec, "run a command inside a network's namespace")
    sub.add_argument("network")
    sub.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


@contextmanager
def _engine() -> Iterator[Engine]:
    if os.geteuid() != 0:
        raise NatnsError("only root can do this", "use sudo")
    store = Store()
    try:
        with Kernel() as kernel:
            yield Engine(config.load(), store, kernel)
    finally:
        store.close()


# -- install and uninstall ---------------------------------------------------


def _install(options: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise NatnsError("only root can do this", "use sudo")
    config.load()
    firewall.choose(config.load().firewall)
    if options.scope:
        print(f"wrote {install.write_scope(options.scope)}: scope = {options.scope}")
    for file in install.install_hooks():
        print(f"installed {file}")
    told = install.reload_daemons()
    print(f"told {', '.join(told)} to look for hooks" if told else "no libvirt daemon runs now")
    try:
        known = connection.networks()
    except LibvirtError as error:
        print(f"virt-natns: {error}: networks that are active now", file=sys.stderr)
        print("  are handled after virt-natns sync, or when they start again", file=sys.stderr)
        return 0
    with _engine() as engine:
        _explain(engine, known)
        return _report(engine, connection.active_networks())


def _explain(engine: Engine, known: dict[str, bytes]) -> None:
    """Say which networks are handled from now on, and how to keep one isolated."""
    handled: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    for name, xml in sorted(known.items()):
        verdict = _verdict(engine, xml)
        (handled if verdict.handled else others).append((name, verdict.reason))
    print("networks that get a NAT router from now on:")
    print("".join(f"  {name} ({reason})\n" for name, reason in handled) or "  none yet\n", end="")
    if others:
        print("networks that are not touched:")
        print("".join(f"  {name}: {reason}\n" for name, reason in others), end="")
    print(
        "To keep one isolated, put this into its XML (virsh net-edit) and restart it:\n"
        f'  <metadata><natns:nat xmlns:natns="{names.XML_NAMESPACE}" enabled="no"/></metadata>'
    )


def _verdict(engine: Engine, xml: bytes) -> selection.Verdict:
    try:
        return selection.verdict(document.parse_network(xml), engine.config)
    except NatnsError as error:
        return selection.Verdict(False, f"will not start: {error}")


def _uninstall(options: argparse.Namespace) -> int:
    with _engine() as engine:
        removed = install.remove_hooks()
        told = install.reload_daemons()
        errors = []
        for record in engine.store.networks("preparing", "starting", "up"):
            try:
                engine.hand_back(record)
                print(f"gave network {record.name} back to libvirt")
            except NatnsError as error:
                errors.append(str(error))
    for file in removed:
        print(f"removed {file}")
    if told:
        print(f"told {', '.join(told)}")
    if errors:
        raise InstallError("; ".join(errors), "mend that and run virt-natns uninstall again")
    install.remove_state()
    return 0


# -- looking -----------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    with _engine() as engine:
        found = status.collect(engine, options.network)
        if options.network and not found:
            raise NatnsError(
                f"no network {options.network} was seen", "virt-natns status lists all"
            )
        shared = reconcile.host_differences(engine)
        if options.json:
            print(status.as_json(found, shared))
            return 0
        print(status.table(found))
        for difference in shared:
            print(f"  ! host: {difference}")
    return 0


def _check(options: argparse.Namespace) -> int:
    with _engine() as engine:
        records = engine.store.networks("up")
        if options.network:
            records = [record for record in records if record.name == options.network]
            if not records:
                raise NatnsError(f"network {options.network} is not up", "start it first")
        found = [
            (record.name, what)
            for record in records
            for what in reconcile.differences(engine, record)
        ]
        found += [("host", what) for what in reconcile.host_differences(engine)]
        if not options.network:
            with suppress(LibvirtError):
                found += reconcile.missed(engine, connection.active_networks())
    for name, what in found:
        print(f"{name}: {what}")
    return 1 if found else 0


def _plan(options: argparse.Namespace) -> int:
    file = Path(options.network)
    if file.is_file():
        xml: bytes | None = file.read_bytes()
        network = document.parse_network(xml or b"", str(file))
    else:
        xml = connection.network_xml(options.network)
        if xml is None:
            raise NatnsError(f"there is no file and no network {options.network}")
        network = document.parse_network(xml)
    with _engine() as engine:
        verdict = selection.verdict(_complete(network), engine.config)
        if not verdict.handled:
            print(f"network {network.name} is not touched: {verdict.reason}")
            return 0
        print(plan.describe(engine.planner.preview(_complete(network))), end="")
    return 0


def _complete(network: Network) -> Network:
    """A network as libvirt would complete it: a uuid and a bridge, if it has none."""
    return replace(
        network,
        uuid=network.uuid or "00000000-0000-0000-0000-000000000000",
        bridge=network.bridge or "virbrN",
    )


# -- acting ------------------------------------------------------------------


def _sync(options: argparse.Namespace) -> int:
    with _engine() as engine:
        try:
            active = connection.active_networks()
        except LibvirtError as error:
            print(f"virt-natns: {error}: going by the bridges that exist", file=sys.stderr)
            return _report(engine, None)
        return _report(engine, active)


def _report(engine: Engine, active: dict[str, bytes] | None) -> int:
    for name, what in reconcile.sync(engine, active):
        print(f"{name}: {what}")
    return 0


def _exec(options: argparse.Namespace) -> int:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        print("virt-natns: exec: a command is missing", file=sys.stderr)
        return 2
    with _engine() as engine:
        found = [r for r in engine.store.networks("up") if r.name == options.network]
    if not found:
        raise NatnsError(f"network {options.network} is not up", "virt-natns status lists all")
    with netns.entered(found[0].namespace):
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            raise NatnsError(f"cannot run {argv[0]}", os.strerror(error.errno or 0)) from error
