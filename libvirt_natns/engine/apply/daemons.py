# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing, starting and ending daemons: the DHCP client, ndppd, and both dnsmasq.

For each kind, ``..._differs`` returns the differences in words.  ``ensure_...`` makes the
operation so, and tells the context how to undo that.
"""

from contextlib import suppress
from pathlib import Path

from libvirt_natns.daemons import dhcp_lease, dnsmasq, libvirt_dnsmasq, ndppd, udhcpc
from libvirt_natns.engine import guest_leases
from libvirt_natns.engine.apply.context import ApplyContext
from libvirt_natns.engine.operations.daemons import Dnsmasq, IdleDnsmasq, Leasing, NeighbourProxy
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.session import Kernel


def leasing_differs(kernel: Kernel, operation: Leasing) -> list[str]:
    return udhcpc.differences(operation.client)


def ensure_leasing(context: ApplyContext, operation: Leasing) -> None:
    client = operation.client
    if udhcpc.running(client) is None:
        context.undo.add(
            end_client, context.kernel, client.directory, client.namespace, client.link
        )
    udhcpc.ensure(client, operation.request)


def end_client(kernel: Kernel, directory: Path, namespace: str | None, link: str) -> None:
    """End a DHCP client, if there is one, and release its lease at the server.

    The release is sent from the leased address.  A start that was refused for the
    address has not set it, so the address is added first.  Raises DhcpError.
    """
    held = dhcp_lease.read(directory)
    if held is not None and namespace is not None:
        with suppress(KernelError):
            kernel.at(namespace).addresses.add(link, held.address)
    udhcpc.stop(directory, namespace)


def _indexes(kernel: Kernel, daemon: ndppd.Proxy) -> tuple[int, int]:
    """Return the indexes of the links that have the proxy's link names now; 0 for none."""
    outer, inner = (
        kernel.at(daemon.namespace).links.get(name) for name in (daemon.link, daemon.inner)
    )
    return outer.index if outer else 0, inner.index if inner else 0


def proxy_differs(kernel: Kernel, operation: NeighbourProxy) -> list[str]:
    return ndppd.differences(operation.daemon, _indexes(kernel, operation.daemon))


def ensure_proxy(context: ApplyContext, operation: NeighbourProxy) -> None:
    daemon = operation.daemon
    if ndppd.running(daemon.uuid, daemon.namespace) is None:
        context.undo.add(ndppd.stop, daemon.uuid)
    ndppd.ensure(daemon, _indexes(context.kernel, daemon))


def dnsmasq_differs(kernel: Kernel, operation: Dnsmasq) -> list[str]:
    daemon = operation.daemon
    lines = dnsmasq.differences(daemon)
    return lines or [
        f"{address} is reserved, but leased to {mac}, which is no guest's"
        for mac, address in guest_leases.squatted(daemon)
    ]


def ensure_dnsmasq(context: ApplyContext, operation: Dnsmasq) -> None:
    daemon = operation.daemon
    if dnsmasq.running(daemon.uuid, daemon.namespace) is None:
        context.undo.add(dnsmasq.stop, daemon.uuid)
    if squatted := guest_leases.squatted(daemon):
        # A running dnsmasq would write all of its leases down again.
        dnsmasq.stop(daemon.uuid)
        for mac, address in squatted:
            guest_leases.forget(daemon.bridge, mac, address)
    # Guests wait for a dnsmasq that has ended, and a user for the reason of a failure.
    waited_for = not context.starting or operation in context.done
    dnsmasq.ensure(daemon, at_once if waited_for else context.later)


def idle_differs(kernel: Kernel, operation: IdleDnsmasq) -> list[str]:
    return libvirt_dnsmasq.idle_differences(operation.network)


def ensure_idle(context: ApplyContext, operation: IdleDnsmasq) -> None:
    libvirt_dnsmasq.idle(operation.network)
