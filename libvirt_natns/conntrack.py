# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ending the flows of what is published no more.

A translation outlives the rule that began it for as long as its conntrack entry
does: a guest that has stopped would still be answered for, or its successor at
the same address get its traffic.
"""

import socket
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from typing import Any

from libvirt_natns import netns
from libvirt_natns.errors import KernelError
from libvirt_natns.model import Forward, StaticNat
from libvirt_natns.netlink import NetlinkError
from libvirt_natns.records import replace

PROTOCOLS = {
    "tcp": socket.IPPROTO_TCP,
    "udp": socket.IPPROTO_UDP,
    "sctp": socket.IPPROTO_SCTP,
}


def cut(namespace: str, gone: Iterable[Forward | StaticNat], address: IPv4Address) -> None:
    """Delete the conntrack entries of these forwards and addresses, and no others.

    ``address`` is the network's upstream address: where a forward that listens on
    the host's own arrives in the namespace.  Raises KernelError.
    """
    _cut(namespace, tuple(gone), address)


def cut_on_host(gone: Iterable[Forward | StaticNat], address: IPv4Address) -> None:
    """The same in the host, which leads them to a network's upstream address."""
    moved = [replace(claim, target=address) for claim in gone if isinstance(claim, Forward)]
    _cut(None, moved, None)


def _cut(
    namespace: str | None, claims: Sequence[Forward | StaticNat], address: IPv4Address | None
) -> None:
    if not claims:
        return
    # Few hooks have a flow to end, and libvirt waits for each.
    from pyroute2.conntrack import Conntrack

    with netns.entered(namespace):
        tracker = Conntrack()
    try:
        for entry in list(tracker.dump_entries()):
            if any(_concerns(claim, entry, address) for claim in claims):
                _delete(tracker, entry)
    except NetlinkError as error:
        where = namespace or "the host"
        raise KernelError(f"cannot cut flows in {where}", str(error)) from error
    finally:
        tracker.close()


def _delete(tracker: Any, entry: Any) -> None:  # noqa: ANN401
    try:
        tracker.entry("del", tuple_orig=entry.tuple_orig)
    except NetlinkError as error:
        if error.code != 2:  # it has ended by itself
            raise


def _concerns(
    claim: Forward | StaticNat,
    entry: Any,  # noqa: ANN401
    address: IPv4Address | None,
) -> bool:
    original, reply = entry.tuple_orig, entry.tuple_reply
    if isinstance(claim, StaticNat):
        wanted = str(claim.address)
        return wanted in (original.daddr, reply.daddr)
    if original.proto != PROTOCOLS[claim.proto]:
        return False
    if not claim.first <= (original.dport or 0) <= claim.last:
        return False
    # What answers is the target, not what was asked.
    if reply.saddr != str(claim.target) or original.daddr == reply.saddr:
        return False
    return address is None or original.daddr in (str(claim.address), str(address))
