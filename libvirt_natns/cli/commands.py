# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns: its arguments, and the commands that are a call of another module.

Exit status: 0 done; 1 failed, and one line on standard error says what failed and what to
do; 2 wrong usage.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from libvirt_natns import __version__
from libvirt_natns.cli import (
    access,
    check,
    doctor,
    forward,
    install,
    look_rules,
    machine_checks,
    output,
    plan,
    router,
    status,
    uninstall,
)
from libvirt_natns.cli.arguments import ArgumentParser
from libvirt_natns.errors import InstallError, NatnsError, describe, log
from libvirt_natns.kernel import netns
from libvirt_natns.service import client

Command = Callable[[argparse.Namespace], int]
Add = Callable[[str, Command, str], argparse.ArgumentParser]

ROUTER = "The router namespace of a host's only NIC: an upstream of kind router."
JSON = "print JSON, for programs"
FORWARD = "Published ports of guests, kept in the metadata of their domains."


def main(arguments: list[str] | None = None) -> int:
    """Run one command, and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    return carry_out(make_parser().parse_args(words), words)


def carry_out(options: argparse.Namespace, words: Sequence[str] = ()) -> int:
    """Run a command, and return its exit status; ``words`` are those of the command line.

    The service runs read-only commands for members of group libvirt.
    """
    command: Command = options.command
    # Text for programs has no colours, not even on a terminal.
    painted = "" if getattr(options, "json", False) else options.word
    try:
        with output.lenient(painted):
            if os.geteuid() != 0 and look_rules.command_of(words):
                return _look(options, words)
            return command(options)
    except Exception as error:  # a person is shown one line, whichever error it is
        line, more = describe(error)
        with suppress(OSError):
            print(f"virt-natns: {line}", file=sys.stderr)
        log(more)
        return 1
    except KeyboardInterrupt:
        return 130


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = ArgumentParser(
        prog="virt-natns", description="NAT routers for libvirt's isolated networks."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, dest="word", metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=command)
        return added

    _add_networks(add)
    sub = commands.add_parser(
        "forward", help="list, add or remove published ports of guests", description=FORWARD
    )
    forward.add_parser(sub, access.engine)
    sub = commands.add_parser(
        "router", help="move a host's NIC into a router namespace, and back", description=ROUTER
    )
    router.add_parser(sub, access.machine)
    _add_pictures(add)
    _add_service(add)
    return parser


def _add_networks(add: Add) -> None:
    """Add the commands about the installation and the networks."""
    sub = add("install", install.run, "install libvirt's hooks and handle networks from now on")
    sub.add_argument(
        "--scope",
        choices=("isolated", "annotated"),
        help="handle every isolated network, or only networks with <natns:nat>",
    )
    sub.add_argument(
        "--package",
        action="store_true",
        help="for a package's scripts: leave the service to the package manager, and say less",
    )
    sub = add("uninstall", _uninstall, "remove the hooks and give active networks back to libvirt")
    sub.add_argument(
        "--package",
        action="store_true",
        help="for a package's scripts: keep the state, and the service's units",
    )
    _add_listings(add)


def _add_listings(add: Add) -> None:
    """Add the commands that show and compare networks."""
    sub = add("status", _status, "show the networks, their addresses and their health")
    sub.add_argument("network", nargs="?", help="name or uuid of a single network")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help=JSON)
    form.add_argument("--watch", action="store_true", help="show the status anew at each change")
    sub = add("watch", partial(_watching, ()), "print each change of networks, guests and forwards")
    sub.add_argument("--json", action="store_true", help="print JSON, an object a line")
    sub = add(
        "check",
        check.check,
        "compare the networks with the kernel; exit status 1 if anything differs",
    )
    sub.add_argument("network", nargs="?", help="name or uuid of a single network")
    sub.add_argument("--json", action="store_true", help=JSON)
    sub = add("sync", check.sync, "repair each difference, and change nothing else")
    sub.add_argument(
        "--dry-run", action="store_true", help="print the differences, and repair nothing"
    )
    sub = add("plan", plan.run, "print the operations for a network, and change nothing")
    sub.add_argument(
        "network",
        metavar="FILE|NETWORK",
        help="a file with the XML of a network, or the name of a network",
    )
    sub.add_argument("--json", action="store_true", help=JSON)
    sub.set_defaults(document=None)
    sub = add(
        "validate",
        _validate,
        "check files with networks, domains and configurations, without root;"
        " exit status 1 if any is wrong",
    )
    sub.add_argument("files", metavar="FILE", nargs="+", help="XML of libvirt, or a config.toml")
    sub = add(
        "doctor",
        _doctor,
        "check that this machine has all that libvirt-natns needs;"
        " exit status 1 if anything is broken",
    )
    sub.add_argument("--json", action="store_true", help=JSON)


def _add_pictures(add: Add) -> None:
    """Add the commands that show all at once: to a person, or to a developer."""
    sub = add("diagram", _diagram, "draw the networks with their guests, forwards and upstreams")
    sub.add_argument(
        "--format",
        choices=("text", "svg", "dot", "mermaid"),
        default="text",
        help="text for a terminal, svg for a browser, dot for graphviz, mermaid for a page",
    )
    sub = add("report", _report, "write the facts for a bug report to a file, without secrets")
    sub.add_argument("--network", help="name of the network that the report is about")
    sub.add_argument(
        "file", nargs="?", help="the file to write (default: virt-natns-report-TIME.txt)"
    )


def _add_service(add: Add) -> None:
    """Add the commands about the service, and what administrators run beside it."""
    add("metrics", _metrics, "print metrics for Prometheus")
    add("serve", _serve, "run the resident service in the foreground, as systemd does")
    sub = add("exec", _exec, "run a command inside a network's namespace")
    sub.add_argument("network", help="name or uuid of a network that is up")
    sub.add_argument(
        "argv", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command to run"
    )


# -- commands ----------------------------------------------------------------


def _look(options: argparse.Namespace, words: Sequence[str]) -> int:
    # Only members of the group need the client.
    from libvirt_natns.cli import look_client

    run = look_client.run if look_client.applies(words, options) else _watching
    return run(words, options)


def _status(options: argparse.Namespace) -> int:
    return _watching((), options) if options.watch else status.run(options)


def _watching(_: Sequence[str], options: argparse.Namespace) -> int:
    """Run watch or status --watch; no other command needs their modules."""
    from libvirt_natns.cli import watch

    return watch.show(options.network) if "network" in options else watch.run(options)


def _uninstall(options: argparse.Namespace) -> int:
    access.require_root()
    uninstall.run(access.network_asker(), package=options.package)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    access.require_root()
    diagnoses = doctor.examine(partial(access.engine, look_only=True))
    print(doctor.as_json(diagnoses) if options.json else doctor.text(diagnoses))
    return 1 if any(diagnosis.state == "broken" for diagnosis in diagnoses) else 0


def _diagram(options: argparse.Namespace) -> int:
    # No other command needs the modules of the picture.
    from libvirt_natns.cli.diagram import drawing

    return drawing.run(options)


def _report(options: argparse.Namespace) -> int:
    from libvirt_natns.cli.report import report_file

    return report_file.run(options)


def _validate(options: argparse.Namespace) -> int:
    # No other command needs it.
    from libvirt_natns.cli import validate

    return validate.run(options)


def _metrics(_: argparse.Namespace) -> int:
    access.require_root()
    answer = client.ask("question", ("metrics", "-"))
    if answer is not None and answer.done:
        print(answer.text, end="")
        return 0
    with _imported():
        from libvirt_natns.service import metrics
    with access.engine(look_only=True) as engine:
        print(metrics.WITHOUT_SERVICE + metrics.gauges(engine), end="")
    return 0


def _serve(_: argparse.Namespace) -> int:
    access.require_root()
    # The daemon imports many modules that no other command needs.
    with _imported():
        from libvirt_natns.service import daemon
    return daemon.main()


@contextmanager
def _imported() -> Iterator[None]:
    """Say which package to install where the body cannot import a module."""
    try:
        yield
    except ImportError as error:
        package = machine_checks.OWN_MODULES.get(error.name or "")
        if package is None:
            raise
        raise InstallError(
            f"the Python module {error.name} is missing", f"install {package}"
        ) from error


def _exec(options: argparse.Namespace) -> int:
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        print("virt-natns: exec: a command is missing", file=sys.stderr)
        return 2
    with access.engine(look_only=True) as engine:
        namespace = check.networks_up(engine, options.network)[0].namespace
    with netns.entered(namespace):
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            # Python ignores them, and the command would inherit that.
            signal.signal(number, signal.SIG_DFL)
        try:
            os.execvp(argv[0], argv)
        except OSError as error:
            raise NatnsError(f"cannot run {argv[0]}", os.strerror(error.errno or 0)) from error
