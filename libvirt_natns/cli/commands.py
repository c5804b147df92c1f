# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns.

Exit status: 0 done, 1 it could not (one line on standard error says what, and
what to do), 2 wrong usage.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

from libvirt_natns import __version__, firewall, names
from libvirt_natns.cli import (
    diagram,
    doctor,
    forward,
    install,
    output,
    service_control,
    status,
    uninstall,
)
from libvirt_natns.cli import router as router_cli
from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import config, libvirt_xml, xml_sniff
from libvirt_natns.engine import plan, rebuild, reconcile
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import InstallError, LibvirtError, NatnsError, StoreError
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.records import replace
from libvirt_natns.service import client
from libvirt_natns.state import database
from libvirt_natns.state.database import SQLError
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import selection
from libvirt_natns.upstream.router import networks
from libvirt_natns.upstream.router.lifecycle import Machine

Command = Callable[[argparse.Namespace], int]

ROUTER = "The router namespace of a host's only NIC: an upstream of kind router."
FORWARD = "Published ports of guests, which stand in their domains' metadata."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    command: Command = options.command
    try:
        with output.lenient():
            return command(options)
    except NatnsError as error:
        with suppress(OSError):
            print(f"virt-natns: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


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
    add(
        "doctor", _doctor, "check what libvirt-natns needs of this machine; 1 if anything is broken"
    )
    add("diagram", _diagram, "draw the networks with their namespaces, addresses and upstreams")
    sub = commands.add_parser(
        "forward", help="list, add or remove published ports of guests", description=FORWARD
    )
    forward.add_parser(sub, _engine)
    sub = commands.add_parser("router", help="up, down, confirm or status", description=ROUTER)
    router_cli.add_parser(sub, _machine)
    add("metrics", _metrics, "print what there is and what has happened, for Prometheus")
    add("serve", _serve, "be the resident service, in the foreground; systemd starts it so")
    sub = add("exec", _exec, "run a command inside a network's namespace")
    sub.add_argument("network")
    sub.add_argument("argv", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    return parser


def _require_root() -> None:
    if os.geteuid() != 0:
        raise NatnsError("only root can do this", "use sudo")


@contextmanager
def _engine(settings: Config | None = None, *, look_only: bool = False) -> Iterator[Engine]:
    """The engine over the machine's state; ``settings`` default to the configuration.

    ``look_only`` makes no state database where there is none.
    """
    _require_root()
    with ExitStack() as cleanup:
        directory = names.STATE_DIRECTORY
        database.check_there(directory)
        if look_only and not (directory / "state.db").exists():
            directory = Path(cleanup.enter_context(TemporaryDirectory(prefix="virt-natns-")))
        settings = settings or config.load()
        store = Store(directory)
        cleanup.callback(store.close)
        yield Engine(settings, store, cleanup.enter_context(Kernel()))


@contextmanager
def _machine() -> Iterator[Machine]:
    """The verbs of routers, which know what to do without configuration and database."""
    _require_root()
    settings, faults = Config(), list[NatnsError]()
    try:
        settings = config.load()
    except (NatnsError, OSError, ValueError) as error:
        faults.append(_as_fault(error, str(names.CONFIG_FILE)))
    with ExitStack() as cleanup:
        try:
            engine = cleanup.enter_context(_engine(settings, look_only=True))
        except (NatnsError, OSError, SQLError) as error:
            faults.append(_as_fault(error, str(names.STATE_DIRECTORY / "state.db")))
            yield _bare_machine(settings, cleanup.enter_context(Kernel()), faults)
            return
        store = engine.store
        yield Machine(
            engine.config,
            engine.kernel,
            partial(networks.needs, store),
            partial(networks.users, store),
            partial(networks.reattach, store, engine.up),
            tuple(faults),
        )


def _as_fault(error: Exception, where: str) -> NatnsError:
    return error if isinstance(error, NatnsError) else NatnsError(f"cannot read {where}: {error}")


def _bare_machine(settings: Config, kernel: Kernel, faults: list[NatnsError]) -> Machine:
    """The verbs without the database, which alone knows the networks of a router."""

    def unknown(*_: object) -> NoReturn:
        raise StoreError(faults[-1].fact, faults[-1].remedy)

    return Machine(settings, kernel, unknown, unknown, unknown, tuple(faults))


def _asker() -> reconcile.Ask:
    """Asks for the networks that libvirt has active; says once where it does not answer."""
    told: list[LibvirtError] = []

    def ask() -> reconcile.Active | None:
        try:
            return libvirt.active_networks()
        except LibvirtError as error:
            if not told:
                print(f"virt-natns: {error}: going by the bridges that exist", file=sys.stderr)
            told.append(error)
        return None

    return ask


def _ask_guests() -> libvirt.Running | None:
    """The guests that run; None where libvirt does not answer."""
    with suppress(LibvirtError):
        return libvirt.active_domains()
    return None


# -- install and uninstall ---------------------------------------------------


def _install(options: argparse.Namespace) -> int:
    _require_root()
    firewall.choose(config.load().firewall)
    if options.scope:
        print(f"wrote {install.write_scope(options.scope)}: scope = {options.scope}")
    for file in install.install_hooks():
        print(f"installed {file}")
    code = doctor.trusted()
    if code.state != "ok":
        print(f"virt-natns: {code.said}", file=sys.stderr)
    told = install.reload_daemons()
    print(f"told {', '.join(told)} to look for hooks" if told else "no libvirt daemon runs now")
    print(service_control.start())
    with suppress(LibvirtError, StoreError):
        # Without libvirt it is sync's to do.
        _rebuild()
    with _engine() as engine:
        try:
            _explain(engine, libvirt.networks())
        except LibvirtError as error:
            print(f"virt-natns: {error}: networks that are active now", file=sys.stderr)
            print("  are handled after virt-natns sync, or when they start again", file=sys.stderr)
            return 0
        return _report(reconcile.sync(engine, _asker(), _ask_guests))


def _explain(engine: Engine, known: dict[str, bytes]) -> None:
    """Say which networks are handled from now on, and how to keep one isolated."""
    handled: list[tuple[str, str]] = []
    others: list[tuple[str, str]] = []
    up = {record.name for record in engine.store.networks.all("up")}
    for name, xml in sorted(known.items()):
        verdict = _verdict(engine, xml)
        note = "; keeps its router until it stops" if name in up else ""
        (handled if verdict.handled else others).append((name, verdict.reason + note))
    print("networks that get a NAT router from now on:")
    print("".join(f"  {name}\n" for name, _ in handled) or "  none yet\n", end="")
    if others:
        print("networks that are not touched:")
        print("".join(f"  {name}: {reason}\n" for name, reason in others), end="")
    print(
        "To keep one isolated, put this into its XML (virsh net-edit) and restart it:\n"
        f'  <metadata><natns:nat xmlns:natns="{names.XML_NAMESPACE}" enabled="no"/></metadata>'
    )


def _verdict(engine: Engine, xml: bytes) -> selection.Verdict:
    try:
        return selection.verdict(libvirt_xml.parse_network(xml), engine.config)
    except NatnsError as error:
        if xml_sniff.at_network(xml).untouched:
            return selection.Verdict(False, "has <forward> or enabled='no'")
        return selection.Verdict(False, f"will not start: {error}")


def _uninstall(options: argparse.Namespace) -> int:
    _require_root()
    uninstall.run(_asker())
    return 0


# -- looking -----------------------------------------------------------------


def _status(options: argparse.Namespace) -> int:
    health = _health()
    with _engine(look_only=True) as engine:
        found = service_control.with_health(
            status.collect(engine, _known(), options.network), health
        )
        if options.network and not found:
            raise NatnsError(
                f"there is no network {options.network} that was handled",
                "virt-natns status lists all",
            )
        host = reconcile.host_differences(engine) + service_control.of_host(health)
        missed = [] if options.network else reconcile.missed(engine, _asker())
        guests = [] if options.network else reconcile.guest_differences(engine, _ask_guests)
    if options.json:
        print(status.as_json(found, host, missed, guests, service_control.as_object(health)))
    else:
        print(status.text(found, host, missed, guests, str(health)))
    return 0


def _health() -> service_control.Health:
    _require_root()
    return service_control.ask()


def _known() -> frozenset[str] | None:
    """The uuids of all networks that are defined; None where libvirt does not answer."""
    try:
        return frozenset(libvirt.uuids())
    except LibvirtError:
        return None


def _check(options: argparse.Namespace) -> int:
    with _engine(look_only=True) as engine:
        ask = _asker()
        found = _found(engine, options.network, ask)
        # A network that starts or ends meanwhile differs for a moment only.
        again = set(_found(engine, options.network, ask)) if found else set()
        notes = reconcile.host_obstacles(engine)
    for name, what in (finding for finding in found if finding in again):
        print(f"{name}: {what}")
    for note in notes:
        print(f"note: {note}")
    return 1 if again.intersection(found) else 0


def _found(engine: Engine, named: str | None, ask: reconcile.Ask) -> list[reconcile.Finding]:
    """All that differs now, or what does of one network and the host."""
    records = _up(engine, named)
    found = [(r.name, what) for r in records for what in reconcile.differences(engine, r)]
    found += [("host", what) for what in reconcile.host_differences(engine)]
    if not named:
        found += reconcile.missed(engine, ask)
        found += reconcile.guest_differences(engine, _ask_guests)
    return found


def _up(engine: Engine, named: str | None) -> list[NetworkRecord]:
    """The networks that are up, or the one of that name or uuid.  Raises NatnsError without it."""
    records = [record for record in engine.store.networks.all("up") if record.this_boot]
    if named is None:
        return records
    found = [record for record in records if named in (record.name, record.uuid)]
    if not found:
        raise NatnsError(f"network {named} is not up", "virt-natns status lists all")
    return found


def _plan(options: argparse.Namespace) -> int:
    network = _complete(_network_to_plan(options.network))
    with _engine(look_only=True) as engine:
        verdict = selection.verdict(network, engine.config)
        if not verdict.handled:
            print(f"network {network.name} is not touched: {verdict.reason}")
            return 0
        print(plan.describe(engine.planner.preview(network)), end="")
    return 0


def _network_to_plan(named: str) -> Network:
    """A network by the file of its XML, else by its name."""
    file = Path(named)
    if file.is_file():
        try:
            return libvirt_xml.parse_network(file.read_bytes(), named)
        except OSError as error:
            raise NatnsError(f"cannot read {named}", error.strerror or str(error)) from error
    _require_root()
    xml = libvirt.network_xml(named)
    if xml is None:
        raise NatnsError(f"there is no file and no network {named}", "see virsh net-list --all")
    return libvirt_xml.parse_network(xml)


def _complete(network: Network) -> Network:
    """A network as libvirt would complete it: a uuid and a bridge, if it has none."""
    return replace(
        network,
        uuid=network.uuid or "00000000-0000-0000-0000-000000000000",
        bridge=network.bridge or "virbrN",
    )


# -- acting ------------------------------------------------------------------


def _sync(options: argparse.Namespace) -> int:
    _rebuild()
    with _engine() as engine:
        return _report(reconcile.sync(engine, _asker(), _ask_guests))


def _rebuild() -> None:
    """Rebuild a damaged state database from what runs; an error there ends nothing."""
    _require_root()
    outcome = rebuild.rebuild(config.load(), _asker(), _ask_guests)
    for name, what in outcome.found:
        print(f"{name}: {what}")
    for error in outcome.errors:
        print(f"virt-natns: {error}", file=sys.stderr)


def _report(outcome: reconcile.Outcome) -> int:
    for name, what in outcome.repaired:
        print(f"{name}: {what}")
    if outcome.errors:
        raise NatnsError("; ".join(outcome.errors))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    _require_root()
    findings = doctor.examine(lambda settings: _engine(settings, look_only=True))
    print(doctor.text(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def _diagram(options: argparse.Namespace) -> int:
    with _engine(look_only=True) as engine:
        print(diagram.draw(diagram.collect(engine)), end="")
    return 0


def _metrics(options: argparse.Namespace) -> int:
    _require_root()
    answer = client.ask("question", ("metrics", "-"))
    if answer is not None and answer.done:
        print(answer.text, end="")
        return 0
    with _imported("prometheus_client", "python3-prometheus-client"):
        from libvirt_natns.service import metrics
    with _engine(look_only=True) as engine:
        print(metrics.WITHOUT_SERVICE + metrics.gauges(engine), end="")
    return 0


def _serve(options: argparse.Namespace) -> int:
    _require_root()
    # Much is imported there that no other command needs.
    with _imported("prometheus_client", "python3-prometheus-client"):
        from libvirt_natns.service import daemon
    return daemon.main()


@contextmanager
def _imported(module: str, package: str) -> Iterator[None]:
    """Say which package is to be installed where the body cannot import a module."""
    try:
        yield
    except ImportError as error:
        if error.name != module:
            raise
        raise InstallError(
            f"the Python module {module} is missing", f"install {package}"
        ) from error


def _exec(options: argparse.Namespace) -> int:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        print("virt-natns: exec: a command is missing", file=sys.stderr)
        return 2
    with _engine(look_only=True) as engine:
        namespace = _up(engine, options.network)[0].namespace
    with netns.entered(namespace):
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            raise NatnsError(f"cannot run {argv[0]}", os.strerror(error.errno or 0)) from error
