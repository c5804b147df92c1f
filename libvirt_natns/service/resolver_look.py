# SPDX-License-Identifier: LGPL-2.1-or-later
"""The look at the host's resolvers, now and then: a link or a directory may come without an event.

dnsmasq reads a changed file by itself.  A link that leads elsewhere, a stub in place of a
server, and a complaint of a DNS relay change a plan.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from libvirt_natns.addresses import Family
from libvirt_natns.daemons import dns_relay, resolv_conf
from libvirt_natns.engine import relay_check
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.observer import HOST

FAMILIES: tuple[tuple[Family, ...], ...] = ((4,), (6,), (4, 6))

RECHECK = 5.0
"""Seconds between two questions to a DNS relay: the host's firewall may have changed."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """The state of the host's resolvers: for relays, and for networks without a relay."""

    source: tuple[str, ...]
    complaints: tuple[str, ...]
    resolvers: tuple[resolv_conf.Resolvers, ...]


class ResolverLook:
    """Looks at the caller's times, and has the parts compared that a change concerns."""

    def __init__(self, sessions: Sessions, suspect: Callable[[str], None]) -> None:
        self._sessions = sessions
        self._suspect = suspect
        self._seen: _Seen | None = None
        self._rechecked = 0.0
        self._unheard: Mapping[str, str] = {}

    def look(self) -> bool:
        """Compare the host's resolvers with the last look; True if they have changed.

        Raises what the look raises.
        """
        bridges = dns_relay.present()
        if bridges:
            self._recheck()
        seen = _Seen(
            dns_relay.source(),
            tuple(map(dns_relay.complaint, bridges)),
            tuple(resolv_conf.host_resolvers(families=families) for families in FAMILIES),
        )
        before, self._seen = self._seen, seen
        if before is None or seen == before:
            return False
        self._follow(before, seen)
        return True

    def _recheck(self) -> None:
        now = time.monotonic()
        if now - self._rechecked >= RECHECK:
            self._rechecked = now
            with self._sessions.engine() as engine:
                relay_check.recheck(engine, starts=False)
                unheard = relay_check.unheard(engine)
            for bridge in unheard.keys() & self._unheard.keys():
                dns_relay.complain(bridge, unheard[bridge])
            self._unheard = unheard

    def _follow(self, before: _Seen, seen: _Seen) -> None:
        if seen.source != before.source:
            self._suspect(HOST)
        moved = seen.resolvers != before.resolvers
        with self._sessions.engine() as engine:
            for record in engine.store.networks.all("up"):
                # A network that must do without its relay asks the resolvers as others do.
                concerned = moved
                if record.kind == "host":
                    concerned = seen.complaints != before.complaints or (
                        moved and any(seen.complaints)
                    )
                if concerned and record.this_boot:
                    self._suspect(record.uuid)
