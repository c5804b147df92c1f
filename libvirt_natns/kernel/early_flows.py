# SPDX-License-Identifier: LGPL-2.1-or-later
"""Deletes the conntrack entries of flows that began before a rule translated them.

NAT looks at the first packet of a flow alone.  A client that sends datagrams before its
port is published has an entry without a translation, and each datagram prolongs the entry.
So the client would not reach the guest for as long as it keeps sending.

Connections of TCP and SCTP that are established are left alone: a program that listens no
more may still serve them.  An attempt of TCP that was refused makes no lasting entry.
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass

from libvirt_natns.addresses import Address, Family, IPNetwork
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import conntrack, netlink, netns, rtnetlink
from libvirt_natns.kernel.conntrack import TUPLE_ORIG, ConntrackEntry, DumpFilter
from libvirt_natns.kernel.netlink import InterruptedDumpError

CONNECTED = frozenset({socket.IPPROTO_TCP, socket.IPPROTO_SCTP})
"""Protocols of which an established flow is left alone."""

LISTINGS = 100
"""Listings of addresses that another program changes at the same time."""


@dataclass(frozen=True, slots=True)
class Translation:
    """A rule that changes the destination of flows.

    ``address`` is their destination, None for each address of the namespace.  ``own``: the
    rule counts only while the address is the namespace's.  ``excluded`` are addresses that
    the rule leaves alone.  ``protocol`` and the port ``last`` are 0 for all.  ``sources`` are
    the clients, empty for all.
    """

    family: Family
    address: Address | None
    protocol: int = 0
    first: int = 0
    last: int = 0
    sources: tuple[IPNetwork, ...] = ()
    excluded: tuple[IPNetwork, ...] = ()
    own: bool = False

    @property
    def dump_filter(self) -> DumpFilter:
        """The filter that finds all flows of the translation, and few others."""
        port = self.first if self.first == self.last else 0
        return DumpFilter(self.family, TUPLE_ORIG, 1, self.address, self.protocol, port)

    def missed(self, entry: ConntrackEntry, local: Collection[Address]) -> bool:
        """True if a flow would be translated today, but was not when it began.

        ``local`` are all addresses of the namespace.
        """
        if entry.zone or not entry.keeps_destination or entry.asked.version != self.family:
            return False
        if entry.assured and entry.protocol in CONNECTED:
            return False
        if self.protocol and entry.protocol != self.protocol:
            return False
        if self.last and not self.first <= entry.port <= self.last:
            return False
        if self.sources and not any(entry.client in source for source in self.sources):
            return False
        if self.address is not None and entry.asked != self.address:
            return False
        if self.address is not None and not self.own:
            return True
        if any(entry.asked in network for network in self.excluded):
            return False
        # Flows to another machine's address pass the host: they are not ours to end.
        return entry.asked.is_loopback or entry.asked in local


def cut(namespace: str | None, translations: Iterable[Translation]) -> None:
    """Delete the entries that these translations have missed; None is the host.

    Raises KernelError.
    """
    wanted = tuple(translations)
    if not wanted:
        return
    try:
        with netns.entered(namespace):
            flows, reader = netlink.Socket(netlink.NETLINK_NETFILTER), rtnetlink.Session()
        with flows, reader:
            filters = dict.fromkeys(each.dump_filter for each in wanted)
            entries = [e for e in conntrack.entries_of(flows, filters) if e.keeps_destination]
            local = _local(reader, wanted) if entries else frozenset()
            conntrack.delete(
                flows, [e for e in entries if any(each.missed(e, local) for each in wanted)]
            )
    except OSError as error:
        where = namespace or "the host"
        raise KernelError(
            f"cannot delete conntrack entries in {where}", error.strerror or str(error)
        ) from error


def _local(reader: rtnetlink.Session, wanted: Iterable[Translation]) -> frozenset[Address]:
    """Return all addresses of the namespace, where a translation asks for them."""
    if all(each.address is not None and not each.own for each in wanted):
        return frozenset()
    for _ in range(LISTINGS):
        with suppress(InterruptedDumpError):
            return frozenset(address.interface.ip for address in reader.addresses())
    raise InterruptedDumpError(errno.EINTR, os.strerror(errno.EINTR))
