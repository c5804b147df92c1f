# SPDX-License-Identifier: LGPL-2.1-or-later
"""virt-natns router up, down, confirm and status."""

import argparse
import json
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterError, StoreError
from libvirt_natns.records import dataclass
from libvirt_natns.upstream.router import (
    boot,
    boot_clock,
    health,
    journal,
    nic_link,
    nic_snapshot,
    recover,
)
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|min)?")
LONGEST = 3600.0
ENDINGS = (signal.SIGHUP, signal.SIGTERM)

Machines = Callable[[], AbstractContextManager[RouterLifecycle]]


def add_parser(parser: argparse.ArgumentParser, machines: Machines) -> None:
    """Add the commands; ``machines`` opens a RouterLifecycle over the machine's state."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=Bound(run, machines))
        return added

    sub = add("up", _up, "move the NIC into its router namespace, or repair what is there")
    sub.add_argument("name", nargs="?", help="the upstream of kind router; the only one without")
    sub.add_argument(
        "--confirm-within",
        metavar="TIME",
        type=duration,
        help="take it back unless it is confirmed in time, such as 60s",
    )
    sub.add_argument(
        "--boot", action="store_true", help="only a router that was confirmed once; else nothing"
    )
    sub = add("confirm", _confirm, "let a router stay that waits for that")
    sub.add_argument("name", nargs="?")
    sub = add("down", _down, "put the NIC, all addresses, routes and resolvers back")
    sub.add_argument("name", nargs="?")
    sub.add_argument("--force", action="store_true", help="although networks use it")
    sub = add("status", _status, "show how the router is")
    sub.add_argument("name", nargs="?")
    sub.add_argument("--json", action="store_true", help="for programs")


@dataclass(frozen=True, slots=True)
class Bound:
    """A command with what opens a RouterLifecycle."""

    run: Callable[..., int]
    machines: Machines

    def __call__(self, options: argparse.Namespace) -> int:
        with self.machines() as opened:
            if self.run is not _up or options.boot:
                for fault in opened.faults:
                    _warn(str(fault))
            return self.run(opened, options)


def duration(text: str) -> float:
    """Seconds out of "60", "60s" or "2m"; ArgumentTypeError for anything else."""
    found = DURATION.fullmatch(text.strip())
    seconds = float(found[1]) * (1 if found[2] in (None, "s") else 60) if found else 0.0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text!r} is no time up to an hour, such as 60s or 2m")
    return seconds


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let the work go on when the session ends from which it was ordered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, signal.SIG_IGN) for each in ENDINGS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _say(line: str) -> None:
    # The terminal may be gone by now.
    with suppress(OSError):
        print(line)
        sys.stdout.flush()


def _warn(line: str) -> None:
    with suppress(OSError):
        print(f"virt-natns: {line}", file=sys.stderr)


def _name(opened: RouterLifecycle, options: argparse.Namespace) -> str:
    """The router that is meant, also one that is recorded and not configured any more."""
    known = journal.known_names()
    if options.name is not None and names.slug(options.name) in known:
        return str(options.name)
    try:
        return opened.upstream(options.name).name
    except RouterError:
        if options.name is None and len(known) == 1:
            return known[0]
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
            f"log in once more and say: virt-natns router confirm {name}"
            f" (within {record.deadline - boot_clock.now():.0f} s, or all goes back)"
        )
    return 0


def _boot(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    name = _name(opened, options)
    with undisturbed():
        try:
            for line in opened.expire_overdue():
                _say(line)
        except Exception as error:  # of another router: this one comes up, or is rescued
            _warn(f"cannot take back a router that was not confirmed in time: {error}")
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
    _say(f"router {name} stays" if waited else f"router {name} is confirmed already")
    return 0


def _down(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    name = _name(opened, options)
    with undisturbed():
        found = opened.down(name, force=options.force)
    _say(f"router {name} is down")
    for line in found:
        print(f"virt-natns: {line}", file=sys.stderr)
    return 0


def _status(opened: RouterLifecycle, options: argparse.Namespace) -> int:
    if options.name is None:
        configured = [n for n, u in opened.config.upstreams.items() if u.kind == "router"]
        recorded = [record.target.name for record in journal.load_all()]
        recorded += journal.damaged()
        named = sorted({*configured, *recorded})
        if not named:
            raise RouterError(
                "no router is configured",
                f'add [upstreams.wan] with kind = "router" and nic to {names.CONFIG_FILE}',
            )
    else:
        named = [_name(opened, options)]
    found = [describe(opened, name) for name in named]
    if options.json:
        print(json.dumps({"routers": found}, indent=2))
    else:
        print("\n".join(_text(each) for each in found))
    return 0


# -- status ------------------------------------------------------------------


def describe(opened: RouterLifecycle, name: str) -> dict[str, object]:
    """How a router is, for programs."""
    state, record, found = health.of(opened, name)
    described: dict[str, object] = {
        "router": name,
        "state": state,
        "differences": found,
        "confirmed": recover.is_confirmed(name),
    }
    if record is not None:
        described |= _details(opened, record)
    return described


def _details(opened: RouterLifecycle, record: RouterRecord) -> dict[str, object]:
    target, before = record.target, record.before
    left = None if record.deadline is None else max(0.0, record.deadline - boot_clock.now())
    return {
        "step": record.step,
        "seconds_left": left,
        "nic": target.nic,
        "mac": before.mac,
        "namespace": target.namespace,
        "addresses": _router_addresses(target, before),
        "host": {
            "link": target.link,
            "address": str(target.host),
            "addresses6": list(target.addresses6),
            "ports": [f"{p}/{a}" if a == b else f"{p}/{a}-{b}" for p, a, b in target.ports],
        },
        "transit": target.transit,
        "transit6": target.transit6 or None,
        "subnet6": target.subnet6 or None,
        "networks": opened.users_of(record),
        "dropped": dropped(target.namespace, target.nic),
    }


def _router_addresses(target: Target, before: Capture) -> list[str]:
    with suppress(NatnsError):
        before = nic_snapshot.capture(target.namespace, target.nic)
    return [f"{each.ip}/{each.prefix}" for each in (*before.ipv4, *before.ipv6)]


def dropped(namespace: str, name: str) -> dict[str, int]:
    """Frames that the NIC has dropped or could not send, by direction."""
    with suppress(NatnsError, OSError):
        return nic_link.drops(namespace, name)
    return {}


MEANING = {
    "down": "down",
    "half-done": "half-done (killed at: {step}); virt-natns router up or down mends it",
    "overdue": "not confirmed in time; virt-natns router up or down takes it back",
    "unconfirmed": "up, taken back in {left:.0f} s unless confirmed",
    "up": "up",
    "damaged": "damaged; virt-natns router up repairs it",
}


def _text(found: dict[str, object]) -> str:
    left = found.get("seconds_left") or 0.0
    said = MEANING[str(found["state"])].format(step=found.get("step"), left=left)
    lines = [f"router {found['router']}: {said}"]
    if "nic" in found:
        lines += _detail_lines(found)
    differences = found["differences"]
    assert isinstance(differences, list)
    lines += [f"  ! {what}" for what in differences]
    return "\n".join(lines)


def _detail_lines(found: dict[str, object]) -> Iterator[str]:
    host, networks = found["host"], found["networks"]
    addresses, drops = found["addresses"], found["dropped"]
    assert isinstance(host, dict) and isinstance(networks, list)
    assert isinstance(addresses, list) and isinstance(drops, dict)
    yield f"  NIC       {found['nic']}, {found['mac']}, in {found['namespace']}"
    yield f"  router    {', '.join(addresses) or 'no address'}"
    own = ", ".join([host["address"], *host["addresses6"]])
    yield f"  host      {own} on {host['link']}; gets {', '.join(host['ports']) or 'no port'}"
    bridged = " and ".join(str(each) for each in (found["transit"], found["transit6"]) if each)
    yield f"  networks  {', '.join(networks) or 'none'}, on {bridged}"
    counted = ", ".join(f"{what} {number}" for what, number in drops.items())
    yield f"  dropped   {counted or 'unknown'}"
