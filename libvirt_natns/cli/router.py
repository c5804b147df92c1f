# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns router: up, down, confirm and status."""

import argparse
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass

from libvirt_natns import names
from libvirt_natns.cli import json_text, router_status
from libvirt_natns.errors import RouterError, StoreError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.upstream.router import boot, health, journal, recover
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min)?")
LONGEST = 3600.0
ENDINGS = (signal.SIGHUP, signal.SIGTERM)

NAME = "the upstream of kind router; default: the only router"

Machines = Callable[[], AbstractContextManager[RouterLifecycle]]


def add_parser(parser: argparse.ArgumentParser, machines: Machines) -> None:
    """Add the commands; ``machines`` opens a RouterLifecycle over the machine's state."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=Bound(run, machines))
        return added

    sub = add("up", _up, "move the NIC into its router namespace, or repair the router")
    sub.add_argument("name", nargs="?", help=NAME)
    sub.add_argument(
        "--confirm-within",
        metavar="TIME",
        type=duration,
        help="roll the router back unless it is confirmed within this time, such as 60s",
    )
    sub.add_argument(
        "--boot", action="store_true", help="do nothing for a router that was never confirmed"
    )
    sub = add("confirm", _confirm, "confirm a router, so that it is not rolled back")
    sub.add_argument("name", nargs="?", help=NAME)
    sub = add("down", _down, "give the NIC, all addresses, routes and resolvers back to the host")
    sub.add_argument("name", nargs="?", help=NAME)
    sub.add_argument("--force", action="store_true", help="also while networks use the router")
    sub = add("status", _status, "show the state of the router")
    sub.add_argument("name", nargs="?", help="a single upstream of kind router")
    sub.add_argument("--json", action="store_true", help="print JSON, for programs")


@dataclass(frozen=True, slots=True)
class Bound:
    """A command, and the function that opens a RouterLifecycle for it."""

    run: Callable[..., int]
    machines: Machines

    def __call__(self, options: argparse.Namespace) -> int:
        with self.machines() as opened:
            if self.run is not _up or options.boot:
                for fault in opened.faults:
                    _warn(str(fault))
            return self.run(opened, options)


def duration(text: str) -> float:
    """Return the seconds of "60", "60s" or "2m".  Raises ArgumentTypeError for other text."""
    match = DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * (1 if match[2] in (None, "s") else 60) if match else 0.0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a time of up to an hour, such as 60s or 2m"
        )
    return seconds


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ignore the signals of a session that ends, so that the work goes on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    # The terminal may have gone with the NIC.
    with suppress(OSError):
        print(line)
        sys.stdout.flush()


def _warn(line: str) -> None:
    with suppress(OSError):
        print(f"virt-natns: {line}", file=sys.stderr)


def _name(opened: RouterLifecycle, options: argparse.Namespace) -> str:
    """Return the name of the router, which may be recorded and not configured any more."""
    recorded = journal.known_names()
    if options.name is not None and names.slug(options.name) in recorded:
        return str(options.name)
    try:
        return opened.upstream(options.name).name
    except RouterError:
        if options.name is None and len(recorded) == 1:
            return recorded[0]
        raise


# -- commands ----------------------------------------------------------------


def _up(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    if options.boot:
        return _boot(opened, options)
    for fault in opened.faults:
        raise fault
    name = opened.upstream(options.name).name
    with undisturbed():
        done = opened.up(name, options.confirm_within)
        done += opened.reattach(name)
    _tell(opened, name, done)
    record = journal.load(name)
    if record is not None and record.deadline is not None:
        _say(
            f"log in again and run: virt-natns router confirm {name}"
            f" (within {record.deadline - boot_clock.now():.0f} s, or the router is rolled back)"
        )
    return 0


def _boot(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    name = _name(opened, options)
    with undisturbed():
        try:
            for line in opened.expire_overdue():
                _say(line)
        except Exception as error:  # the fault of another router must not stop this boot
            _warn(f"cannot roll back a router that was not confirmed in time: {error}")
        if not recover.is_confirmed(name):
            with suppress(StoreError):
                recover.forget_earlier(name)
            _say(f"router {name} was never confirmed: virt-natns router up {name}")
            return 0
        done = boot.up(opened, name, _warn)
        try:
            done += opened.reattach(name)
        except StoreError as error:
            _warn(str(error))
    _tell(opened, name, done)
    return 0


def _tell(opened: RouterLifecycle, name: str, done: list[str]) -> None:
    for line in done or [f"router {name} is up already"]:
        _say(line)
    for line in health.unapplied(opened.config, name):
        _warn(f"router {name}: {line}")


def _confirm(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    name = _name(opened, options)
    waited = opened.confirm(name)
    _say(f"router {name} is confirmed" if waited else f"router {name} is confirmed already")
    return 0


def _down(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    name = _name(opened, options)
    with undisturbed():
        problems = opened.down(name, force=options.force)
    _say(f"router {name} is down")
    for line in problems:
        print(f"virt-natns: {line}", file=sys.stderr)
    return 0


def _status(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    if options.name is None:
        recorded = [record.target.name for record in journal.load_all()]
        recorded += journal.damaged()
        named = sorted({*opened.config.routers, *recorded})
        if not named:
            raise RouterError(
                "no router is configured",
                f'add [upstreams.wan] with kind = "router" and nic to {names.CONFIG_FILE}',
            )
    else:
        named = [_name(opened, options)]
    routers = [router_status.describe(opened, name) for name in named]
    if options.json:
        print(json_text.dumped({"routers": routers}))
    else:
        print("\n".join(router_status.text(router) for router in routers))
    return 0
