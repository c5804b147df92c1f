# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns forward: list, add, remove.

The domain's metadata is changed as virsh would change it, and so are a running guest's
forwards: both or neither.  libvirt may be waiting for a hook that needs a lock.  So
libvirt is asked while no such lock is held.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

from libvirt_natns import names
from libvirt_natns.addresses import parsed
from libvirt_natns.cli import (
    forward_edit,
    forward_list,
    forward_pending,
    forward_spec,
    libvirt_view,
)
from libvirt_natns.cli.access import Engines
from libvirt_natns.cli.forward_edit import ListenLookup, Options
from libvirt_natns.cli.forward_nics import require_later, require_now
from libvirt_natns.cli.forward_spec import Spec
from libvirt_natns.daemons import libvirt
from libvirt_natns.daemons.libvirt import Guest, Where
from libvirt_natns.documents import domain_edit, libvirt_xml
from libvirt_natns.documents.domain_edit import Edited
from libvirt_natns.documents.xml_values import MutableElement
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.engine.publication.attachment import ANY, Attachment
from libvirt_natns.engine.publication.choices import Selector
from libvirt_natns.engine.publication.dhcp_hosts import known_addresses
from libvirt_natns.engine.publication.scopes import waits
from libvirt_natns.engine.publication.words import in_words, listening
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError
from libvirt_natns.kernel.locks import locked
from libvirt_natns.model.publication import Forward, PortProtocol
from libvirt_natns.operations.undo import Undo
from libvirt_natns.state.chosen_ports import PortKey
from libvirt_natns.values import as_argument, quoted

LOCK = names.RUN_DIRECTORY / "forward"
"""The lock of this command alone: no hook takes it, so libvirt may be called under it."""

PLACE = re.compile(r"^domain .*, line \d+: <natns:\w+> ")
"""Begins a message about an element of a guest's metadata."""

T = TypeVar("T")

SPEC = (
    "[ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp]: 2222:22, 8000-8010, 8000-8010:9000-9010,"
    " 8000-8010:80 (all onto one), auto:22, 192.168.0.150:53/udp, [2001:db8::5]:80"
)


def add_parser(parser: argparse.ArgumentParser, engines: Engines) -> None:
    """Add the three commands below ``forward``."""
    commands = parser.add_subparsers(required=True, metavar="list|add|remove")

    def add(name: str, command: Callable[..., int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=partial(command, engines))
        return added

    sub = add("list", _list, "show the published ports, chosen ports included")
    sub.add_argument("guest", nargs="?", metavar="GUEST", help="name or uuid of a single guest")
    sub.add_argument("--json", action="store_true", help="print JSON, for programs")
    sub = add("add", _add, "publish ports of a guest, now and at each later start")
    sub.add_argument("guest", metavar="GUEST", help="name or uuid of the guest")
    sub.add_argument("spec", metavar="FORWARD", type=_typed(forward_spec.parse_new), help=SPEC)
    sub.add_argument("--source", metavar="CIDR[,CIDR]", help="allowed clients; default: all")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--network", metavar="NAME", help="the guest's NIC in this network")
    which.add_argument("--mac", help="the guest's NIC with this MAC address")
    sub.add_argument(
        "--guest-address", metavar="ADDRESS", help="the guest's address, if not from DHCP"
    )
    sub = add("remove", _remove, "withdraw ports of a guest, and delete their conntrack entries")
    sub.add_argument("guest", metavar="GUEST", help="name or uuid of the guest")
    sub.add_argument(
        "spec",
        metavar="FORWARD",
        type=_typed(forward_spec.parse_old),
        help="the listening address and port, as listed:"
        " [ADDRESS:]PORT[-PORT][/tcp|udp|sctp], or auto:PORT",
    )


def _typed(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return ``parse`` for argparse, which shows no ValueError's own words."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


# -- list ----------------------------------------------------------------------


def _list(engines: Engines, options: argparse.Namespace) -> int:
    with engines(look_only=True) as engine:
        # libvirt first: a guest that starts in between is found in force then.
        view = libvirt_view.view(engine.config)
        rows = forward_list.collect(engine)
        rows = forward_list.ordered([*rows, *forward_pending.collect(engine, view, rows)])
    complaints = libvirt_view.complaints(view, options.guest)
    if options.guest:
        rows = [row for row in rows if options.guest in (row.guest, row.guest_uuid)]
        if not rows:
            # Raises LibvirtError if libvirt has no such guest.
            with libvirt.guest(options.guest):
                pass
        if complaints and not rows:
            raise NatnsError(complaints[0])
    for line in complaints:
        print(f"virt-natns: {line}", file=sys.stderr)
    show = forward_list.as_json if options.json else forward_list.text
    print(show(rows))
    return 0


# -- add and remove ------------------------------------------------------------


def _add(engines: Engines, options: argparse.Namespace) -> int:
    more = Options(options.network, options.mac, options.source, options.guest_address)
    with _change(engines, options.guest) as (guests, guest):
        edits = _additions(guest, options.spec, more)
        runs = "live" in guest.places
        if "live" in edits:
            domain = libvirt_xml.parse_domain_nics(edits["live"].document)
            require_now(guests, domain, options.network, options.mac)
        elif not runs:
            domain = libvirt_xml.parse_domain_nics(edits["config"].document)
            require_later(guests, domain, options.network, options.mac)
            _warn(guests, edits["config"])
        before = _published(guests, guest)
        _apply(guests, guest, edits)
        for forward in _published(guests, guest):
            if forward not in before:
                print(f"{guest.name}: {in_words(forward)}{_waiting(guests, forward)}")
        if not runs:
            print(f"{guest.name}: published when it starts")
    return 0


def _waiting(guests: Guests, forward: Forward) -> str:
    record = guests.store.networks.get(forward.network)
    present = guests.engine.kernel.host.addresses.beyond_link()
    if record and waits(forward, record.kind, present):
        return f" (waits until the host has {forward.address})"
    return ""


def _warn(guests: Guests, edited: Edited) -> None:
    """Refuse a guest that could never start; warn of a conflict with a running guest."""
    domain = libvirt_xml.parse_domain(edited.document)
    try:
        guests.trial(domain)
    except ConflictError as error:
        print(
            f"virt-natns: guest {quoted(domain.name)} would not start now: {error}", file=sys.stderr
        )


def _published(guests: Guests, guest: Guest) -> tuple[Forward, ...]:
    return guests.store.claims.forwards(owner=guest.uuid)


def _remove(engines: Engines, options: argparse.Namespace) -> int:
    with _change(engines, options.guest) as (guests, guest):
        _apply(guests, guest, _removals(guests, guest, options.spec))
    return 0


@contextmanager
def _change(engines: Engines, named: str) -> Iterator[tuple[Guests, Guest]]:
    """Lock the guest's forwards against other changes by this command, and open the guest."""
    with engines() as engine, libvirt.guest(named) as guest, locked(LOCK):
        try:
            yield Guests(engine), guest
        finally:
            with suppress(OSError):
                LOCK.rmdir()


def _additions(guest: Guest, spec: Spec, options: Options) -> dict[Where, Edited]:
    """Return the guest's definitions with the forward, where they lack it."""
    edits: dict[Where, Edited] = {}
    refused: list[ConflictError] = []
    change = partial(forward_edit.add, spec=spec, options=options)
    for where in guest.places:
        document = guest.document(where)
        try:
            edits[where] = domain_edit.edit_nat(document, change)
        except ConflictError as error:
            refused.append(error)
        else:
            _check_typed(document, edits[where], spec)
    if not edits:
        raise refused[0]
    return edits


def _check_typed(document: bytes, edited: Edited, spec: Spec) -> None:
    """Refuse a forward that makes right metadata wrong, without a line of XML in the words.

    A person who typed a command has not seen the line.  Raises DocumentError.
    """
    # Metadata that was wrong before is refused later, with its line.
    if isinstance(libvirt_xml.read_domain(document).outcome, DocumentError):
        return
    outcome = libvirt_xml.read_domain(edited.document).outcome
    if isinstance(outcome, DocumentError):
        fact = PLACE.sub(f"forward {spec} ", outcome.fact)
        raise DocumentError(fact, outcome.remedy)


def _removals(guests: Guests, guest: Guest, spec: Spec) -> dict[Where, Edited]:
    """Return the guest's definitions without the forward, where they have it."""
    edits: dict[Where, Edited] = {}
    for where in guest.places:
        xml = guest.document(where)
        lookup = _lookup(guests, xml)
        removed: list[bool] = []

        def change(nat: MutableElement, lookup: ListenLookup = lookup) -> None:
            removed.append(forward_edit.remove(nat, spec, lookup))  # noqa: B023 - used at once

        edited = domain_edit.edit_nat(xml, change)
        if removed[0]:
            edits[where] = edited
    if not edits:
        raise NatnsError(
            f"guest {quoted(guest.name)} has no forward {spec}",
            f"see virt-natns forward list {as_argument(guest.name)}",
        )
    return edits


def _lookup(guests: Guests, xml: bytes) -> ListenLookup:
    plain = libvirt_xml.parse_domain_nics(xml)
    attachments = guests.attachments(plain)

    def select(network: str | None, mac: str | None) -> Attachment | None:
        for at in attachments:
            if network in (None, at.network.name) and (mac or at.nic.mac).lower() == at.nic.mac:
                return at
        return None

    def listens(which: Selector) -> set[str]:
        at = select(which.network, which.mac)
        if at is None:
            return set()
        addresses = known_addresses(guests.store, at.network, at.nic.mac, plain.name)
        targets = {parsed(which.guest_address)} if which.guest_address else addresses
        public = {str(target) for target in targets if at.is_public(target)}
        if at.segment.shares_addresses:
            return {listening(ANY), *public}
        return {*map(str, at.outside.addresses), *public}

    def chosen(which: Selector, proto: PortProtocol, to: int) -> int | None:
        at = select(which.network, which.mac)
        if at is None:
            return None
        key = PortKey(plain.uuid, at.network.uuid, proto, str(which), to)
        return guests.store.chosen_ports.get(key)

    return ListenLookup(listens, chosen)


def _apply(guests: Guests, guest: Guest, edits: dict[Where, Edited]) -> None:
    """Write the metadata and publish its forwards: both, or neither."""
    for where, edited in edits.items():
        domain = libvirt_xml.parse_domain(edited.document)
        if where == "live":
            guests.trial(domain)
    former = {where: domain_edit.nat_text(guest.document(where)) for where in edits}
    with Undo() as undo:
        for where, edited in edits.items():
            undo.add(guest.write, where, former[where])
            guest.write(where, edited.element)
        if "live" in edits:
            xml = guest.document("live")
            guests.publish(libvirt_xml.parse_domain(xml), xml)
            if not guest.running:
                # The guest stopped in between, and its hooks found no forward to end.
                guests.forget(guest.uuid)
        undo.pop_all()
