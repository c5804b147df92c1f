# SPDX-License-Identifier: LGPL-2.1-or-later
"""A real guest: a libvirt domain that boots the image of contrib/guest-image.

It is emulated (never /dev/kvm), boots in some 4 s, takes a lease, fetches a page
if told to, serves its name on port 80, and runs commands.
"""

import itertools
import os
import re
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from xml.sax.saxutils import escape, quoteattr

from lab_base import CACHE, Closing, LabError, virsh, wait_for

IMAGE = CACHE / "guest"
INSTALLED = Path("/var/lib/libvirt/images/natns-guest")
DIRECTORY = Path("/run/tmp")


def _install_image() -> None:
    """Put the image where the user that qemu runs as can read it."""
    if (INSTALLED / "initrd.gz").exists():
        return
    if not (IMAGE / "initrd.gz").exists():
        raise LabError("the guest image is missing: run contrib/guest-image outside the sandbox")
    INSTALLED.mkdir(parents=True, exist_ok=True)
    for name in ("vmlinuz", "initrd.gz"):
        shutil.copyfile(IMAGE / name, INSTALLED / name)


class RealGuest(Closing):
    """A domain with one NIC in ``network``; more by further ``interfaces``.

    ``url`` (its host numeric) is fetched once there is a lease.  ``metadata`` is
    what stands inside the domain's ``<metadata>``.  ``start`` defines and starts
    it; ``down`` destroys and undefines it.
    """

    def __init__(
        self,
        name: str,
        network: str,
        mac: str | None = None,
        *,
        url: str | None = None,
        metadata: str = "",
        interfaces: Sequence[str] = (),
        memory: int = 128,
    ) -> None:
        self.name = name
        self.network = network
        self.mac = mac
        self.url = url
        self.metadata = metadata
        self.interfaces = interfaces
        self.memory = memory
        self._log = Path(f"/var/log/libvirt/qemu/console-{name}.log")
        self._socket = Path(f"/var/lib/libvirt/qemu/console-{name}")
        self._numbers = itertools.count(1)

    def xml(self) -> str:
        """The domain's XML."""
        words = ["console=ttyS0", "quiet", "panic=-1", f"natns.name={self.name}"]
        words += [f"natns.url={self.url}"] if self.url else []
        mac = f"<mac address={quoteattr(self.mac)}/>" if self.mac else ""
        nic = (
            f"<interface type='network'>{mac}<source network={quoteattr(self.network)}/>"
            "<model type='virtio'/><rom enabled='no'/></interface>"
        )
        nics = "\n    ".join([nic, *self.interfaces])
        return f"""<domain type='qemu'>
  <name>{escape(self.name)}</name>
  <metadata>{self.metadata}</metadata>
  <memory unit='MiB'>{self.memory}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{INSTALLED}/vmlinuz</kernel>
    <initrd>{INSTALLED}/initrd.gz</initrd>
    <cmdline>{escape(" ".join(words))}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>destroy</on_reboot>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'>
      <source mode='bind' path='{self._socket}'/>
      <log file='{self._log}' append='off'/>
    </serial>
    {nics}
  </devices>
</domain>
"""

    def start(self) -> Self:
        """Define and start the domain; raises CommandError with virsh's line."""
        _install_image()
        file = DIRECTORY / f"domain-{self.name}.xml"
        file.write_text(self.xml())
        try:
            virsh("define", os.fspath(file))
        finally:
            file.unlink()
        virsh("start", self.name)
        return self

    def __enter__(self) -> Self:
        return self.start()

    def down(self) -> None:
        """Pull the plug and forget the domain; missing is fine."""
        virsh("destroy", self.name, check=False)
        virsh("undefine", self.name, check=False)

    # --- what the guest says

    @property
    def console(self) -> str:
        """All that the guest has written to its serial console."""
        text = self._log.read_text(errors="replace") if self._log.exists() else ""
        return text.replace("\r", "")

    def wait_for_text(self, text: str, timeout: float = 60.0) -> str:
        """Wait until the console shows ``text``; returns the console."""
        try:
            wait_for(lambda: text in self.console, timeout=timeout, interval=0.1)
        except LabError:
            tail = self.console[-2000:]
            raise LabError(f"{self.name} never said {text!r} in {timeout} s:\n{tail}") from None
        return self.console

    def wait_ready(self, timeout: float = 60.0) -> str:
        """Wait for the end of the boot, lease and fetch included."""
        return self.wait_for_text(f"guest {self.name}: ready", timeout)

    @property
    def address(self) -> str | None:
        """The leased address without prefix; None as long as there is none."""
        found = re.search(rf"^guest {re.escape(self.name)}: address ([\d.]+)/", self.console, re.M)
        return found[1] if found else None

    @property
    def fetched(self) -> str:
        """What the page at ``url`` said; "" before it was fetched."""
        lines = re.findall(rf"^guest {re.escape(self.name)}: > (.*)$", self.console, re.M)
        return "\n".join(lines)

    def run(self, command: str, timeout: float = 20.0) -> str:
        """Run a line of shell in the guest (busybox; ready guests only).

        Returns its output; raises LabError with it for a non-zero exit status.
        """
        before = len(self.console)
        number = next(self._numbers)
        mark = f"guest {self.name}: done {number} "
        with socket.socket(socket.AF_UNIX) as console:
            console.connect(os.fspath(self._socket))
            console.sendall(f"{number} {command}\n".encode())
            # Until the end: what the guest has not read yet goes with the connection.
            wait_for(
                lambda: re.search(rf"^{re.escape(mark)}\d+\n", self.console, re.M),
                timeout=timeout, interval=0.05, what=f"{command!r} in {self.name}",
            )  # fmt: skip
        output, _, status = self.console[before:].partition(mark)
        if int(status.split()[0]):
            raise LabError(f"{self.name}: {command}: exit status {status.split()[0]}\n{output}")
        return output

    def fetch(self, url: str) -> str:
        """The page at ``url`` (host numeric), fetched by the guest."""
        return self.run(f"fetch {url}").removesuffix("\n")
