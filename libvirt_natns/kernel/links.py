# SPDX-License-Identifier: LGPL-2.1-or-later
"""Links of one namespace: what they are, up or not, and their end."""

import errno
import os
from contextlib import suppress

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.rtnetlink import Link


class Links:
    """The links of one namespace."""

    __slots__ = ("_channel",)

    def __init__(self, channel: NetlinkChannel) -> None:
        self._channel = channel

    def get(self, name: str) -> Link | None:
        """Return a link by its name, or None.  Raises KernelError."""
        return self._channel.remembered("link", name, lambda: self._read(name))

    def _read(self, name: str) -> Link | None:
        try:
            return self._channel.reader.link(name)
        except OSError as error:
            raise KernelError(f"cannot read link {name}", error.strerror or str(error)) from error

    def mtu(self, name: str) -> int | None:
        """Return the MTU of a link in octets; None for no such link."""
        link = self.get(name)
        return link.mtu if link else None

    def mac(self, name: str) -> str | None:
        """Return the MAC address of a link, in lower case; None for no such link."""
        link = self.get(name)
        return link.mac if link else None

    def is_bridge(self, name: str) -> bool:
        """Return True if a link is a Linux bridge."""
        link = self.get(name)
        return link is not None and link.kind == "bridge"

    def master(self, name: str) -> Link | None:
        """Return the link, such as a bridge, that another link belongs to."""
        link = self.get(name)
        if link is None or link.master is None:
            return None
        links = self._channel.links()
        return next((master for master in links if master.index == link.master), None)

    def differences(self, name: str) -> list[str]:
        """Return in words why a link is not simply up."""
        link = self.get(name)
        if link is None:
            return [f"link {name} is missing in {self._channel.place}"]
        return [] if link.up else [f"link {name} is down in {self._channel.place}"]

    def set_up(self, name: str) -> None:
        """Set a link up."""
        index = self._channel.index(name)
        self._channel.change(
            f"to set {name} up",
            lambda: self._channel.writer.link("set", index=index, state="up"),
        )

    def set_mtu(self, name: str, mtu: int) -> None:
        """Set a link's MTU, in octets."""
        index = self._channel.index(name)
        self._channel.change(
            f"to set the MTU of {name} to {mtu}",
            lambda: self._channel.writer.link("set", index=index, mtu=mtu),
        )

    def delete(self, name: str) -> None:
        """Delete a link; with one end of a veth pair goes the other end, too."""
        link = self.get(name)
        if link is None:
            return
        code = self._channel.attempt(lambda: self._channel.writer.link("del", index=link.index))
        if code not in (0, errno.ENODEV, errno.ENXIO):
            raise KernelError(f"cannot delete link {name}", os.strerror(code))

    def delete_group(self, group: int, *names: str) -> None:
        """Delete these links; ``group`` is a link group's number that they alone have.

        The kernel waits for each deletion to reach all processors (8 ms and more), and
        for the deletion of a group once.
        """
        writer = self._channel.writer

        def delete() -> None:
            for name in names:
                with suppress(KernelError):
                    writer.link("set", index=self._channel.index(name), group=group)
            writer.link("del", group=group)

        if self._channel.attempt(delete):
            # A link has just gone by itself, or there was no link.
            for name in names:
                self.delete(name)
