# SPDX-License-Identifier: LGPL-2.1-or-later
"""The answer to a request of the look server: a listed command, run as root in a fork."""

import os
import sys

from libvirt_natns.cli import commands, look_rules
from libvirt_natns.cli.look_link import LookRequest
from libvirt_natns.cli.look_rules import Peer

NICE = 5
"""Commands of members give way to the server and to root's, as the server does to hooks."""

REFUSAL = "only root can do this: use sudo"


def answer(request: LookRequest, peer: Peer) -> int:
    """Run the command of a request, and return its exit status: the body of a job."""
    if not peer.is_root:
        os.nice(NICE)
    parser = commands.make_parser()
    options = parser.parse_args(list(request.words))
    if look_rules.refused(request.words, options, parser):
        print(f"virt-natns: {REFUSAL}", file=sys.stderr)
        return 1
    # No file of the machine is read for a member, only the XML that came with the request.
    options.document = request.document
    return commands.carry_out(options)
