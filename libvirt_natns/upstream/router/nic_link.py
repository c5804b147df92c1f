# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links as the router sees them: found, listed, moved between namespaces, and named.

The functions take a socket of the namespace in which the link is (``session``), or a
namespace; None stands for the host, the caller's own namespace.
"""

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netlink, netns
from libvirt_natns.kernel.netlink import Attrs, InterruptedDumpError, Socket
from libvirt_natns.kernel.rtnetlink import SKIP_STATISTICS

RESERVED = ("lo", names.ROUTER_HOST_LINK, names.ROUTER_TRANSIT)
"""Names that a NIC cannot have: links in a router namespace have them."""

DUMP_TRIES = 100
DONE_ALREADY = (errno.EEXIST, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL)


@dataclass(frozen=True, slots=True)
class ListedLink:
    """A link as the kernel lists it: its index, flags and attributes."""

    index: int
    flags: int
    attributes: Attrs

    @property
    def name(self) -> str:
        return self.attributes.text(netlink.IFLA_IFNAME)

    @property
    def alias(self) -> str:
        return self.attributes.text(netlink.IFLA_IFALIAS)

    @property
    def mac(self) -> str:
        return (self.attributes.get(netlink.IFLA_ADDRESS) or b"").hex(":")

    @property
    def permanent(self) -> str:
        """The MAC address that the hardware came with; "" where the kernel knows none."""
        return (self.attributes.get(netlink.IFLA_PERM_ADDRESS) or b"").hex(":")

    @property
    def kind(self) -> str:
        """The driver's kind, such as "veth"; "" for hardware."""
        return self.attributes.nested(netlink.IFLA_LINKINFO).text(netlink.IFLA_INFO_KIND)

    @property
    def master(self) -> int | None:
        """The index of the bridge or bond that the link is a port of."""
        return self.attributes.number(netlink.IFLA_MASTER)

    @property
    def altnames(self) -> tuple[str, ...]:
        listed = self.attributes.nested(netlink.IFLA_PROP_LIST)
        return tuple(sorted(os.fsdecode(name.rstrip(b"\0")) for _, name in listed))


# -- looking -----------------------------------------------------------------


@contextmanager
def session(namespace: str | None) -> Iterator[Socket]:
    """Open a socket in a namespace.

    Raises KernelError; an OSError inside becomes one as well.
    """
    where = namespace or "the host"
    try:
        with netns.entered(namespace):
            sock = Socket()
    except OSError as error:
        raise KernelError(f"cannot open a socket in {where}", str(error)) from error
    try:
        yield sock
    except OSError as error:
        raise KernelError(f"the kernel refuses a change in {where}", str(error)) from error
    finally:
        sock.close()


def dump(sock: Socket, kind: int, header: bytes) -> list[bytes]:
    """Return a whole listing, although other programs make changes.

    A family that the kernel lacks has no objects.  Raises OSError and KernelError.
    """
    for _ in range(DUMP_TRIES):
        try:
            return sock.dump(kind, header)
        except InterruptedDumpError:
            continue
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise
            return []
    raise KernelError("the kernel's network settings keep changing", "try again")


def find(sock: Socket, name: str) -> ListedLink | None:
    """Return a link by its name or an alternative name, or None.  Raises OSError."""
    wanted = netlink.pack([netlink.text(netlink.IFLA_IFNAME, name)])
    body = sock.get(netlink.RTM_GETLINK, bytes(16) + wanted + SKIP_STATISTICS)
    return _listed(body) if body else None


def require(sock: Socket, namespace: str | None, name: str) -> ListedLink:
    """Return a link by its name.  Raises KernelError where it is missing."""
    link = find(sock, name)
    if link is None:
        raise KernelError(f"there is no link {name} in {namespace or 'the host'}")
    return link


def links(sock: Socket) -> Iterator[ListedLink]:
    """Yield all links of the socket's namespace."""
    for body in dump(sock, netlink.RTM_GETLINK, bytes(16) + SKIP_STATISTICS):
        yield _listed(body)


def _listed(body: bytes) -> ListedLink:
    _, _, index, flags, _ = netlink.LINK_HEADER.unpack_from(body)
    return ListedLink(index, flags, Attrs.parse(body, 16))


def exists(namespace: str | None, name: str) -> bool:
    """True if a namespace exists and has a link of that name."""
    if namespace is not None and not netns.exists(namespace):
        return False
    with session(namespace) as sock:
        return find(sock, name) is not None


def is_up(namespace: str, name: str) -> bool:
    """True if a link is up.  Raises KernelError where it is missing."""
    with session(namespace) as sock:
        return bool(require(sock, namespace, name).flags & netlink.IFF_UP)


def drops(namespace: str, name: str) -> dict[str, int]:
    """Return the frames that a link has lost, by direction.  Raises KernelError."""
    with netns.entered(namespace):
        for line in (
            Path("/proc/thread-self/net/dev").read_text(errors="surrogateescape").splitlines()
        ):
            link, _, counters = line.partition(":")
            if link.strip() == name:
                numbers = [int(word) for word in counters.split()]
                return {"in": numbers[3], "out": numbers[11]}
    return {}


# -- changing ----------------------------------------------------------------


def attempt(sock: Socket, kind: int, body: bytes, flags: int = 0) -> None:
    """Make a change that may have been made already.  Raises OSError for any other reason."""
    try:
        sock.change(kind, body, flags)
    except OSError as error:
        if error.errno not in DONE_ALREADY:
            raise


def move(name: str, source: str | None, target: str | None, index: int = 0) -> None:
    """Move a NIC to another namespace without its alternative names; the kernel sets it down.

    Before Linux 6.6 the alternative names stay registered where they were, and block
    the way back.  ``index`` is the NIC's new index, if it is free and the kernel can
    set it (5.14).  Raises KernelError.
    """
    with netns.opened(target) as descriptor, session(source) as sock:
        link = require(sock, source, name)
        change_altnames(sock, link, ())
        namespace = (netlink.IFLA_NET_NS_FD, struct.pack("=i", descriptor))
        _move(sock, link.index, namespace, index)


def _move(sock: Socket, link: int, namespace: netlink.Attribute, index: int) -> None:
    if index:
        numbered = [namespace, (netlink.IFLA_NEW_IFINDEX, struct.pack("=i", index))]
        with suppress(OSError):
            sock.change(netlink.RTM_NEWLINK, netlink.change_link(link, numbered))
            return
    sock.change(netlink.RTM_NEWLINK, netlink.change_link(link, [namespace]))


def change_altnames(sock: Socket, link: ListedLink, wanted: Iterable[str]) -> None:
    """Give a link exactly these alternative names.  Raises OSError."""
    present, wanted = set(link.altnames), set(wanted)
    for kind, changed, flags in (
        (netlink.RTM_DELLINKPROP, present - wanted, 0),
        (netlink.RTM_NEWLINKPROP, wanted - present, netlink.NLM_F_CREATE | netlink.NLM_F_EXCL),
    ):
        if changed:
            listed = [netlink.text(netlink.IFLA_ALT_IFNAME, name) for name in sorted(changed)]
            properties = (netlink.IFLA_PROP_LIST | netlink.NLA_NESTED, netlink.pack(listed))
            sock.change(kind, netlink.change_link(link.index, [properties]), flags)
