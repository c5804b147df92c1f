# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that the kernel holds of a NIC: captured, put back, compared.

A link that moves to another namespace keeps its hardware's settings and loses the
rest: it is set down, and its addresses, routes, neighbours and settings below
/proc/sys/net are gone.  ``capture`` takes all of it, ``put`` makes it so again,
in whichever namespace the NIC is, and removes what is not part of it; run twice, it
changes nothing.

Not kept: what other stations told (neighbours that were found out), counters, multicast
groups that programs have joined, and traffic control (``obstacles`` refuses a NIC
that has some of its own).
"""

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from libvirt_natns import names
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, wire
from libvirt_natns.kernel.netlink import InterruptedDumpError
from libvirt_natns.kernel.wire import Wire
from libvirt_natns.records import asdict, dataclass, fields, replace
from libvirt_natns.upstream.router import nic_objects
from libvirt_natns.upstream.router.nic_objects import Address, Neighbour, Route, Rule

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_TXQLEN, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_GROUP, IFLA_NET_NS_FD = 13, 18, 20, 27, 28
IFLA_EXT_MASK, IFLA_LINK_NETNSID, IFLA_XDP, IFLA_NEW_IFINDEX = 29, 37, 43, 49
IFLA_PROP_LIST, IFLA_ALT_IFNAME, IFLA_PERM_ADDRESS = 52, 53, 54
IFLA_INFO_KIND = 1
IFLA_XDP_ATTACHED = 2
SKIP_STATISTICS = 8

IFF_UP = 1
IFF_ALLMULTI = 0x200
# Besides UP: NOARP, PROMISC, ALLMULTI, MULTICAST.
FLAGS = IFF_UP | 0x80 | 0x100 | 0x200 | 0x1000

SETTINGS = ("ipv6/conf", "ipv4/conf", "ipv4/neigh", "ipv6/neigh")
"""Below /proc/sys/net, where each link has a directory."""
ACCEPT_DAD = "ipv6/conf/accept_dad"

TIED = ("bridge", "bond", "team")
RESERVED = ("lo", names.ROUTER_HOST_LINK, names.ROUTER_TRANSIT)
"""Names that a NIC cannot have: links in a router namespace have them."""

TRIES = 100
DONE_ALREADY = (errno.EEXIST, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL)
PASSES = 16
"""How often routes are tried again: each may need another one first."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Capture:
    """A NIC, as it was ``at`` a time (seconds since boot, sleep included).

    ``index`` is its number, by which rules and programs may know it; ``permanent`` is
    the MAC address that the hardware came with, "" where the kernel knows none.
    ``settings`` by their directory and key, without the NIC's name.  ``foreign``
    routes lead over other links and go with the NIC's addresses, which
    packets bear that leave by them; ``links`` are these, by number and name.
    """

    name: str
    index: int
    mac: str
    mtu: int
    flags: int
    queue: int
    group: int
    alias: str
    altnames: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    foreign: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    rules: tuple[Rule, ...] = ()
    at: float = 0.0
    links: tuple[tuple[int, str], ...] = ()
    permanent: str = ""

    @property
    def ipv4(self) -> tuple[Address, ...]:
        """Addresses in IPv4 that others can use."""
        return tuple(a for a in self.addresses if a.family == nic_objects.AF_INET and a.is_global)

    @property
    def ipv6(self) -> tuple[Address, ...]:
        """The same in IPv6."""
        return tuple(a for a in self.addresses if a.family == nic_objects.AF_INET6 and a.is_global)

    @property
    def is_bare(self) -> bool:
        """Whether nobody has given it an address yet."""
        return not (self.ipv4 or self.ipv6)


def as_object(capture: Capture) -> dict[str, Any]:
    """The capture for a JSON file."""
    return asdict(capture)


def from_object(data: dict[str, Any]) -> Capture:
    """A capture as ``as_object`` made it, of another version too: fields that are unknown
    here are left out.  Raises TypeError, KeyError, AttributeError or ValueError for anything else.
    """
    makers: dict[str, Callable[..., Any]] = {
        "addresses": Address, "routes": Route, "foreign": Route,
        "neighbours": Neighbour, "rules": Rule,
    }  # fmt: skip
    made = known_fields(Capture, data)
    for key, make in makers.items():
        made[key] = tuple(make(**known_fields(make, each)) for each in data[key])
        for each in made[key]:
            bytes.fromhex(each.body)
    made["altnames"] = tuple(data["altnames"])
    # Captures of earlier versions have none.
    made["links"] = tuple((index, name) for index, name in data.get("links", ()))
    made["settings"] = tuple((key, text) for key, text in data["settings"])
    return Capture(**made)


def known_fields(kind: object, data: dict[str, Any]) -> dict[str, Any]:
    """What of an object of JSON is a field of that record."""
    return {key: data[key] for key in fields(kind) if key in data}


def clock() -> float:
    """Seconds since boot, those included in which the machine slept."""
    import time

    return time.clock_gettime(time.CLOCK_BOOTTIME)


# -- looking -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Link:
    """A link as listed: its number and attributes."""

    index: int
    flags: int
    attributes: tuple[wire.Attribute, ...]

    def text(self, kind: int) -> str:
        return os.fsdecode((wire.value(self.attributes, kind) or b"").rstrip(b"\0"))

    def number(self, kind: int) -> int | None:
        return wire.number(self.attributes, kind)

    @property
    def name(self) -> str:
        return self.text(IFLA_IFNAME)

    @property
    def mac(self) -> str:
        return (wire.value(self.attributes, IFLA_ADDRESS) or b"").hex(":")

    @property
    def permanent(self) -> str:
        """The MAC address that the hardware came with; "" where the kernel knows none."""
        return (wire.value(self.attributes, IFLA_PERM_ADDRESS) or b"").hex(":")

    @property
    def kind(self) -> str:
        info = wire.attributes(wire.value(self.attributes, IFLA_LINKINFO) or b"")
        return os.fsdecode((wire.value(info, IFLA_INFO_KIND) or b"").rstrip(b"\0"))

    @property
    def altnames(self) -> tuple[str, ...]:
        listed = wire.attributes(wire.value(self.attributes, IFLA_PROP_LIST) or b"")
        return tuple(sorted(os.fsdecode(name.rstrip(b"\0")) for _, name in listed))

    @property
    def has_xdp(self) -> bool:
        xdp = wire.attributes(wire.value(self.attributes, IFLA_XDP) or b"")
        return bool(wire.number(xdp, IFLA_XDP_ATTACHED))


def _link(body: bytes) -> Link:
    index, flags = struct.unpack_from("=4xiI", body)
    return Link(index, flags, tuple(wire.attributes(body[16:])))


def _skip_statistics() -> bytes:
    return wire.packed([(IFLA_EXT_MASK, struct.pack("=I", SKIP_STATISTICS))])


@contextmanager
def session(namespace: str | None) -> Iterator[Wire]:
    """A socket in a namespace, None for the caller's own."""
    with netns.entered(namespace):
        opened = Wire()
    try:
        yield opened
    except OSError as error:
        where = namespace or "the host"
        raise KernelError(f"the kernel refuses a change in {where}", str(error)) from error
    finally:
        opened.close()


def _listed(link: Wire, kind: int, header: bytes) -> list[bytes]:
    """A whole listing, although others make changes; nothing of a family that the kernel lacks."""
    for _ in range(TRIES):
        try:
            return link.listing(kind, header)
        except InterruptedDumpError:
            continue
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise
            return []
    raise KernelError("the kernel's network settings change all the time", "try again")


def find(session: Wire, name: str) -> Link | None:
    """A link by its name, or None."""
    wanted = (IFLA_IFNAME, name.encode() + b"\0")
    body = session.one(wire.RTM_GETLINK, bytes(16) + wire.packed([wanted]) + _skip_statistics())
    return _link(body) if body else None


def exists(namespace: str | None, name: str) -> bool:
    """Whether a namespace, None for the caller's own, is there and has a link of that name."""
    if namespace is not None and not netns.exists(namespace):
        return False
    with session(namespace) as opened:
        return find(opened, name) is not None


def capture(namespace: str | None, name: str) -> Capture:
    """All of a NIC.  Raises KernelError where there is none of that name."""
    with session(namespace) as opened:
        return _capture(opened, namespace, name)


def _capture(opened: Wire, namespace: str | None, name: str) -> Capture:
    link = find(opened, name)
    if link is None:
        raise KernelError(f"there is no link {name} in {namespace or 'the host'}")
    addresses = tuple(_addresses(opened, link.index))
    routes = tuple(_routes(opened, link.index))
    foreign = tuple(_foreign(opened, link.index, {each.ip for each in addresses}))
    return Capture(
        name=name,
        index=link.index,
        mac=link.mac,
        permanent=link.permanent,
        mtu=link.number(IFLA_MTU) or 0,
        flags=link.flags & FLAGS,
        queue=link.number(IFLA_TXQLEN) or 0,
        group=link.number(IFLA_GROUP) or 0,
        alias=link.text(IFLA_IFALIAS),
        altnames=link.altnames,
        settings=tuple(sorted(_settings(namespace, name).items())),
        addresses=addresses,
        routes=routes,
        foreign=foreign,
        neighbours=tuple(_neighbours(opened, link.index)),
        rules=tuple(_rules(opened, name, {route.table for route in routes})),
        at=clock(),
        links=tuple(sorted(_links_of(opened, foreign))),
    )


def _addresses(opened: Wire, link: int) -> Iterator[Address]:
    for body in _listed(opened, wire.RTM_GETADDR, bytes(8)):
        if struct.unpack_from("=I", body, 4)[0] == link:
            yield nic_objects.address(body)


def _route_bodies(opened: Wire) -> Iterator[bytes]:
    for family in (nic_objects.AF_INET, nic_objects.AF_INET6):
        for body in _listed(opened, wire.RTM_GETROUTE, bytes([family]) + bytes(11)):
            # Asked for a family that it lacks, the kernel lists the others again.
            if body[0] == family and not nic_objects.is_kernels_route(body):
                yield body


def _routes(opened: Wire, link: int) -> Iterator[Route]:
    for body in _route_bodies(opened):
        if link in nic_objects.links_of_route(body):
            yield nic_objects.route(body, link)


def _foreign(opened: Wire, link: int, addresses: set[str]) -> Iterator[Route]:
    for body in _route_bodies(opened):
        if link not in nic_objects.links_of_route(body):
            found = nic_objects.route(body, -1)
            if found.source in addresses:
                yield found


def _links_of(opened: Wire, foreign: tuple[Route, ...]) -> Iterator[tuple[int, str]]:
    wanted = {index for each in foreign for index in each.links}
    for each in links(opened) if wanted else ():
        if each.index in wanted:
            yield each.index, each.text(IFLA_IFNAME)


def links(opened: Wire) -> Iterator[Link]:
    """All links of the session's namespace."""
    for body in _listed(opened, wire.RTM_GETLINK, bytes(16) + _skip_statistics()):
        yield _link(body)


def _neighbours(opened: Wire, link: int) -> Iterator[Neighbour]:
    for flags in (0, nic_objects.NTF_PROXY):
        header = bytes(10) + bytes([flags]) + bytes(1)
        for body in _listed(opened, wire.RTM_GETNEIGH, header):
            found = nic_objects.neighbour(body)
            if found and struct.unpack_from("=i", body, 4)[0] == link:
                yield found


def _rules(opened: Wire, name: str, tables: set[int]) -> Iterator[Rule]:
    for family in (nic_objects.AF_INET, nic_objects.AF_INET6):
        for body in _listed(opened, wire.RTM_GETRULE, bytes([family]) + bytes(11)):
            found = nic_objects.rule(body)
            if found.priority in nic_objects.DEFAULT_PRIORITIES:
                continue
            if found.names(name) or found.table in tables:
                yield found


def _settings(namespace: str | None, name: str) -> dict[str, str]:
    found = {}
    with netns.entered(namespace):
        for directory in SETTINGS:
            place = Path("/proc/sys/net", directory, name)
            for file in place.iterdir() if place.is_dir() else ():
                # Some cannot be read before they are set.
                with suppress(OSError):
                    found[f"{directory}/{file.name}"] = file.read_text().strip()
    return found


def drops(namespace: str, name: str) -> dict[str, int]:
    """Frames that a NIC has lost, by direction.  Raises KernelError."""
    with netns.entered(namespace):
        for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
            link, _, counters = line.partition(":")
            if link.strip() == name:
                numbers = [int(word) for word in counters.split()]
                return {"in": numbers[3], "out": numbers[11]}
    return {}


# -- obstacles ---------------------------------------------------------------


def obstacle(name: str) -> tuple[str, str] | None:
    """Why a NIC of the host cannot be moved and come back as it was, and what to do about it."""
    if Path("/sys/class/net", name, "phy80211").exists():
        return "is a Wi-Fi card, which cannot move by itself", 'use an upstream of kind "host"'
    with session(None) as opened:
        link = find(opened, name)
        if link is None:
            return "does not exist", "ip link lists those that do"
        if link.number(IFLA_MASTER):
            return "is part of a bridge or bond", 'use an upstream of kind "bridge"'
        if link.kind in TIED:
            return f"is a {link.kind}, which cannot move with its ports", "name a single NIC"
        upper = _upper(opened, link)
        if upper:
            return f"carries {upper}, which would stay behind", f"remove {upper} first"
        if link.has_xdp:
            return "has an XDP program", f"take it off (ip link set {name} xdp off)"
        if _has_discipline(opened, link.index):
            return "has traffic control that a move would lose", f"tc qdisc del dev {name} root"
        return _route_obstacle(opened, link.index)


def _upper(opened: Wire, link: Link) -> str:
    """A link that is made on top of another one, such as a VLAN."""
    for other in links(opened):
        below = other.number(IFLA_LINK) == link.index and other.index != link.index
        if (
            below
            and other.kind != "veth"
            and wire.value(other.attributes, IFLA_LINK_NETNSID) is None
        ):
            return other.text(IFLA_IFNAME)
    return ""


def _has_discipline(opened: Wire, link: int) -> bool:
    """Whether somebody has set traffic control: the kernel's own has no handle."""
    for body in _listed(opened, wire.RTM_GETQDISC, bytes(20)):
        index, handle = struct.unpack_from("=4xiI", body)
        if index == link and handle:
            return True
    return False


def _route_obstacle(opened: Wire, link: int) -> tuple[str, str] | None:
    for body in _route_bodies(opened):
        links = nic_objects.links_of_route(body)
        if link not in links:
            continue
        told = nic_objects.route(body, link)
        if nic_objects.has_next_hop_object(body):
            return f"has a {told} by a nexthop object", "give it as a plain route (ip route)"
        if links != {link}:
            return f"shares a {told} with other links", "let it lead over one link"
    return None


# -- putting back ------------------------------------------------------------


def move(name: str, source: str | None, target: str | None, index: int = 0) -> None:
    """Move a NIC between namespaces, without its alternative names, and thereby set it down.

    Before Linux 6.6 these stay registered where they were, and block
    the way back.  ``index`` is the number that it gets there, if that is free and
    the kernel can (5.14).  Raises KernelError.
    """
    path = os.fspath(netns.OWN) if target is None else f"/run/netns/{target}"
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with session(source) as opened:
            link = find(opened, name)
            if link is None:
                raise KernelError(f"there is no link {name} in {source or 'the host'}")
            _change_altnames(opened, link, ())
            namespace = (IFLA_NET_NS_FD, struct.pack("=i", descriptor))
            _move(opened, link.index, namespace, index)
    finally:
        os.close(descriptor)


def _move(opened: Wire, link: int, namespace: wire.Attribute, index: int) -> None:
    numbered = [namespace, (IFLA_NEW_IFINDEX, struct.pack("=i", index))]
    if index:
        with suppress(OSError):
            opened.change(wire.RTM_NEWLINK, wire.set_link(link, numbered))
            return
    opened.change(wire.RTM_NEWLINK, wire.set_link(link, [namespace]))


def put(namespace: str | None, wanted: Capture, *, alone: bool = True) -> None:
    """Make a NIC, wherever it is by now, what a capture says.  Raises KernelError.

    Unless ``alone``, what else the NIC has stays.
    """
    elapsed = max(0.0, clock() - wanted.at)
    with session(namespace) as opened:
        link = find(opened, wanted.name)
        if link is None:
            raise KernelError(f"there is no link {wanted.name} in {namespace or 'the host'}")
        settings = dict(wanted.settings)
        # These addresses were in use all the time: nobody need be asked.
        write_settings(namespace, wanted.name, {**settings, ACCEPT_DAD: "0"})
        _put_link(opened, link, wanted)
        if alone:
            _remove_others(opened, link.index, wanted)
        _put_addresses(opened, link.index, wanted, elapsed)
        _put_neighbours(opened, link.index, wanted)
        _put_routes(opened, link.index, wanted, elapsed)
        _put_rules(opened, wanted)
        write_settings(namespace, wanted.name, settings)


def write_settings(namespace: str | None, name: str, settings: dict[str, str]) -> None:
    """Set a link's settings below /proc/sys/net that differ; the kernel lacks or refuses some."""
    present = _settings(namespace, name)
    with netns.entered(namespace):
        for key, text in settings.items():
            if present.get(key, text) != text:
                directory, _, leaf = key.rpartition("/")
                # The kernel refuses some of what it shows.
                with suppress(OSError):
                    Path("/proc/sys/net", directory, name, leaf).write_text(text)


def _put_link(opened: Wire, link: Link, wanted: Capture) -> None:
    numbers = ((IFLA_MTU, wanted.mtu), (IFLA_TXQLEN, wanted.queue), (IFLA_GROUP, wanted.group))
    changed = [
        (kind, struct.pack("=I", number)) for kind, number in numbers if link.number(kind) != number
    ]
    if link.mac != wanted.mac:
        changed.append((IFLA_ADDRESS, bytes.fromhex(wanted.mac.replace(":", ""))))
    if link.text(IFLA_IFALIAS) != wanted.alias:
        changed.append((IFLA_IFALIAS, wanted.alias.encode()))
    if changed or link.flags & FLAGS != wanted.flags:
        body = wire.set_link(link.index, changed, wanted.flags, FLAGS)
        opened.change(wire.RTM_NEWLINK, body)
    _change_altnames(opened, link, wanted.altnames)


def _change_altnames(opened: Wire, link: Link, wanted: Iterable[str]) -> None:
    present, wanted = set(link.altnames), set(wanted)
    for kind, changed, flags in (
        (wire.RTM_DELLINKPROP, present - wanted, 0),
        (wire.RTM_NEWLINKPROP, wanted - present, wire.NLM_F_CREATE | wire.NLM_F_EXCL),
    ):
        if changed:
            listed = [(IFLA_ALT_IFNAME, name.encode() + b"\0") for name in sorted(changed)]
            properties = (IFLA_PROP_LIST | wire.NLA_NESTED, wire.packed(listed))
            opened.change(kind, wire.set_link(link.index, [properties]), flags)


def _remove_others(opened: Wire, link: int, wanted: Capture) -> None:
    """Addresses, neighbours and routes that are not part of a capture."""
    addresses = {each.body for each in wanted.addresses}
    for address in list(_addresses(opened, link)):
        # The kernel makes link-local ones by itself.
        local = address.family == nic_objects.AF_INET6 and not address.is_global
        if address.body not in addresses and not local:
            attempt(opened, wire.RTM_DELADDR, address.request(link, 0))
    neighbours = {each.body for each in wanted.neighbours}
    for neighbour in list(_neighbours(opened, link)):
        if neighbour.body not in neighbours:
            attempt(opened, wire.RTM_DELNEIGH, neighbour.request(link))
    # Routes only now: some have gone with the addresses.
    routes = {each.body for each in wanted.routes}
    for route in list(_routes(opened, link)):
        # One that expires was told by a router meanwhile, and is newer than what we know.
        if route.body not in routes and route.lasts and not _is_link_local(route):
            attempt(opened, wire.RTM_DELROUTE, route.request(link))


def _put_addresses(opened: Wire, link: int, wanted: Capture, elapsed: float) -> None:
    present = {each.body for each in _addresses(opened, link)}
    for each in wanted.addresses:
        if each.body not in present:
            request = each.request(link, elapsed)
            attempt(opened, wire.RTM_NEWADDR, request, wire.NLM_F_CREATE | wire.NLM_F_EXCL)


def _put_neighbours(opened: Wire, link: int, wanted: Capture) -> None:
    present = {each.body for each in _neighbours(opened, link)}
    for each in wanted.neighbours:
        if each.body not in present:
            # Not EXCL: the kernel may have found it out itself meanwhile.
            opened.change(wire.RTM_NEWNEIGH, each.request(link), wire.REPLACE)


def _put_routes(opened: Wire, link: int, wanted: Capture, elapsed: float) -> None:
    present = {each.body for each in _routes(opened, link)}
    foreign = {nic_objects.route(body, -1).body for body in _route_bodies(opened)}
    missing = [each for each in wanted.routes if each.body not in present]
    possible = _possible(opened, wanted) if wanted.foreign else ()
    missing += [each for each in possible if each.body not in foreign]
    _add_routes(opened, link, missing, elapsed)


def _possible(opened: Wire, wanted: Capture) -> list[Route]:
    """The foreign routes whose links are still there, and up.

    By number and name: a number may be another link's by now.
    """
    names = dict(wanted.links)
    there = {
        each.index
        for each in links(opened)
        if each.flags & IFF_UP and names.get(each.index, "") in ("", each.text(IFLA_IFNAME))
    }
    return [each for each in wanted.foreign if each.links <= there]


def _is_link_local(route: Route) -> bool:
    """Whether it is of those that the kernel makes for each link that speaks IPv6."""
    return route.destination in ("fe80::/64", "ff00::/8")


def _add_routes(opened: Wire, link: int, missing: list[Route], elapsed: float) -> None:
    problem: OSError | None = None
    for _ in range(PASSES):
        left = []
        for each in missing:
            try:
                flags = wire.NLM_F_CREATE | wire.NLM_F_APPEND
                request = each.request(link, elapsed)
                attempt(opened, wire.RTM_NEWROUTE, request, flags)
            except OSError as error:
                problem = error
                left.append(each)
        if not left:
            return
        if len(left) == len(missing):
            break
        missing = left
    raise KernelError(f"the kernel refuses the {missing[0]}", str(problem)) from problem


def _put_rules(opened: Wire, wanted: Capture) -> None:
    tables = {route.table for route in wanted.routes}
    present = {each.body for each in _rules(opened, wanted.name, tables)}
    for each in wanted.rules:
        if each.body not in present:
            flags = wire.NLM_F_CREATE | wire.NLM_F_EXCL
            attempt(opened, wire.RTM_NEWRULE, bytes.fromhex(each.body), flags)


def attempt(opened: Wire, kind: int, body: bytes, flags: int = 0) -> None:
    """A change that may have come about already.  Raises OSError for any other reason."""
    try:
        opened.change(kind, body, flags)
    except OSError as error:
        if error.errno not in DONE_ALREADY:
            raise


# -- completing --------------------------------------------------------------


def completed(found: Capture, kept: Capture) -> Capture:
    """A NIC with what it was given ``kept``, and by now lacks: all of a family, or its way out.

    One that has a global address which it did not have then is another one, or was given
    others: it stays as it is.  What the hardware is, and what it is called, is never
    taken from what was kept, nor are link-local addresses of another MAC.
    """
    if not {each.ip for each in (*found.ipv4, *found.ipv6)} <= {
        each.ip for each in (*kept.ipv4, *kept.ipv6)
    }:
        return found
    kept = replace(kept, name=found.name)
    wanted = kept if found.mac == kept.mac else _without_link_local(kept)
    if found.is_bare:
        own = {"index": found.index, "mac": found.mac, "altnames": found.altnames}
        return replace(wanted, **own, at=found.at)
    for family, directory in ((nic_objects.AF_INET, "ipv4/"), (nic_objects.AF_INET6, "ipv6/")):
        if _lacks(found, kept, family):
            found = _with_family(found, wanted, family, directory)
    return found


def _lacks(found: Capture, kept: Capture, family: int) -> bool:
    def has(capture: Capture) -> tuple[bool, bool]:
        addresses = any(each.family == family for each in (*capture.ipv4, *capture.ipv6))
        return addresses, any(each.is_default and each.family == family for each in capture.routes)

    return any(had and not now for had, now in zip(has(kept), has(found), strict=True))


def _without_link_local(capture: Capture) -> Capture:
    stay = (e for e in capture.addresses if e.family == nic_objects.AF_INET or e.is_global)
    return replace(capture, addresses=tuple(stay))


def _with_family(found: Capture, kept: Capture, family: int, directory: str) -> Capture:
    """A NIC with all that was kept of one family besides what it has."""
    changes: dict[str, Any] = {
        key: _joined(getattr(found, key), getattr(kept, key), family)
        for key in ("routes", "foreign", "neighbours", "rules")
    }
    present = {each.ip for each in found.addresses}
    missing = [e for e in kept.addresses if e.family == family and e.ip not in present]
    settings = {key: text for key, text in kept.settings if key.startswith(directory)}
    return replace(
        found,
        flags=found.flags | kept.flags & IFF_UP,
        addresses=(*found.addresses, *missing),
        settings=tuple(sorted((dict(found.settings) | settings).items())),
        **changes,
    )


def _joined(found: tuple[T, ...], kept: tuple[T, ...], family: int) -> tuple[T, ...]:
    present = {_body(each) for each in found}
    others = (e for e in kept if bytes.fromhex(_body(e))[0] == family and _body(e) not in present)
    return (*found, *others)


def _body(listed: Any) -> str:  # noqa: ANN401
    """A route, neighbour or rule as the kernel lists it; its family is the first byte."""
    return str(listed.body)


# -- comparing ---------------------------------------------------------------


def differences(namespace: str | None, wanted: Capture) -> list[str]:
    """How a NIC differs from a capture, in words."""
    if not exists(namespace, wanted.name):
        return [f"{wanted.name} is missing in {namespace or 'the host'}"]
    found = capture(namespace, wanted.name)
    listed = [
        f"{what} of {wanted.name} is {getattr(found, key)} instead of {getattr(wanted, key)}"
        for key, what in (("mac", "the MAC"), ("mtu", "the MTU"))
        if getattr(found, key) != getattr(wanted, key)
    ]
    if found.flags & IFF_UP != wanted.flags & IFF_UP:
        listed.append(f"{wanted.name} is {'up' if found.flags & IFF_UP else 'down'}")
    return [*listed, *_settings_differ(found, wanted), *_objects_differ(found, wanted)]


def _settings_differ(found: Capture, wanted: Capture) -> list[str]:
    present = dict(found.settings)
    return [
        f"setting {key} of {wanted.name} is {present[key]} instead of {text}"
        for key, text in wanted.settings
        if present.get(key, text) != text
    ]


def _objects_differ(found: Capture, wanted: Capture) -> list[str]:
    listed = []
    for key in ("addresses", "routes", "neighbours", "rules"):
        present = {each.body for each in getattr(found, key)}
        listed += [
            f"{each} of {wanted.name} is missing"
            for each in getattr(wanted, key)
            if each.body not in present
        ]
    return listed


def lasting(wanted: Capture) -> Capture:
    """A NIC without the routes that expire: others may have come in their place by now."""
    return replace(wanted, routes=tuple(each for each in wanted.routes if each.lasts))


def is_up(namespace: str, name: str) -> bool:
    """Whether a NIC is up.  Raises KernelError where there is none of that name."""
    with session(namespace) as opened:
        link = find(opened, name)
    if link is None:
        raise KernelError(f"there is no link {name} in {namespace}")
    return bool(link.flags & IFF_UP)


def inside(taken: Capture, hosts: Iterable[str], settings: dict[str, str]) -> Capture:
    """A NIC as it is in its router namespace: without the host's own IPv6 addresses.

    These are answered for instead.  Those that stay do so for good: advertisements are
    not to make addresses there, and so do not renew any.
    """
    moved = set(hosts)
    kept = (each for each in taken.addresses if each.ip not in moved)
    known = {key for key, _ in taken.settings}
    routes = tuple(each.without_source() if each.source in moved else each for each in taken.routes)
    merged = dict(taken.settings) | {k: v for k, v in settings.items() if k in known}
    return replace(
        taken,
        flags=taken.flags | IFF_UP,
        settings=tuple(sorted(merged.items())),
        addresses=tuple(
            each.for_good() if each.family == nic_objects.AF_INET6 else each for each in kept
        ),
        routes=routes,
        foreign=(),
        links=(),
        neighbours=(*taken.neighbours, *map(nic_objects.proxy, sorted(moved))),
    )
