# SPDX-License-Identifier: LGPL-2.1-or-later
"""Networks behind a transit bridge with flows that conntrack's helpers follow.

The host, or a router, translates a network's flows once more.  So the helpers that a network
has in its namespace must follow the same flows there.
"""

from collections.abc import Callable
from contextlib import suppress

from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import DocumentError
from libvirt_natns.firewall import helper_trial
from libvirt_natns.firewall.host_policy import Followed
from libvirt_natns.model.upstream import AnyUpstream, Helper
from libvirt_natns.state.host_records import User
from libvirt_natns.state.leases import Leased
from libvirt_natns.upstream import selection


def of_user(
    user: User, upstream: AnyUpstream, bridge: str, leased: Leased, backend: Callable[[], str]
) -> tuple[Followed, ...]:
    """Return a network's transit addresses with its helpers; none for a network without any.

    ``backend`` names the firewall's backend.  Helpers that the kernel lacks are left out: they
    would stop the rules of all networks, if the configuration names them while networks run.
    """
    helpers = _helpers(user, upstream)
    helpers = helper_trial.present(helpers, backend()) if helpers else ()
    return tuple(Followed(bridge, each, helpers) for each in leased.addresses if helpers)


def _helpers(user: User, upstream: AnyUpstream) -> tuple[Helper, ...]:
    with suppress(DocumentError):
        if user.document:
            return selection.helpers(libvirt_xml.parse_network(user.document), upstream)
    return upstream.helpers
