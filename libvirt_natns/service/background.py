# SPDX-License-Identifier: LGPL-2.1-or-later
"""Work of a resident process that nobody waits for: soon, or after a while."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread

from libvirt_natns.service.agenda import Agenda

Work = Callable[[], None]

WORKERS = 8
"""Most of the work is waiting: for an answer, or for a dnsmasq that starts."""


class Background:
    """Runs work in threads of its own; what fails there is told to ``failed``."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self._failed = failed
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="background")
        self._agenda: Agenda[Work] = Agenda()
        self._clock = Thread(target=self._watch_clock, name="background-clock", daemon=True)

    def start(self) -> None:
        self._clock.start()

    def stop(self) -> None:
        """Finish what was to be done soon; what was to be done later is left to others."""
        self._agenda.close()
        self._clock.join()
        self._pool.shutdown()

    def soon(self, work: Work) -> None:
        """Do something as soon as there is a thread for it."""
        self._pool.submit(self._do, work)

    def after(self, seconds: float, work: Work) -> None:
        """Do something later, unless the process ends before."""
        self._agenda.put(work, seconds)

    def _watch_clock(self) -> None:
        while (work := self._agenda.take()) is not None:
            self._agenda.done(work)
            self.soon(work)

    def _do(self, work: Work) -> None:
        try:
            work()
        except Exception as error:  # one failure must not end the thread, nor go unheard
            self._failed(error)
