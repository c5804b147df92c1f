# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carrying out a plan: for each kind of operation, how it differs and how it is made so.

``carry_out`` changes only what differs and registers how to undo what it
created, so a call that fails leaves behind what it found.  ``differences``
changes nothing.
"""

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from libvirt_natns import names
from libvirt_natns.addresses import Address, Interface, by_family
from libvirt_natns.daemons import dnsmasq, ndppd, udhcpc
from libvirt_natns.engine import guest_leases
from libvirt_natns.engine import plan as p
from libvirt_natns.errors import (
    AddressTakenError,
    ConflictError,
    FirewallError,
    KernelError,
    NatnsError,
)
from libvirt_natns.firewall import backends
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.defer import Later, at_once
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.records import dataclass, field

LOADS = 3
"""How often rules are loaded again that somebody else has changed meanwhile."""

NOTHING = "nothing"
"""Stands in a fingerprint for a kernel that holds no rules."""

Step = Callable[[p.Operation | str], None]
"""Is told what is about to be changed: an operation, or in words what is none."""


class Undo(ExitStack):
    """What takes back a call's work, run in reverse unless ``pop_all`` keeps the work.

    A step that cannot be taken back must not hide why it has to be.
    """

    def add(self, step: Callable[..., object], *arguments: object) -> None:
        """Take one thing back with ``step(*arguments)``."""
        self.callback(_quietly, step, *arguments)


def _quietly(step: Callable[..., object], *arguments: object) -> None:
    with suppress(NatnsError, OSError):
        step(*arguments)


@dataclass(slots=True)
class Call:
    """One call of ``carry_out``; ``fresh`` are the namespaces that it has made.

    ``later`` takes what need not be waited for, ``starting`` tells that no guest
    can be waiting yet; ``done`` was carried out a moment ago.  ``added`` are the
    addresses that this call has set, each with its namespace.
    """

    kernel: Kernel
    undo: Undo
    later: Later = at_once
    starting: bool = False
    done: Collection[p.Operation] = ()
    fresh: set[str] = field(default_factory=set)
    added: set[tuple[str | None, Address]] = field(default_factory=set)

    def is_fresh(self, operation: p.Operation) -> bool:
        """Whether it cannot hold yet, as it is about a namespace in which nothing is."""
        return getattr(operation, "namespace", None) in self.fresh

    def has_added(self, operation: p.Announcement) -> bool:
        """True if this call set the address: a moment ago a neighbour might have had it."""
        added = (operation.namespace, operation.address) in self.added
        return added or self.is_fresh(operation)


def differences(kernel: Kernel, plan: Iterable[p.Operation]) -> list[str]:
    """What of a plan does not hold, in words, in the plan's order.

    Inside a namespace that is missing nothing more is looked at.
    """
    with kernel.work(), kernel.looking():
        return _differences(kernel, plan)


def _differences(kernel: Kernel, plan: Iterable[p.Operation]) -> list[str]:
    found: list[str] = []
    for operation in plan:
        try:
            different = differs(kernel, operation)
        except KernelError as error:
            # Most often the link that an earlier difference already named.
            different = [error.fact]
        found += different
        if different and isinstance(operation, p.Namespace):
            break
    return found


def carry_out(
    kernel: Kernel,
    plan: Iterable[p.Operation],
    undo: Undo,
    before: Step | None = None,
    *,
    later: Later = at_once,
    done: Collection[p.Operation] = (),
) -> list[str]:
    """Make a plan hold; returns what differed before.

    ``undo`` receives what takes back each thing that this call created.
    ``before``, for tests and for logs, is called ahead of each change.  ``done``
    was carried out a moment ago and is not looked at, but for dnsmasq, which may
    have given up meanwhile.
    """
    whole = any(isinstance(operation, p.Namespace) for operation in done)
    call = Call(kernel, undo, later, starting=whole, done=done)
    repaired: list[str] = []
    with kernel.work():
        for operation in plan:
            if operation in done and not isinstance(operation, p.Dnsmasq):
                continue
            different = _why(call, operation, repaired)
            if not different:
                continue
            if before is not None:
                before(operation)
            _HOW[type(operation)][1](call, operation)
            kernel.forget()
            # That a new namespace has nothing in it goes without saying.
            if not whole and not isinstance(operation, p.Announcement):
                repaired += different
            whole = whole or isinstance(operation, p.Namespace)
    return repaired


def _why(call: Call, operation: p.Operation, repaired: list[str]) -> list[str]:
    """Why an operation must be carried out, in words; nothing where it need not be."""
    if call.is_fresh(operation):
        return ["it is new"]
    if isinstance(operation, p.Announcement):
        return ["it is new"] if call.has_added(operation) else repaired
    with call.kernel.looking():
        return differs(call.kernel, operation)


def differs(kernel: Kernel, operation: p.Operation) -> list[str]:
    """Why one operation does not hold; nothing where it does."""
    return _HOW[type(operation)][0](kernel, operation)


# -- namespace ---------------------------------------------------------------


def namespace_owner(kernel: Kernel, operation: p.Namespace) -> str | None:
    """Whose a namespace is: a network's uuid, "" for a stranger's, None where it is missing.

    A start that was killed before it could tag its namespace left a note.
    """
    owner = kernel.namespace_owner(operation.name)
    return operation.owner if owner == "" and _note(operation.owner).exists() else owner


def _note(owner: str) -> Path:
    return names.network_directory(owner) / "namespace"


def _namespace_differs(kernel: Kernel, operation: p.Namespace) -> list[str]:
    owner = kernel.namespace_owner(operation.name)
    if owner == operation.owner:
        return []
    if owner is None:
        return [f"namespace {operation.name} is missing"]
    return [f"namespace {operation.name} belongs to {owner or 'somebody else'}"]


def _ensure_namespace(call: Call, operation: p.Namespace) -> None:
    kernel, undo = call.kernel, call.undo
    owner = namespace_owner(kernel, operation)
    if owner not in (None, operation.owner):
        raise ConflictError(
            f"namespace {operation.name} belongs to {owner or 'somebody else'}",
            f"delete it (ip netns delete {operation.name}) or rename the network",
        )
    # Untagged, or the empty file that a kill between its making and its mounting leaves.
    kernel.delete_namespace(operation.name)
    note = _note(operation.owner)
    undo.add(note.unlink, True)
    undo.add(kernel.delete_namespace, operation.name)
    make_directory(note.parent)
    note.touch()
    # What it says was true of another namespace.
    _fingerprint_file(operation.owner).unlink(missing_ok=True)
    kernel.create_namespace(operation.name, operation.owner)
    note.unlink()
    call.fresh.add(operation.name)
    call.starting = True


def _sysctl_differs(kernel: Kernel, operation: p.Sysctl) -> list[str]:
    found = kernel.sysctl(operation.namespace, operation.key)
    if found in (None, operation.value):
        return []
    return [f"sysctl {operation.key} is {found} in {operation.namespace or 'the host'}"]


def _ensure_sysctl(call: Call, operation: p.Sysctl) -> None:
    call.kernel.set_sysctl(operation.namespace, operation.key, operation.value)


def _settings_differ(kernel: Kernel, operation: p.Settings) -> list[str]:
    found = kernel.sysctls(operation.namespace, [key for key, _ in operation.values])
    return [
        f"sysctl {key} is {found[key]} in {operation.namespace}"
        for key, value in operation.values
        if found.get(key, value) != value
    ]


def _ensure_settings(call: Call, operation: p.Settings) -> None:
    # All of them: some are reset where another one changes.
    call.kernel.set_sysctls(operation.namespace, operation.values)


# -- links -------------------------------------------------------------------


def _patch_differs(kernel: Kernel, operation: p.Patch) -> list[str]:
    return kernel.patch_differences(
        operation.namespace,
        operation.link,
        operation.port,
        operation.mtu,
        operation.link_mtu,
        operation.outer,
    )


def _ensure_patch(call: Call, operation: p.Patch) -> None:
    kernel, undo = call.kernel, call.undo
    namespace, link, port = operation.namespace, operation.link, operation.port
    outer = operation.outer
    if not call.is_fresh(operation) and kernel.has_patch(namespace, link, port, outer):
        inner = operation.link_mtu or operation.mtu
        for where, name, mtu in ((namespace, link, inner), (outer, port, operation.mtu)):
            kernel.set_mtu(where, name, mtu)
        return
    undo.add(kernel.delete_link, port, outer)
    kernel.create_patch(
        namespace,
        link,
        operation.mac,
        port,
        operation.port_mac,
        operation.altname,
        operation.mtu,
        operation.link_mtu,
        outer,
    )


def _macvlan_differs(kernel: Kernel, operation: p.Macvlan) -> list[str]:
    return kernel.macvlan_differences(
        operation.namespace, operation.link, operation.parent, operation.mtu
    )


def _ensure_macvlan(call: Call, operation: p.Macvlan) -> None:
    kernel, undo = call.kernel, call.undo
    namespace, link, parent = operation.namespace, operation.link, operation.parent
    if not call.is_fresh(operation) and kernel.has_macvlan(namespace, link, parent):
        kernel.set_mtu(namespace, link, operation.mtu)
        return
    undo.add(kernel.delete_link, link, namespace)
    kernel.create_macvlan(namespace, link, operation.mac, parent, operation.mtu)


def _port_differs(kernel: Kernel, operation: p.Port) -> list[str]:
    return kernel.port_differences(
        operation.port, operation.bridge, hairpin=operation.hairpin, outer=operation.outer
    )


def _ensure_port(call: Call, operation: p.Port) -> None:
    call.kernel.attach(operation.port, operation.bridge, operation.outer)
    if operation.hairpin:
        call.kernel.set_hairpin(operation.port, operation.outer)


def _multicast_differs(kernel: Kernel, operation: p.AllMulticast) -> list[str]:
    if kernel.gets_all_multicast(operation.port, operation.outer):
        return []
    return [f"patch {operation.port} does not get all multicast"]


def _ensure_multicast(call: Call, operation: p.AllMulticast) -> None:
    call.kernel.set_all_multicast(operation.port, operation.outer)


def _link_differs(kernel: Kernel, operation: p.LinkUp) -> list[str]:
    return kernel.link_differences(operation.namespace, operation.link)


def _ensure_link(call: Call, operation: p.LinkUp) -> None:
    call.kernel.set_up(operation.namespace, operation.link)


def _transit_differs(kernel: Kernel, operation: p.TransitBridge) -> list[str]:
    return kernel.link_differences(None, operation.name)


def _ensure_transit(call: Call, operation: p.TransitBridge) -> None:
    kernel, undo = call.kernel, call.undo
    if kernel.link(None, operation.name) is None:
        undo.add(kernel.delete_link, operation.name)
        kernel.create_bridge(operation.name, operation.altname, operation.mac)
    kernel.set_up(None, operation.name)


# -- addresses and routes ----------------------------------------------------


def _withdrawal_differs(kernel: Kernel, operation: p.Withdrawal) -> list[str]:
    if operation.address in kernel.addresses(None, operation.bridge):
        return [f"bridge {operation.bridge} still has {operation.address} in the host"]
    return []


def _ensure_withdrawal(call: Call, operation: p.Withdrawal) -> None:
    kernel, undo = call.kernel, call.undo
    undo.add(kernel.add_address, None, operation.bridge, operation.address)
    kernel.remove_address(None, operation.bridge, operation.address)


def _addresses_differ(kernel: Kernel, operation: p.Addresses) -> list[str]:
    where = f"{operation.link} in {operation.namespace or 'the host'}"
    present = kernel.addresses(operation.namespace, operation.link)
    foreign = kernel.foreign_addresses(operation.namespace, operation.link, operation.addresses)
    lacking = set(operation.addresses) - present
    return [
        *(f"{where} lacks the address {address}" for address in _sorted(lacking)),
        *(f"{where} has the foreign address {address}" for address in _sorted(foreign)),
    ]


def _sorted(addresses: Iterable[Interface]) -> list[Interface]:
    return sorted(addresses, key=lambda each: (by_family(each.ip), each.network.prefixlen))


def _ensure_addresses(call: Call, operation: p.Addresses) -> None:
    if call.is_fresh(operation):
        for address in operation.addresses:
            call.kernel.add_address(operation.namespace, operation.link, address)
        return
    present = call.kernel.addresses(operation.namespace, operation.link)
    call.kernel.set_addresses(operation.namespace, operation.link, operation.addresses)
    lacking = set(operation.addresses) - present
    call.added.update((operation.namespace, address.ip) for address in lacking)


def _route_differs(kernel: Kernel, operation: p.Route) -> list[str]:
    if kernel.has_route(
        operation.namespace, operation.destination, operation.gateway, operation.link
    ):
        return []
    return [f"{operation.describe()} is missing or not the only one"]


def _ensure_route(call: Call, operation: p.Route) -> None:
    if operation.namespace is None:
        call.undo.add(call.kernel.remove_route, None, operation.destination, operation.link)
    call.kernel.set_route(
        operation.namespace,
        operation.destination,
        operation.gateway,
        operation.link,
        alone=call.is_fresh(operation),
    )


def _limit_differs(kernel: Kernel, operation: p.SendLimit) -> list[str]:
    found = kernel.unlimited_routes(
        operation.namespace, operation.destinations, operation.link, operation.mtu
    )
    wanted = f"of at most {operation.mtu} octets" if operation.mtu else "as large as the link's"
    return [f"packets to {each} in {operation.namespace} are not {wanted}" for each in found]


def _ensure_limit(call: Call, operation: p.SendLimit) -> None:
    namespace, link, mtu = operation.namespace, operation.link, operation.mtu
    if call.is_fresh(operation) and mtu is None:
        return
    for subnet in operation.subnets:
        call.kernel.limit_subnet(namespace, subnet, link, mtu)
    for route in operation.routes:
        call.kernel.limit_route(namespace, route.destination, route.gateway, link, mtu)


def _gateways_differ(kernel: Kernel, operation: p.Gateways) -> list[str]:
    found = kernel.gateways(operation.namespace, operation.link)
    where = f"on {operation.link} in {operation.namespace}"
    return [
        *(f"route {to} via {by} {where} is missing" for to, by in operation.routes
          if (to, by) not in found),
        *(f"route {to} via {by} {where} is foreign" for to, by in found
          if (to, by) not in operation.routes),
    ]  # fmt: skip


def _ensure_gateways(call: Call, operation: p.Gateways) -> None:
    call.kernel.set_gateways(operation.namespace, operation.link, operation.routes)


def _leasing_differs(kernel: Kernel, operation: p.Leasing) -> list[str]:
    return udhcpc.differences(operation.client)


def _ensure_leasing(call: Call, operation: p.Leasing) -> None:
    client = operation.client
    if udhcpc.running(client) is None:
        call.undo.add(end_client, call.kernel, client.directory, client.namespace, client.link)
    udhcpc.ensure(client, operation.request)


def end_client(kernel: Kernel, directory: Path, namespace: str | None, link: str) -> None:
    """End a DHCP client, if there is one; the server hears that its lease is free.

    It is told from the leased address, which need not be in force: a start may
    have been refused for it.  Raises DhcpError.
    """
    held = udhcpc.lease(directory)
    if held is not None and namespace is not None:
        with suppress(KernelError):
            kernel.add_address(namespace, link, held.address)
    udhcpc.stop(directory, namespace)


def _proxied_differ(kernel: Kernel, operation: p.ProxiedNeighbours) -> list[str]:
    if kernel.proxied(operation.namespace, operation.link) == set(operation.addresses):
        return []
    return [f"{operation.describe()}: not so, or more than that"]


def _ensure_proxied(call: Call, operation: p.ProxiedNeighbours) -> None:
    if call.is_fresh(operation) and not operation.addresses:
        return
    call.kernel.set_proxied(operation.namespace, operation.link, operation.addresses)


def _indexes(kernel: Kernel, daemon: ndppd.Proxy) -> tuple[int, int]:
    """Which links of those names there are now; 0 is none."""
    outer, inner = (kernel.link(daemon.namespace, name) for name in (daemon.link, daemon.inner))
    return outer.index if outer else 0, inner.index if inner else 0


def _proxy_differs(kernel: Kernel, operation: p.NeighbourProxy) -> list[str]:
    return ndppd.differences(operation.daemon, _indexes(kernel, operation.daemon))


def _ensure_proxy(call: Call, operation: p.NeighbourProxy) -> None:
    daemon = operation.daemon
    if ndppd.running(daemon.uuid, daemon.namespace) is None:
        call.undo.add(ndppd.stop, daemon.uuid)
    ndppd.ensure(daemon, _indexes(call.kernel, daemon))


def _announce(call: Call, operation: p.Announcement) -> None:
    # A caller without a background has probed in full before.  An address that was in
    # force is not given up because a neighbour answers for it (RFC 5227, 2.4).
    waits = call.later is at_once or not call.has_added(operation)
    probing = 0.0 if waits else operation.probing

    def announce() -> None:
        with netns.entered(operation.namespace):
            told = address_probe.announce(operation.link, operation.address, operation.mac, probing)
        if not told:
            raise AddressTakenError(operation.namespace, str(operation.address))

    # It waits for the kernel to see the link's carrier, which takes up to 20 ms.
    call.later(announce)


# -- firewall and dnsmasq ----------------------------------------------------


def _fingerprint_file(owner: str) -> Path:
    return names.network_directory(owner) / "firewall"


def _fingerprint(operation: p.Firewall) -> str:
    """The backend, what was wanted of it, and what the kernel shows of it.

    Only the kernel's own listing, taken right after loading, tells later
    whether somebody altered the rules: no two versions of nft word it alike.
    """
    backend = backends.named(operation.backend)
    listing = backend.listing(operation.namespace)
    # A table that is missing was wanted, whoever took it away since it was loaded.
    whole = listing and not backends.missing_tables(backend.render(operation.rules), listing)
    shown = backends.fingerprint(listing) if whole else NOTHING
    return f"{_wanted(operation)} {shown}"


def _wanted(operation: p.Firewall) -> str:
    rules = backends.named(operation.backend).render(operation.rules)
    return f"{operation.backend} {backends.fingerprint(rules)}"


def _dated_fingerprint(operation: p.Firewall) -> str:
    """The same, with the generation of the kernel's rules that it was taken of, if sure."""
    backend = backends.named(operation.backend)
    before = backend.generation(operation.namespace)
    fingerprint = _fingerprint(operation)
    sure = before and before == backend.generation(operation.namespace)
    return f"{fingerprint} {before}" if sure else fingerprint


def _recorded_fingerprint(owner: str) -> str:
    try:
        return _fingerprint_file(owner).read_text()
    except FileNotFoundError:
        return ""


def _firewall_differs(kernel: Kernel, operation: p.Firewall) -> list[str]:
    if _is_loaded(operation):
        return []
    return [f"firewall of {operation.namespace} is missing or was altered"]


def _is_loaded(operation: p.Firewall) -> bool:
    """Whether the rules in force are those that are wanted, and nobody has altered them."""
    *fingerprint, recorded = [*_recorded_fingerprint(operation.owner).split(), ""][:4]
    if " ".join(fingerprint[:2]) != _wanted(operation):
        return False
    # Listing the rules takes as long as all else that is looked at.
    generation = backends.named(operation.backend).generation(operation.namespace)
    unchanged = recorded != "" and recorded == generation
    if NOTHING in fingerprint:
        return False
    return unchanged or " ".join(fingerprint) == _fingerprint(operation)


def _ensure_firewall(call: Call, operation: p.Firewall) -> None:
    earlier = _recorded_fingerprint(operation.owner).partition(" ")[0]
    file = _fingerprint_file(operation.owner)
    make_directory(file.parent)
    # Differs from any fingerprint, and keeps in mind whose rules there are.
    file.write_text(earlier or operation.backend)
    _load(operation)
    if earlier not in ("", operation.backend):
        # The configured backend has changed; its rules go once the new ones stand.
        backends.named(earlier).clear(operation.namespace)
    file.write_text(_dated_fingerprint(operation))


def _load(operation: p.Firewall) -> None:
    """Load rules that nobody else has a hand in: what is recorded next counts as ours."""
    backend = backends.named(operation.backend)
    for _ in range(LOADS):
        before = backend.generation(operation.namespace)
        backend.apply(operation.namespace, operation.rules)
        after = backend.generation(operation.namespace)
        # One load is one change.
        if not before or (int(after or 0) - int(before)) % 2**32 == 1:
            return
    raise FirewallError(
        f"somebody changes the rules of {operation.namespace} while they are loaded",
        "find out who (nft monitor)",
    )


def _dnsmasq_differs(kernel: Kernel, operation: p.Dnsmasq) -> list[str]:
    daemon = operation.daemon
    found = dnsmasq.differences(daemon)
    return found or [
        f"{address} is reserved, but leased to {mac}, which is no guest's"
        for mac, address in guest_leases.squatted(daemon)
    ]


def _ensure_dnsmasq(call: Call, operation: p.Dnsmasq) -> None:
    daemon = operation.daemon
    if dnsmasq.running(daemon.uuid, daemon.namespace) is None:
        call.undo.add(dnsmasq.stop, daemon.uuid)
    if squatted := guest_leases.squatted(daemon):
        # It would write all of its leases down again.
        dnsmasq.stop(daemon.uuid)
        for mac, address in squatted:
            guest_leases.forget(daemon.bridge, mac, address)
    # Guests wait for one that has gone, and a user for why one has given up.
    waited_for = not call.starting or operation in call.done
    dnsmasq.ensure(daemon, at_once if waited_for else call.later)


def _idle_differs(kernel: Kernel, operation: p.IdleDnsmasq) -> list[str]:
    return dnsmasq.idle_differences(operation.network)


def _ensure_idle(call: Call, operation: p.IdleDnsmasq) -> None:
    dnsmasq.idle_libvirts(operation.network)


def _holds(kernel: Kernel, operation: p.Operation) -> list[str]:
    return []


_HOW: dict[type[Any], tuple[Callable[..., list[str]], Callable[..., None]]] = {
    p.Namespace: (_namespace_differs, _ensure_namespace),
    p.Sysctl: (_sysctl_differs, _ensure_sysctl),
    p.Settings: (_settings_differ, _ensure_settings),
    p.Patch: (_patch_differs, _ensure_patch),
    p.Macvlan: (_macvlan_differs, _ensure_macvlan),
    p.Port: (_port_differs, _ensure_port),
    p.AllMulticast: (_multicast_differs, _ensure_multicast),
    p.Firewall: (_firewall_differs, _ensure_firewall),
    p.Withdrawal: (_withdrawal_differs, _ensure_withdrawal),
    p.Addresses: (_addresses_differ, _ensure_addresses),
    p.LinkUp: (_link_differs, _ensure_link),
    p.Route: (_route_differs, _ensure_route),
    p.SendLimit: (_limit_differs, _ensure_limit),
    p.Gateways: (_gateways_differ, _ensure_gateways),
    p.Leasing: (_leasing_differs, _ensure_leasing),
    p.ProxiedNeighbours: (_proxied_differ, _ensure_proxied),
    p.NeighbourProxy: (_proxy_differs, _ensure_proxy),
    p.Announcement: (_holds, _announce),
    p.Dnsmasq: (_dnsmasq_differs, _ensure_dnsmasq),
    p.IdleDnsmasq: (_idle_differs, _ensure_idle),
    p.TransitBridge: (_transit_differs, _ensure_transit),
}
