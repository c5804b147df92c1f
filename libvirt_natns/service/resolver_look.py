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
from libvirt_natns.engine import names_health, relay_check
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.engine.observer import HOST
from libvirt_natns.service.log import Log

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

    def __init__(self, sessions: Sessions, log: Log, suspect: Callable[[str], None]) -> None:
        self._sessions = sessions
        self._log = log
        self._suspect = suspect
        self._seen: _Seen | None = None
        self._rechecked = 0.0
        self._unheard: Mapping[str, str] = {}
        self._without: Mapping[str, str] = {}
        self._is_news = True

    def networks_changed(self) -> None:
        """Have the next look tell which networks have no names; safe for threads."""
        self._is_news = True

    def look(self) -> None:
        """Compare the host's resolvers with the last look; raises what the look raises."""
        bridges = dns_relay.present()
        if bridges:
            self._recheck()
        seen = _Seen(
            dns_relay.source(),
            tuple(map(dns_relay.complaint, bridges)),
            tuple(resolv_conf.host_resolvers(families=families) for families in FAMILIES),
        )
        before, self._seen = self._seen, seen
        if before is not None and seen != before:
            self._follow(before, seen)
        if self._is_news or seen != before:
            self._is_news = False
            with self._sessions.engine() as engine:
                found = names_health.findings(engine)
            self._tell({**{note: note for note in names_health.notes()}, **found})

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

    def _tell(self, without: Mapping[str, str]) -> None:
        """Log why guests have lost their names or a relay, or that all is well again.

        The keys are networks, or notes of relays.
        """
        news = {uuid: why for uuid, why in without.items() if self._without.get(uuid) != why}
        for why in dict.fromkeys(news.values()):
            self._log.say("warning", "no names", why=why)
        if self._without and not without:
            self._log.say("notice", "names", again="all networks")
        self._without = without
