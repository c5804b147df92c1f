# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looks that the service takes again and again, as no event tells of what they find."""

from collections.abc import Callable

from libvirt_natns.engine import proxied_addresses
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.log import Log
from libvirt_natns.service.obstacle_watch import PAUSE, SOON, ObstacleWatch
from libvirt_natns.service.outside_look import OutsideLook, TellError
from libvirt_natns.service.resolver_look import ResolverLook
from libvirt_natns.service.workqueue import Background
from libvirt_natns.upstream import routers

ROUTERS = 10.0
"""Seconds between two looks for routers that were not confirmed in time."""

RESOLVERS = 2.0
"""Seconds between two looks at the host's resolvers."""

OUTSIDE = 1.0
"""Seconds between two looks at the addresses of guests in a provider's own IPv6 prefix."""


class Looks:
    """All looks, in the threads of ``background``; each has the next one done in a while.

    An error is told to ``report`` once, and networks that are to be compared to ``suspect``.
    """

    def __init__(
        self,
        sessions: Sessions,
        background: Background,
        log: Log,
        report: TellError,
        suspect: Callable[[str], None],
    ) -> None:
        self.obstacles = ObstacleWatch(sessions, log, report)
        self._outside = OutsideLook(sessions, log, report, suspect)
        self._resolvers = ResolverLook(sessions, suspect)
        self._background = background
        self._log = log
        self._report = report
        self._complaints = Complaints()

    def start(self) -> None:
        """Take the first of each look."""
        for look in (self.expire_routers, self._look_for_obstacles, self._look_at_resolvers):
            self._background.soon(look)

    def after_work(self) -> None:
        """Look soon, as a verb may have changed what there is to be found."""
        self.after_change_of_host()
        if proxied_addresses.networks():
            self._background.after(OUTSIDE, self._look_outside)

    def after_change_of_host(self) -> None:
        """Look soon, as the host may have another way out, other rules or other resolvers."""
        self._background.after(SOON, self._look_for_obstacles)

    def expire_routers(self) -> None:
        """Take back overdue routers, as their own timers may have been killed."""
        self._try("routers", "taking a router back", self._expire_routers)
        self._background.after(ROUTERS, self.expire_routers)

    def _expire_routers(self) -> None:
        for line in routers.expire_overdue():
            self._log.say("warning", "expired", repaired=line)

    def _look_at_resolvers(self) -> None:
        """Follow the host's resolvers where dnsmasq does not."""
        self._try("resolvers", "looking at the resolvers", self._follow_resolvers)
        self._background.after(RESOLVERS, self._look_at_resolvers)

    def _follow_resolvers(self) -> None:
        if self._resolvers.look():
            self.after_change_of_host()

    def _look_for_obstacles(self) -> None:
        self.obstacles.look()
        self._background.after(PAUSE, self._look_for_obstacles)

    def _look_outside(self) -> None:
        if self._outside.look():
            self._background.after(OUTSIDE, self._look_outside)

    def _try(self, subject: str, when: str, work: Callable[[], None]) -> None:
        """Do work for no network in particular, so that an error makes no network suspect."""
        try:
            work()
            self._complaints.end(subject)
        except Exception as error:  # the next look comes in any case
            if self._complaints.is_news(subject, error):
                self._report(error, when)
