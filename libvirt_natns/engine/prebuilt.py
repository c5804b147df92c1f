# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks that a resident process has built ahead of libvirt's `started`."""

from threading import Lock

from libvirt_natns.operations.operation import Plan


class Built:
    """Plans that were carried out for starts that go on; for all threads of a process.

    The time in the network's record tells a start from another one of the same network.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Plan]] = {}
        self._lock = Lock()

    def keep(self, uuid: str, since: float, plan: Plan) -> None:
        """Note the plan that was carried out for a start."""
        with self._lock:
            self._kept[uuid] = (since, plan)

    def take(self, uuid: str, since: float) -> Plan:
        """Return the plan that was carried out for this start, once; empty for another start."""
        with self._lock:
            began, plan = self._kept.pop(uuid, (since, ()))
        return plan if began == since else ()

    def drop(self, uuid: str) -> None:
        """Forget a network's start, if there is one."""
        with self._lock:
            self._kept.pop(uuid, None)
