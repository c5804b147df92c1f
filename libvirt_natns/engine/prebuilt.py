# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a resident process has made of networks ahead of libvirt's `started`."""

from threading import Lock

from libvirt_natns.engine.operations.operation import Plan


class Built:
    """What was carried out for starts that go on; for all threads of a process.

    A start is told from another one of the same network by when it began, as
    the network's record has it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Plan]] = {}
        self._lock = Lock()

    def keep(self, uuid: str, since: float, plan: Plan) -> None:
        """Note what was carried out for a start."""
        with self._lock:
            self._kept[uuid] = (since, plan)

    def take(self, uuid: str, since: float) -> Plan:
        """What was carried out for this very start, once; nothing for any other."""
        with self._lock:
            began, plan = self._kept.pop(uuid, (since, ()))
        return plan if began == since else ()

    def drop(self, uuid: str) -> None:
        """Forget a network's start, if there is one."""
        with self._lock:
            self._kept.pop(uuid, None)
