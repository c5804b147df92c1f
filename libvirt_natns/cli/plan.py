# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command plan: print what would be done for a network, and change nothing."""

import argparse
from dataclasses import replace
from pathlib import Path

from libvirt_natns.cli import access, json_text
from libvirt_natns.cli.libvirt_view import BRIDGE
from libvirt_natns.cli.unhandled import UNTOUCHED
from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.engine.facts.plan_preview import preview
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.network import LibvirtNetwork, Network
from libvirt_natns.operations.operation import describe_plan
from libvirt_natns.upstream import selection
from libvirt_natns.upstream.selection import Verdict
from libvirt_natns.values import did_you_mean, quoted

UUID = "00000000-0000-0000-0000-000000000000"
"""Stands for the uuid that libvirt would choose for a network without."""


def run(options: argparse.Namespace) -> int:
    """Print the plan of a network, or why it is not handled."""
    network = _network_to_plan(options.network, options.document)
    network = replace(network, uuid=network.uuid or UUID)
    with access.engine(look_only=True) as engine:
        verdict = selection.verdict(network, engine.config)
        steps = preview(engine.planner, verdict.network) if verdict.network else ()
        lines = describe_plan(steps) if verdict.network else ""
    if options.json:
        print(_as_json(network, verdict, lines.splitlines()))
    elif verdict.handled:
        print(lines, end="")
    else:
        print(f"network {quoted(network.name)} {UNTOUCHED}: {verdict.reason}")
    return 0


def _as_json(network: LibvirtNetwork, verdict: Verdict, steps: list[str]) -> str:
    """Return the plan for programs."""
    return json_text.dumped(
        {
            "network": network.name,
            "handled": verdict.handled,
            "reason": verdict.reason,
            "steps": steps,
        }
    )


def read_file(named: str) -> bytes | None:
    """Return the content of a file; None where there is no such file.  Raises NatnsError."""
    file = Path(named)
    if not file.is_file():
        return None
    try:
        return file.read_bytes()
    except OSError as error:
        raise NatnsError(f"cannot read {named}", error.strerror or str(error)) from error


def _network_to_plan(named: str, document: bytes | None) -> Network:
    """Return a network by its XML, or that of the file ``named``, else by its name.

    An empty ``document`` stands for no file.
    """
    xml = read_file(named) if document is None else document or None
    if xml is not None:
        return libvirt_xml.parse_network(xml, named, BRIDGE)
    access.require_root()
    xml = libvirt.network_xml(named)
    if xml is None:
        hint = did_you_mean(named, libvirt.networks())
        raise NatnsError(
            f"there is no file and no network {quoted(named)}{hint}", "see virsh net-list --all"
        )
    return libvirt_xml.parse_network(xml, bridge=BRIDGE)
