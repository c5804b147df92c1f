# SPDX-License-Identifier: LGPL-2.1-or-later
"""From libvirt's events to the engine's verbs: a table.

Whether a failure may stop libvirt stands with the events in ``hook``, which
must know it without importing this.
"""

from collections.abc import Callable
from contextlib import ExitStack

from libvirt_natns import config, document
from libvirt_natns.engine import Engine
from libvirt_natns.kernel import Kernel
from libvirt_natns.model import Network
from libvirt_natns.selection import verdict
from libvirt_natns.store import Store

Verb = Callable[[Engine, Network, bytes], None]


def _prepare(engine: Engine, network: Network, xml: bytes) -> None:
    if verdict(network, engine.config).handled:
        engine.prepare(network, xml)


def _up(engine: Engine, network: Network, xml: bytes) -> None:
    if not verdict(network, engine.config).handled:
        return
    with ExitStack() as undo:
        undo.callback(engine.abandon, network)
        engine.up(network, xml)
        undo.pop_all()


def _refresh(engine: Engine, network: Network, xml: bytes) -> None:
    engine.refresh(network, xml)


def _down(engine: Engine, network: Network, xml: bytes) -> None:
    engine.down(network.uuid)


NETWORK: dict[tuple[str, str], Verb] = {
    ("start", "begin"): _prepare,
    ("started", "begin"): _up,
    ("updated", "begin"): _refresh,
    ("stopped", "end"): _down,
}


def network_event(event: tuple[str, str], data: bytes) -> None:
    """Answer one event of a network.  Raises a NatnsError to refuse it."""
    network = document.parse_hook_data(data).network
    store = Store()
    try:
        with Kernel() as kernel:
            NETWORK[event](Engine(config.load(), store, kernel), network, data)
    finally:
        store.close()
