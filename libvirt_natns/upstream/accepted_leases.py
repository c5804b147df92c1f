# SPDX-License-Identifier: LGPL-2.1-or-later
"""The last usable lease of a network, kept for a renewal that cannot be used.

The files are in the directory of the network's DHCP client, beside the client's own.
"""

from contextlib import suppress
from dataclasses import replace

from libvirt_natns import names
from libvirt_natns.daemons import dhcp_lease
from libvirt_natns.daemons.dhcp_lease import DhcpLease
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.kernel.boot_clock import now

ACCEPTED, REFUSED = "accepted", "refused"
UNTIL = "until"
TOLD = "told"
"""Names of files, and a key in the first of them."""


def was_refused(uuid: str) -> bool:
    """True if the client's last lease could not be used."""
    return (names.dhcp_directory(uuid) / REFUSED).exists()


def last(uuid: str, present: DhcpLease | None) -> DhcpLease | None:
    """Return the last usable lease, while it is valid.

    A server that renews the ``present`` lease of the same address renews the last one, too.
    """
    text = text_if_any(names.dhcp_directory(uuid) / ACCEPTED)
    *_, line = ["", *text.splitlines()]
    key, _, seconds = line.partition("=")
    until = float(seconds) if key == UNTIL and seconds.isdecimal() else None
    lease = dhcp_lease.parse(text, until) if text else None
    if lease is not None and present is not None and lease.address.ip == present.address.ip:
        return replace(lease, until=present.until)
    expired = lease is not None and lease.until is not None and lease.until < now()
    return None if expired else lease


def note(uuid: str, lease: DhcpLease | None, *, usable: bool) -> None:
    """Keep a client's lease if it is usable.

    A lost lease takes the address along; a refused lease does not.
    """
    directory = names.dhcp_directory(uuid)
    accepted, refused = directory / ACCEPTED, directory / REFUSED
    with suppress(OSError):
        if lease is None:
            if not refused.exists():
                accepted.unlink(missing_ok=True)
            return
        text = text_if_any(directory / "lease")
        if usable:
            refused.unlink(missing_ok=True)
        else:
            refused.touch()
            earlier = last(uuid, lease)
            if earlier is None or earlier.address.ip != lease.address.ip:
                return
            # The address was renewed with other values; only its lifetime counts.
            text = text_if_any(accepted).partition(f"{UNTIL}=")[0]
        text += "" if lease.until is None else f"{UNTIL}={int(lease.until)}\n"
        if text != text_if_any(accepted):
            accepted.write_text(text)


def tell_once(uuid: str, lines: list[str]) -> list[str]:
    """Return lines for the log, if they are others than last time."""
    text = "".join(f"{line}\n" for line in lines)
    file = names.dhcp_directory(uuid) / TOLD
    if text == text_if_any(file):
        return []
    with suppress(OSError):
        file.write_text(text)
    return lines
