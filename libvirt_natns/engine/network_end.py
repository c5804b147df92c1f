# SPDX-License-Identifier: LGPL-2.1-or-later
"""The end of a network, for guests that still run: they publish nothing there any more.

A guest with several NICs may get its default route by another network from then on.
"""

from collections.abc import Callable
from functools import partial

from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.guests.guest_engine import Guests
from libvirt_natns.state.networks import NetworkRecord

LEAVING = "withdrawing from a network that has ended"


def leave(verbs: Engine, record: NetworkRecord | None) -> None:
    """Have guests that still run follow the end of their network."""
    if record is not None:
        do_all(
            verbs,
            # The ports are free for others from now on.
            (LEAVING, partial(Guests(verbs).refresh, record.uuid)),
            (LEAVING, partial(Guests(verbs).reroute, record)),
        )


def end_given_up(verbs: Engine, but: str, *, wait: bool = False) -> None:
    """Take back starts that libvirt has given up, and have their guests follow."""
    for record in verbs.end_given_up(but, wait=wait):
        leave(verbs, record)


def do_all(verbs: Engine, *works: tuple[str, Callable[[], object]]) -> None:
    """Do all works, whichever of them fails: what libvirt has done stays so."""
    for when, work in works:
        try:
            work()
        except Exception as error:  # an error would take back a network that is well
            verbs.observer.failed(when, error)
