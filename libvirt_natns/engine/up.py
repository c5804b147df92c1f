# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verb up refuses a repair of a network that is not up, or not as it was recorded."""

from libvirt_natns.errors import NatnsError


class NotUpError(NatnsError):
    """A network went down before it could be repaired."""


class RecordChangedError(NatnsError):
    """A network's record was replaced before the network could be repaired: read it anew."""
