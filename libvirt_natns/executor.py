# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carrying out a plan: for each kind of operation, how it differs and how it is made so.

``carry_out`` changes only what differs and registers how to undo what it
created, so a call that fails leaves behind what it found.  ``differences``
changes nothing.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from libvirt_natns import arp, dnsmasq, firewall, names, netns
from libvirt_natns import plan as p
from libvirt_natns.errors import ConflictError, KernelError, NatnsError
from libvirt_natns.kernel import Kernel

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


def differences(kernel: Kernel, plan: Iterable[p.Operation]) -> list[str]:
    """What of a plan does not hold, in words, in the plan's order.

    Inside a namespace that is missing nothing more is looked at.
    """
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
    kernel: Kernel, plan: Iterable[p.Operation], undo: Undo, before: Step | None = None
) -> list[str]:
    """Make a plan hold; returns what differed before.

    ``undo`` receives what takes back each thing that this call created.
    ``before``, for tests and for logs, is called ahead of each change.
    """
    repaired: list[str] = []
    whole = False
    for operation in plan:
        transient = isinstance(operation, p.Announcement)
        different = differs(kernel, operation)
        if not different and not (transient and repaired):
            continue
        if before is not None:
            before(operation)
        _HOW[type(operation)][1](kernel, operation, undo)
        # That a new namespace has nothing in it goes without saying.
        repaired += different if not whole else []
        whole = whole or isinstance(operation, p.Namespace)
    return repaired


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


def _ensure_namespace(kernel: Kernel, operation: p.Namespace, undo: Undo) -> None:
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
    note.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    note.touch()
    kernel.create_namespace(operation.name, operation.owner)
    note.unlink()


def _sysctl_differs(kernel: Kernel, operation: p.Sysctl) -> list[str]:
    found = kernel.sysctl(operation.namespace, operation.key)
    if found in (None, operation.value):
        return []
    return [f"sysctl {operation.key} is {found} in {operation.namespace or 'the host'}"]


def _ensure_sysctl(kernel: Kernel, operation: p.Sysctl, undo: Undo) -> None:
    kernel.set_sysctl(operation.namespace, operation.key, operation.value)


# -- links -------------------------------------------------------------------


def _patch_differs(kernel: Kernel, operation: p.Patch) -> list[str]:
    found = kernel.patch_differences(
        operation.namespace, operation.link, operation.port, operation.bridge, operation.mtu
    )
    if not found and operation.hairpin and not kernel.has_hairpin(operation.port):
        found.append(f"patch {operation.port} is not in hairpin mode")
    return found


def _ensure_patch(kernel: Kernel, operation: p.Patch, undo: Undo) -> None:
    namespace, link, port = operation.namespace, operation.link, operation.port
    if not kernel.has_patch(namespace, link, port):
        undo.add(kernel.delete_link, port)
        kernel.create_patch(
            namespace,
            link,
            operation.mac,
            port,
            operation.port_mac,
            operation.altname,
            operation.mtu,
        )
    kernel.attach(namespace, link, port, operation.bridge, operation.mtu)
    if operation.hairpin:
        kernel.set_hairpin(port)


def _link_differs(kernel: Kernel, operation: p.LinkUp) -> list[str]:
    return kernel.link_differences(operation.namespace, operation.link)


def _ensure_link(kernel: Kernel, operation: p.LinkUp, undo: Undo) -> None:
    kernel.set_up(operation.namespace, operation.link)


def _transit_differs(kernel: Kernel, operation: p.TransitBridge) -> list[str]:
    return kernel.link_differences(None, operation.name)


def _ensure_transit(kernel: Kernel, operation: p.TransitBridge, undo: Undo) -> None:
    if kernel.link(None, operation.name) is None:
        undo.add(kernel.delete_link, operation.name)
        kernel.create_bridge(operation.name, operation.altname, operation.mac)
    kernel.set_up(None, operation.name)


# -- addresses and routes ----------------------------------------------------


def _withdrawal_differs(kernel: Kernel, operation: p.Withdrawal) -> list[str]:
    if operation.address in kernel.addresses(None, operation.bridge):
        return [f"bridge {operation.bridge} still has {operation.address} in the host"]
    return []


def _ensure_withdrawal(kernel: Kernel, operation: p.Withdrawal, undo: Undo) -> None:
    undo.add(kernel.add_address, None, operation.bridge, operation.address)
    kernel.remove_address(None, operation.bridge, operation.address)


def _addresses_differ(kernel: Kernel, operation: p.Addresses) -> list[str]:
    where = f"{operation.link} in {operation.namespace or 'the host'}"
    present = kernel.addresses(operation.namespace, operation.link)
    wanted = set(operation.addresses)
    return [
        *(f"{where} lacks the address {address}" for address in sorted(wanted - present)),
        *(f"{where} has the foreign address {address}" for address in sorted(present - wanted)),
    ]


def _ensure_addresses(kernel: Kernel, operation: p.Addresses, undo: Undo) -> None:
    kernel.set_addresses(operation.namespace, operation.link, operation.addresses)


def _route_differs(kernel: Kernel, operation: p.Route) -> list[str]:
    if kernel.has_route(
        operation.namespace, operation.destination, operation.gateway, operation.link
    ):
        return []
    return [f"{operation.describe()} is missing or not the only one"]


def _ensure_route(kernel: Kernel, operation: p.Route, undo: Undo) -> None:
    kernel.set_route(operation.namespace, operation.destination, operation.gateway, operation.link)


def _announce(kernel: Kernel, operation: p.Announcement, undo: Undo) -> None:
    with netns.entered(operation.namespace):
        arp.announce(operation.link, operation.address, operation.mac)


# -- firewall and dnsmasq ----------------------------------------------------


def _fingerprint_file(owner: str) -> Path:
    return names.network_directory(owner) / "firewall"


def _fingerprint(operation: p.Firewall) -> str:
    """The backend, what was wanted of it, and what the kernel shows of it.

    Only the kernel's own listing, taken right after loading, tells later
    whether somebody altered the rules: no two versions of nft word it alike.
    """
    backend = firewall.named(operation.backend)
    wanted = firewall.fingerprint(backend.render(operation.rules))
    shown = firewall.fingerprint(backend.listing(operation.namespace))
    return f"{operation.backend} {wanted} {shown}"


def _recorded_fingerprint(owner: str) -> str:
    try:
        return _fingerprint_file(owner).read_text()
    except FileNotFoundError:
        return ""


def _firewall_differs(kernel: Kernel, operation: p.Firewall) -> list[str]:
    recorded = _recorded_fingerprint(operation.owner)
    if recorded and recorded == _fingerprint(operation):
        return []
    return [f"firewall of {operation.namespace} is missing or was altered"]


def _ensure_firewall(kernel: Kernel, operation: p.Firewall, undo: Undo) -> None:
    earlier = _recorded_fingerprint(operation.owner).partition(" ")[0]
    file = _fingerprint_file(operation.owner)
    file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    # Differs from any fingerprint, and keeps in mind whose rules there are.
    file.write_text(earlier or operation.backend)
    firewall.named(operation.backend).apply(operation.namespace, operation.rules)
    if earlier not in ("", operation.backend):
        # The configured backend has changed; its rules go once the new ones stand.
        firewall.named(earlier).clear(operation.namespace)
    file.write_text(_fingerprint(operation))


def _dnsmasq_differs(kernel: Kernel, operation: p.Dnsmasq) -> list[str]:
    return dnsmasq.differences(operation.daemon)


def _ensure_dnsmasq(kernel: Kernel, operation: p.Dnsmasq, undo: Undo) -> None:
    if dnsmasq.running(operation.daemon.uuid, operation.daemon.namespace) is None:
        undo.add(dnsmasq.stop, operation.daemon.uuid)
    dnsmasq.ensure(operation.daemon)


def _idle_differs(kernel: Kernel, operation: p.IdleDnsmasq) -> list[str]:
    return dnsmasq.idle_differences(operation.network)


def _ensure_idle(kernel: Kernel, operation: p.IdleDnsmasq, undo: Undo) -> None:
    dnsmasq.idle_libvirts(operation.network)


def _holds(kernel: Kernel, operation: p.Operation) -> list[str]:
    return []


_HOW: dict[type[Any], tuple[Callable[..., list[str]], Callable[..., None]]] = {
    p.Namespace: (_namespace_differs, _ensure_namespace),
    p.Sysctl: (_sysctl_differs, _ensure_sysctl),
    p.Patch: (_patch_differs, _ensure_patch),
    p.Firewall: (_firewall_differs, _ensure_firewall),
    p.Withdrawal: (_withdrawal_differs, _ensure_withdrawal),
    p.Addresses: (_addresses_differ, _ensure_addresses),
    p.LinkUp: (_link_differs, _ensure_link),
    p.Route: (_route_differs, _ensure_route),
    p.Announcement: (_holds, _announce),
    p.Dnsmasq: (_dnsmasq_differs, _ensure_dnsmasq),
    p.IdleDnsmasq: (_idle_differs, _ensure_idle),
    p.TransitBridge: (_transit_differs, _ensure_transit),
}
