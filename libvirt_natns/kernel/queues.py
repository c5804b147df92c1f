# SPDX-License-Identifier: LGPL-2.1-or-later
"""Limits of the rate at which a link sends (tc(8)): a class of HTB, as libvirt makes it.

A veth end has no queue, so a packet beyond the rate is kept by the class, or dropped.  The
flows take turns (SFQ), where the kernel has that.  Source: linux/pkt_sched.h.
"""

import errno
import os
import struct
from contextlib import suppress

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netlink, netns, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL, Attrs
from libvirt_natns.model.bandwidth import RateLimit

RTM_NEWQDISC, RTM_DELQDISC, RTM_NEWTCLASS, RTM_GETTCLASS = 36, 37, 40, 42
TCA_KIND, TCA_OPTIONS = 1, 2
HTB_PARMS, HTB_INIT, HTB_RATE64, HTB_CEIL64 = 1, 2, 6, 7

ROOT = 0xFFFFFFFF
QUEUE, CLASS, TURNS = 0x10000, 0x10001, 0x20000
"""Handles of the link's HTB, of its only class, and of that class's SFQ."""

GLOBALS = struct.pack("=5I", 3, 10, CLASS & 0xFFFF, 0, 0)
"""struct tc_htb_glob: version 3, unused, and the class of all packets."""
REHASHED = struct.pack("=IiIII", 0, 10, 0, 0, 0)
"""struct tc_sfq_qopt: flows are hashed anew every 10 s, as libvirt has it."""

HEADER = struct.Struct("=BxxxiIII")
"""struct tcmsg: family, link, handle, parent, and a number without use here."""
RATE = struct.Struct("=BBHhHI")
"""struct tc_ratespec: cell, link layer, overhead, alignment, least packet, rate."""
BUCKETS = struct.Struct("=5I")
"""The end of struct tc_htb_opt: both buckets, quantum, level, priority."""
ETHERNET = 1
"""A link layer for which the kernel asks for no table of rates."""
TICK = 64
"""Nanoseconds; buckets are the time that it takes to send their octets."""
QUANTUM = 15000
"""Octets that a class sends in its turn: the kernel complains of what it finds itself."""
LARGEST = 0xFFFFFFFF

HARMLESS = (errno.ENOENT, errno.EINVAL)
"""The link has no queue that could be deleted."""


class Queues:
    """The limits of one namespace's links."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def differences(self, link: str, limit: RateLimit) -> list[str]:
        """Return a line if a link does not send at a limit's rates."""
        index = self._channel.index(link)
        try:
            classes = self._channel.reader.dump(RTM_GETTCLASS, _header(index))
        except OSError as error:
            raise KernelError(
                f"cannot list the queues of {link}", error.strerror or str(error)
            ) from error
        if any(_buckets(body) == _wanted(limit) for body in classes):
            return []
        return [f"link {link} in {self._channel.place} is not limited to {limit}"]

    def limit(self, link: str, limit: RateLimit) -> None:
        """Let a link send at a limit's rates, and no faster.  Raises KernelError."""
        index = self._channel.index(link)
        try:
            _limit(self._channel.reader, index, limit)
        except OSError as error:
            raise KernelError(
                f"the kernel cannot limit link {link} in {self._channel.place}"
                f" ({os.strerror(error.errno or 0)})",
                "load the module sch_htb",
            ) from error


def check() -> None:
    """Raise KernelError where the kernel has no such limits."""

    def trial() -> None:
        with rtnetlink.Session() as session:
            try:
                _limit(session, 1, RateLimit(1000, 1000, 1600, 1600))
            except OSError as error:
                raise KernelError(
                    f"the kernel has no HTB for <bandwidth> ({os.strerror(error.errno or 0)})",
                    "load the module sch_htb, or remove <bandwidth>",
                ) from error

    netns.in_scratch_namespace(trial)


def _limit(session: rtnetlink.Session, index: int, limit: RateLimit) -> None:
    """Give a link a queue in place of another.  Raises OSError."""
    try:
        session.change(RTM_DELQDISC, _header(index, 0, ROOT))
    except OSError as error:
        if error.errno not in HARMLESS:
            raise
    new = NLM_F_CREATE | NLM_F_EXCL
    queue = _of_kind("htb", netlink.pack([(HTB_INIT, GLOBALS)]))
    turns = _of_kind("sfq", REHASHED)
    try:
        session.change(RTM_NEWQDISC, _header(index, QUEUE, ROOT) + queue, new)
        session.change(RTM_NEWTCLASS, _header(index, CLASS, QUEUE) + _class(limit), new)
        with suppress(FileNotFoundError):
            # A kernel without SFQ: flows wait in one line.
            session.change(RTM_NEWQDISC, _header(index, TURNS, CLASS) + turns, new)
    except OSError:
        # Half a queue would send nothing, or without a limit.
        with suppress(OSError):
            session.change(RTM_DELQDISC, _header(index, 0, ROOT))
        raise


def _header(index: int, handle: int = 0, parent: int = 0) -> bytes:
    return HEADER.pack(0, index, handle, parent, 0)


def _of_kind(kind: str, options: bytes) -> bytes:
    return netlink.pack([netlink.text(TCA_KIND, kind), (TCA_OPTIONS, options)])


def _class(limit: RateLimit) -> bytes:
    rate, peak, burst, peak_burst = _wanted(limit)
    options = [
        (
            HTB_PARMS,
            _rate(rate) + _rate(peak) + BUCKETS.pack(burst, peak_burst, QUANTUM, 0, 0),
        )
    ]
    options += [
        (kind, struct.pack("=Q", each))
        for kind, each in ((HTB_RATE64, rate), (HTB_CEIL64, peak))
        if each > LARGEST
    ]
    return _of_kind("htb", netlink.pack(options))


def _rate(rate: int) -> bytes:
    return RATE.pack(0, ETHERNET, 0, 0, 0, min(rate, LARGEST))


def _wanted(limit: RateLimit) -> tuple[int, int, int, int]:
    """Return the rates of a limit, and the buckets in the kernel's ticks."""
    burst = _ticks(limit.burst, limit.average)
    return limit.average, limit.peak, burst, _ticks(limit.peak_burst, limit.peak)


def _ticks(octets: int, rate: int) -> int:
    return min(octets * 10**9 // (rate * TICK), LARGEST)


def _buckets(body: bytes) -> tuple[int, int, int, int] | None:
    """Return the rates and buckets of a class in a message's body; None for another kind."""
    attributes = Attrs.parse(body, HEADER.size)
    options = attributes.nested(TCA_OPTIONS)
    found = options.get(HTB_PARMS)
    if attributes.text(TCA_KIND) != "htb" or found is None:
        return None
    rate, peak = (RATE.unpack_from(found, start)[-1] for start in (0, RATE.size))
    burst, peak_burst, *_ = BUCKETS.unpack_from(found, 2 * RATE.size)
    rate = options.number(HTB_RATE64) or rate
    return rate, options.number(HTB_CEIL64) or peak, burst, peak_burst
