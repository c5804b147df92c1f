# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of legacy iptables, of which the kernel sends no messages.

A question for a table's size takes a few microseconds.  Rules that are replaced by as
many others of the same size go unnoticed.
"""

import ctypes
import socket
from collections.abc import Iterator

from libvirt_natns.engine.observer import HOST
from libvirt_natns.firewall import iptables
from libvirt_natns.kernel import netns

IPT_SO_GET_INFO = 64
TABLE_NAMES = ("raw", "mangle", "nat", "filter")
TABLE_NAME = 32
GETINFO = 84
"""Octets of struct ipt_getinfo: name, hooks, places of their rules, number and size."""

_libc = ctypes.CDLL(None, use_errno=True)


class RuleTables:
    """The tables of a namespace, or of the host with None.

    Keeps the namespace alive until it is closed.  Raises KernelError where the namespace
    is missing, or OSError.
    """

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        with netns.entered(namespace):
            self._socket = socket.socket(socket.AF_INET, kind, socket.IPPROTO_RAW)
        self._size = self._read_size()

    def close(self) -> None:
        """Let go of the namespace."""
        self._socket.close()

    def is_altered(self) -> bool:
        """True if the rules have another number, size or place than at the last look."""
        before, self._size = self._size, self._read_size()
        return self._size != before

    def accept(self) -> None:
        """Take the rules as they are now."""
        self._size = self._read_size()

    def _read_size(self) -> int:
        # A question for a table of the host that does not exist would make the table.
        tables = TABLE_NAMES if self._namespace else sorted(iptables.in_use(None))
        answers = []
        for table in tables:
            buffer = ctypes.create_string_buffer(table.encode().ljust(TABLE_NAME, b"\0"), GETINFO)
            length = ctypes.c_uint32(GETINFO)
            failed = _libc.getsockopt(
                self._socket.fileno(),
                socket.IPPROTO_IP,
                IPT_SO_GET_INFO,
                buffer,
                ctypes.byref(length),
            )
            answers.append(b"" if failed else buffer.raw)
        return hash(tuple(answers))


class LegacyTables:
    """The tables of networks with the backend iptables; the host's while there is a network."""

    def __init__(self) -> None:
        self._networks: dict[str, RuleTables] = {}
        self._host: RuleTables | None = None

    def __len__(self) -> int:
        return len(self._networks)

    @property
    def has_host(self) -> bool:
        """True if the host's tables are watched."""
        return self._host is not None

    def open(self, uuid: str, namespace: str) -> None:
        """Watch a network's tables.  Raises KernelError or OSError."""
        self._networks[uuid] = RuleTables(namespace)
        if self._host is None:
            self.accept_host()

    def close(self, uuid: str) -> None:
        """Watch a network's tables no longer."""
        if uuid in self._networks:
            self._networks.pop(uuid).close()

    def accept_host(self) -> None:
        """Take the host's rules as they are now, after a change of ours."""
        if self._host is not None:
            self._host.accept()
        elif self._networks:
            self._host = RuleTables(None)

    def altered(self) -> Iterator[str]:
        """Yield the networks, and HOST, with other rules than at the last look.

        Raises KernelError or OSError where the host's tables cannot be listed; the next
        look compares these with the last successful one.
        """
        yield from (uuid for uuid, tables in self._networks.items() if tables.is_altered())
        if not self._networks:
            self.close_host()
        elif self._host is not None and self._host.is_altered():
            yield HOST

    def close_host(self) -> None:
        """Watch the host's tables no longer."""
        if self._host is not None:
            self._host.close()
            self._host = None
