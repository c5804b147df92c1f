# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command plan: print what would be done for a network, and change nothing."""

import argparse
from dataclasses import replace
from pathlib import Path

from libvirt_natns.cli import access
from libvirt_natns.cli.unhandled import UNTOUCHED
from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.facts.plan_preview import preview
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import Network
from libvirt_natns.operations.operation import describe_plan
from libvirt_natns.upstream import selection
from libvirt_natns.values import did_you_mean, quoted

UUID = "00000000-0000-0000-0000-000000000000"
BRIDGE = "virbrN"
"""Stand for the uuid and bridge that libvirt would choose for a network without."""


def run(options: argparse.Namespace) -> int:
    """Print the plan of a network, or why it is not handled."""
    network = _network_to_plan(options.network)
    network = replace(network, uuid=network.uuid or UUID)
    with access.engine(look_only=True) as engine:
        verdict = selection.verdict(network, engine.config)
        if verdict.network is None:
            print(f"network {quoted(network.name)} {UNTOUCHED}: {verdict.reason}")
            return 0
        print(describe_plan(preview(engine.planner, verdict.network)), end="")
    return 0


def _network_to_plan(named: str) -> Network:
    """Return a network by the file of its XML, else by its name."""
    file = Path(named)
    if file.is_file():
        try:
            return libvirt_xml.parse_network(file.read_bytes(), named, BRIDGE)
        except OSError as error:
            raise NatnsError(f"cannot read {named}", error.strerror or str(error)) from error
    access.require_root()
    xml = libvirt.network_xml(named)
    if xml is None:
        hint = did_you_mean(named, libvirt.networks())
        raise NatnsError(
            f"there is no file and no network {quoted(named)}{hint}", "see virsh net-list --all"
        )
    return libvirt_xml.parse_network(xml, bridge=BRIDGE)
