# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that firewall chains of others stop, as the service knows and logs them.

The service looks whenever it looks at the host: after each change of rules or ways out, and
now and then.  A chain is logged when it begins to stop networks, and when it no longer does.
"""

from collections.abc import Mapping

from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.observer import HOST
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.service.log import Log
from libvirt_natns.service.repair import repair
from libvirt_natns.state.networks import NetworkRecord


class StoppedNetworks:
    """Looks for chains of others that stop networks, after each look at the host.

    ``health`` has the health of each network that is stopped, by uuid.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lines: tuple[str, ...] = ()
        self.health: Mapping[str, str] = {}

    def repair(self, engine: Engine, uuid: str, record: NetworkRecord | None) -> list[str] | None:
        """Repair as ``repair`` does, and look for chains that stop networks after HOST."""
        differences = repair(engine, uuid, record)
        if uuid == HOST and differences is not None:
            self._look(engine)
        return differences

    def _look(self, engine: Engine) -> None:
        found = comparison.host_stops(engine)
        before, self._lines, self.health = self._lines, found.lines, found.by_network
        for line in found.lines:
            if line not in before:
                self._log.say("warning", "stopped", by=line)
        if before and not found.lines:
            self._log.say("notice", "passing")
