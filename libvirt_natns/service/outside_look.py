# SPDX-License-Identifier: LGPL-2.1-or-later
"""The look for stations outside that have a guest's address in a provider's IPv6 prefix.

The look is repeated while a network has an ndppd.  An error of one network keeps no
other network from its look.
"""

from collections.abc import Callable
from typing import Protocol

from libvirt_natns.documents import config
from libvirt_natns.engine import proxied_addresses
from libvirt_natns.engine.factory import Sessions
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.complaints import Complaints
from libvirt_natns.service.log import Log

WHEN = "looking for addresses outside"


class TellError(Protocol):
    """Reports an error, with the work that it came from."""

    def __call__(self, error: Exception, when: str, network: str | None = None) -> None: ...


class OutsideLook:
    """Looks at all networks with an ndppd, at the caller's times.

    An error is told to ``report`` once, and its network to ``suspect``.
    """

    def __init__(
        self, sessions: Sessions, log: Log, report: TellError, suspect: Callable[[str], None]
    ) -> None:
        self._sessions = sessions
        self._log = log
        self._report = report
        self._suspect = suspect
        self._asked = proxied_addresses.Asked()
        self._complaints = Complaints()

    def look(self) -> bool:
        """Stop answering outside for addresses that stations have there.

        True if there is a network with an ndppd.
        """
        uuids = proxied_addresses.networks()
        try:
            settings = config.load() if uuids else Config()
        except Exception as error:  # it belongs to no network, so none is suspected
            if self._complaints.is_news("configuration", error):
                self._report(error, WHEN)
            return True
        self._complaints.end("configuration")
        for uuid in uuids:
            try:
                self._look_at(uuid, settings)
            except Exception as error:  # the other networks are looked at in any case
                if self._complaints.is_news(uuid, error):
                    self._report(error, WHEN, uuid)
                    self._suspect(uuid)
            else:
                self._complaints.end(uuid)
        return bool(uuids)

    def _look_at(self, uuid: str, settings: Config) -> None:
        with self._sessions.engine(settings) as engine:
            record = engine.store.networks.get(uuid)
            changed = engine.look_elsewhere(uuid, self._asked)
        if changed and record:
            self._log.say("warning", "claimed", network=record.name, changed="; ".join(changed))
