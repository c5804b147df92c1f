# SPDX-License-Identifier: LGPL-2.1-or-later
"""A provider's DHCP server that a test can replace by another one, and what it has seen."""

import re
import subprocess
import tempfile
from pathlib import Path

from lab_base import Closing, LabError, end, spawn, wait_for

SERVED = re.compile(r"(DHCP[A-Z]+)\(eth0\) ([0-9.]*) ?([0-9a-f:]{17})")


class DhcpServer(Closing):
    """dnsmasq as a DHCP server in a node's namespace; use it in a ``with``.

    ``first`` and ``last`` are its range; with ``last`` "static" it knows nobody, and
    refuses whoever asks to keep an address.  ``options`` are dnsmasq's own.  It
    forgets its leases when it ends.
    """

    def __init__(
        self,
        first: str = "192.168.0.50",
        last: str = "192.168.0.90",
        *options: str,
        namespace: str = "upstream",
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="dhcp-"))
        self._log = self._directory / "log"
        self._process: subprocess.Popen[str] = spawn(
            "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--port=0",
            "--user=root", "--interface=eth0", "--except-interface=lo", "--bind-interfaces",
            f"--dhcp-range={first},{last},2m", "--dhcp-authoritative", "--no-ping",
            f"--dhcp-leasefile={self._directory}/leases", "--log-dhcp",
            f"--log-facility={self._log}", *options, namespace=namespace,
        )  # fmt: skip
        try:
            wait_for(lambda: "started" in self.log(), what="the DHCP server")
        except LabError:
            self.down()
            raise

    def down(self) -> None:
        """End it, leases and all."""
        end(self._process)
        for file in self._directory.glob("*"):
            file.unlink()
        self._directory.rmdir()

    def log(self) -> str:
        """All that it has logged."""
        return self._log.read_text() if self._log.exists() else ""

    def seen(self, what: str) -> list[tuple[str, str]]:
        """Messages of a kind, such as "DHCPACK": address ("" for none) and MAC of each."""
        return [(address, mac) for kind, address, mac in SERVED.findall(self.log()) if kind == what]

    def leased(self) -> dict[str, str]:
        """Addresses that are leased now, with the client-id each: what dnsmasq has on file."""
        file = self._directory / "leases"
        rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
        return {row[2]: row[4] for row in rows}
