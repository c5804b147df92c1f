# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts that were refused because the upstream was not there, noted by network.

libvirt starts a network with autostart once, at boot.  Its bridge, NIC or router may come
later.  A note has the network's XML, as libvirt gave it to the hook.  The note goes with
the network's next start, unless that is refused like this, so a network that was stopped has
none.
A hook cannot ask libvirt about autostart, but libvirt has a link for each such network.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.context import Context
from libvirt_natns.engine.start_checks import check_upstream
from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.model.network import Network
from libvirt_natns.upstream.selection import verdict

AUTOSTART = Path("/etc/libvirt/qemu/networks/autostart")
UNFINISHED = ".new"
TRIES = 2
"""Tries to write a note: the end of the last other note takes the directory away."""


@dataclass(frozen=True, slots=True)
class LateStart:
    """A network with a refused start, and why its upstream is still not there; "" if it is."""

    uuid: str
    name: str
    fault: str


def _has_autostart(network: Network) -> bool:
    return (AUTOSTART / f"{network.name}.xml").is_symlink()


def _directory() -> Path:
    return names.RUN_DIRECTORY / "late"


def note(network: Network, xml: bytes) -> None:
    """Note the refused start of a network, if libvirt starts the network by itself.

    A note that cannot be written is left out: the start is refused in any case.
    """
    if not _has_autostart(network):
        return
    for _ in range(TRIES):
        with suppress(OSError):
            make_directory(_directory())
            # The service may read at any time, and forgets a note that makes no sense.
            fresh = _directory() / f"{network.uuid}{UNFINISHED}"
            fresh.write_bytes(xml)
            fresh.replace(_directory() / network.uuid)
            return


def forget(uuid: str) -> None:
    """Remove the note of a network; missing is success."""
    with suppress(OSError):
        (_directory() / uuid).unlink()
        _directory().rmdir()


def noted() -> list[str]:
    """Return the uuids of all networks with a note."""
    with suppress(OSError):
        listed = (file.name for file in _directory().iterdir())
        return sorted(name for name in listed if not name.endswith(UNFINISHED))
    return []


def waiting(context: Context, uuids: Iterable[str] | None = None) -> Iterator[LateStart]:
    """Yield the noted networks that still have autostart, each with its upstream's fault.

    ``uuids`` are the networks to look at; None is all that have a note.
    """
    for uuid in noted() if uuids is None else uuids:
        network = None
        with suppress(OSError, NatnsError):
            xml = (_directory() / uuid).read_bytes()
            network = verdict(libvirt_xml.parse_hook_data(xml).network, context.config).network
        if network is not None and _has_autostart(network):
            yield LateStart(uuid, network.name, _fault(context, network))


def _fault(context: Context, network: Network) -> str:
    try:
        check_upstream(context, network, context.planner.segment(network))
    except NatnsError as error:
        return error.fact
    return ""
