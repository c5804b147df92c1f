# SPDX-License-Identifier: LGPL-2.1-or-later
"""All verbs of networks as one object, for callers that are handed an engine.

Each verb converges on the needs of the recorded network, and can be called again at any
time.  A verb that fails takes its own work back.  It makes no difference whether a hook,
the service or a person calls, and libvirt is never called: a hook would deadlock.
"""

from libvirt_natns.engine import down as down_verbs
from libvirt_natns.engine import refresh_forwards as refresh_verb
from libvirt_natns.engine import relocate as relocate_verbs
from libvirt_natns.engine import shared_host, start
from libvirt_natns.engine import up as up_verbs
from libvirt_natns.engine.context import Context


class Engine(Context):
    """The context, with each verb as a method."""

    __slots__ = ()

    prepare = start.prepare
    build = start.build
    give_up = start.give_up
    end_given_up = start.end_given_up

    up = up_verbs.up
    repair = up_verbs.repair
    repair_unless_changed = up_verbs.repair_unless_changed
    refresh = up_verbs.refresh
    follow_lease = up_verbs.follow_lease
    refresh_forwards = refresh_verb.refresh_forwards

    relocate = relocate_verbs.relocate
    defend = relocate_verbs.defend
    look_elsewhere = relocate_verbs.look_elsewhere

    down = down_verbs.down
    hand_back = down_verbs.hand_back

    ensure_host = shared_host.ensure
