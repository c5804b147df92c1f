# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on daemons: the DHCP client, ndppd, the DNS relay, and both dnsmasq."""

from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from libvirt_natns.addresses import Address
from libvirt_natns.daemons import (
    dhcp_lease,
    dns_relay,
    dnsmasq,
    guest_leases,
    libvirt_dnsmasq,
    ndppd,
    udhcpc,
)
from libvirt_natns.daemons.dns_relay import Relay
from libvirt_natns.daemons.dnsmasq import Daemon
from libvirt_natns.daemons.ndppd import Proxy
from libvirt_natns.daemons.udhcpc import Client
from libvirt_natns.errors import DnsmasqError, KernelError
from libvirt_natns.kernel.defer import at_once
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.operation import ApplyContext, Operation


@dataclass(frozen=True, slots=True)
class Leasing(Operation):
    """A DHCP client; at its start it asks for the address ``request`` first."""

    client: Client
    request: IPv4Address | None = None

    def describe(self) -> str:
        return f"DHCP client on {self.client.link} in {self.client.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        return udhcpc.differences(self.client)

    def ensure(self, context: ApplyContext) -> None:
        client = self.client
        if udhcpc.running(client) is None:
            context.undo.add(self.take_back, context.kernel)
        udhcpc.ensure(client, self.request)

    def take_back(self, kernel: Kernel) -> None:
        client = self.client
        end_client(kernel, client.directory, client.namespace, client.link)


@dataclass(frozen=True, slots=True)
class NeighbourProxy(Operation):
    """The ndppd that answers on a link for guests behind another link, or its absence."""

    daemon: Proxy

    def describe(self) -> str:
        return self.daemon.describe()

    def differs(self, kernel: Kernel) -> list[str]:
        return ndppd.differences(self.daemon, _indexes(kernel, self.daemon))

    def ensure(self, context: ApplyContext) -> None:
        daemon = self.daemon
        if ndppd.running(daemon.uuid, daemon.namespace) is None:
            context.undo.add(self.take_back, context.kernel)
        ndppd.ensure(daemon, _indexes(context.kernel, daemon))

    def take_back(self, kernel: Kernel) -> None:
        ndppd.stop(self.daemon.uuid)


@dataclass(frozen=True, slots=True)
class Dnsmasq(Operation):
    """The dnsmasq of a namespace, or its absence."""

    always_recheck = True

    daemon: Daemon

    def describe(self) -> str:
        none = "" if self.daemon.files else "no "
        return f"{none}dnsmasq in {self.daemon.namespace} on {self.daemon.bridge}"

    def differs(self, kernel: Kernel) -> list[str]:
        daemon = self.daemon
        lines = dnsmasq.differences(daemon)
        return lines or [
            f"{address} is reserved, but leased to {mac}, which no guest has"
            for mac, address in guest_leases.squatted(daemon)
        ]

    def ensure(self, context: ApplyContext) -> None:
        daemon = self.daemon
        if dnsmasq.running(daemon.uuid, daemon.namespace) is None:
            context.undo.add(self.take_back, context.kernel)
        try:
            self._end_strangers_leases()
        finally:
            # All guests need DHCP and DNS, also where a stranger keeps its lease.
            # They wait for a dnsmasq that has ended, and a user for the reason of a failure.
            waited_for = not context.starting or self in context.done
            dnsmasq.ensure(daemon, at_once if waited_for else context.later)

    def _end_strangers_leases(self) -> None:
        """End the leases of strangers that are reserved for guests; dnsmasq does not run then.

        All of them are tried before the first error is raised.  Raises DnsmasqError.
        """
        errors = []
        for number, (mac, address) in enumerate(guest_leases.squatted(self.daemon)):
            if number == 0:
                # A running dnsmasq would write all of its leases down again.
                dnsmasq.stop(self.daemon.uuid)
            try:
                guest_leases.forget(self.daemon.bridge, mac, address)
            except DnsmasqError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def take_back(self, kernel: Kernel) -> None:
        dnsmasq.stop(self.daemon.uuid)


@dataclass(frozen=True, slots=True)
class DnsRelay(Operation):
    """The dnsmasq in the host that asks the host's resolvers for the networks on a bridge."""

    always_recheck = True

    relay: Relay

    def describe(self) -> str:
        relay = self.relay
        addresses = ", ".join(map(str, relay.addresses))
        return f"DNS relay on {relay.bridge} at {addresses}, port {relay.port}"

    def differs(self, kernel: Kernel) -> list[str]:
        return dns_relay.differences(self.relay)

    def ensure(self, context: ApplyContext) -> None:
        dns_relay.ensure(self.relay, context.later)


@dataclass(frozen=True, slots=True)
class IdleDnsmasq(Operation):
    """libvirt's own dnsmasq of a network, without the helper that writes leases."""

    network: str

    def describe(self) -> str:
        return f"libvirt's own dnsmasq of network {self.network} writes no leases"

    def differs(self, kernel: Kernel) -> list[str]:
        return libvirt_dnsmasq.idle_differences(self.network)

    def ensure(self, context: ApplyContext) -> None:
        libvirt_dnsmasq.idle(self.network)


@dataclass(frozen=True, slots=True)
class BoundDnsmasq(Operation):
    """libvirt's own dnsmasq of a network, which opens no more sockets.

    It has closed those at ``addresses``, which the host has no more.
    """

    network: str
    addresses: tuple[Address, ...]

    def describe(self) -> str:
        return f"libvirt's own dnsmasq of network {self.network} opens no more sockets"

    def differs(self, kernel: Kernel) -> list[str]:
        return libvirt_dnsmasq.bound_differences(self.network)

    def ensure(self, context: ApplyContext) -> None:
        context.undo.add(self.take_back, context.kernel)
        with suppress(DnsmasqError):
            # Only a twin would miss this; the network itself works.
            libvirt_dnsmasq.bind(self.network, self.addresses)

    def take_back(self, kernel: Kernel) -> None:
        libvirt_dnsmasq.unbind(self.network)


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


def _indexes(kernel: Kernel, daemon: Proxy) -> tuple[int, int]:
    """Return the indexes of the links that have the proxy's link names now; 0 for none."""
    outer, inner = (
        kernel.at(daemon.namespace).links.get(name) for name in (daemon.link, daemon.inner)
    )
    return outer.index if outer else 0, inner.index if inner else 0
