# SPDX-License-Identifier: LGPL-2.1-or-later
"""All verbs of guests as one object, for callers that have an engine."""

from libvirt_natns.engine.guests import converge, default_routes, effects, verbs
from libvirt_natns.engine.guests.guest_context import GuestContext


class Guests(GuestContext):
    """The context, with each verb as a method."""

    __slots__ = ()

    claim = verbs.claim
    publish = verbs.publish
    withdraw = verbs.withdraw
    forget = verbs.forget
    plug = verbs.plug
    unplug = verbs.unplug
    refresh = verbs.refresh
    rejoin = verbs.rejoin
    follow_move = verbs.follow_move

    reroute = default_routes.reroute

    trial = converge.trial
    differences = converge.differences
    end = converge.end
    tidy = converge.tidy
    follow = converge.follow
    converge = converge.converge

    cut_since = effects.cut_since
