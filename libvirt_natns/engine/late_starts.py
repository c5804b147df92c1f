# SPDX-License-Identifier: LGPL-2.1-or-later
"""Starts that were refused because the upstream was not there, noted by network.

libvirt starts a network with autostart once, at boot.  Its bridge, NIC or router may come
later.  A note has the network's XML, as libvirt gave it to the hook.  The note goes with
the network's next start that finds the upstream, so a network that was stopped has none.
A hook cannot ask libvirt about autostart, but libvirt has a link for each such network.
"""

from collections.abc import Iterator
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
    with suppress(OSError):
        make_directory(_directory())
        (_directory() / network.uuid).write_bytes(xml)


def forget(uuid: str) -> None:
    """Remove the note of a network; missing is success."""
    with suppress(OSError):
        (_directory() / uuid).unlink()
        _directory().rmdir()


def noted() -> list[str]:
    """Return the uuids of all networks with a note."""
    with suppress(OSError):
        return sorted(file.name for file in _directory().iterdir())
    return []


def waiting(context: Context) -> Iterator[LateStart]:
    """Yield the noted networks that still have autostart, each with its upstream's fault."""
    for uuid in noted():
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
