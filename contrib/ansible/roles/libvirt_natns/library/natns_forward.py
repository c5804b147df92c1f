#!/usr/bin/python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ansible module: one published port of a guest's, in its metadata.

Runs with the machine's own interpreter, which has libvirt_natns: what a forward
says is read, and compared, by the very code that ``virt-natns forward`` uses.
"""

import subprocess
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: natns_forward
short_description: Publish a port of a libvirt guest with libvirt-natns
description:
  - Adds a forward to a guest's metadata, or removes it. A running guest has the forward at once.
  - A different forward on the same listening ports is replaced.
options:
  guest:
    description: The guest's name or uuid.
    type: str
    required: true
  forward:
    description: "[ADDRESS:]PORT[-PORT][:PORT[-PORT]][/tcp|udp|sctp] or auto:PORT"
    type: str
    required: true
  source:
    description: The clients that may connect.
    type: str
  network:
    description: The NIC in this network.
    type: str
  mac:
    description: The NIC with this MAC address.
    type: str
  guest_address:
    description: The guest's address, where DHCP does not give it.
    type: str
  state:
    description: Whether the forward should exist.
    type: str
    choices: [present, absent]
    default: present
author: the libvirt-natns authors
"""

EXAMPLES = """
- natns_forward:
    guest: web
    forward: "8080:80"
"""

PROGRAM = "virt-natns"
VIRSH = ("virsh", "-q", "-c", "qemu:///system")
EMPTY = b"<domain><name>x</name><metadata/></domain>"

ARGUMENTS = {
    "guest": {"type": "str", "required": True},
    "forward": {"type": "str", "required": True},
    "source": {"type": "str"},
    "network": {"type": "str"},
    "mac": {"type": "str"},
    "guest_address": {"type": "str"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}
OPTIONS = {
    "source": "--source",
    "network": "--network",
    "mac": "--mac",
    "guest_address": "--guest-address",
}


class Refused(Exception):
    """The forward cannot be published or removed; the message is one line."""


def run(*command: str) -> str:
    """Return the output of a command. Raises Refused."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Refused((done.stderr or done.stdout).strip())
    return done.stdout


def published(xml: bytes) -> dict[Any, Any]:
    """Return the forwards of a domain's metadata by their listening side."""
    from libvirt_natns.documents import libvirt_xml

    nat = libvirt_xml.parse_domain(xml).nat
    found = {}
    for forward in nat.forwards if nat else ():
        for ports in forward.ranges:
            listens = (ports.to if ports.auto else (ports.start, ports.end), ports.exclude)
            # The same port may listen in several of the guest's networks.
            nic = (forward.network, forward.mac)
            key = (forward.proto, forward.address, *nic, ports.auto, listens)
            rest = (forward.guest_address, forward.sources)
            found[key] = (ports.to, ports.onto_one, *rest)
    return found


def wanted(parameters: dict[str, Any]) -> dict[Any, Any]:
    """Return the forward that the task asks for, by its listening side."""
    from libvirt_natns.cli import forward_edit, forward_spec
    from libvirt_natns.documents import domain_edit

    try:
        spec = forward_spec.parse_new(parameters["forward"])
    except ValueError as error:
        raise Refused(str(error)) from error
    options = forward_edit.Options(
        parameters["network"],
        parameters["mac"],
        parameters["source"],
        parameters["guest_address"],
    )
    nics = b""
    if parameters["mac"]:
        # Metadata may name only NICs that the guest has.
        nics = b"<devices><interface type='bridge'><mac address='%s'/></interface></devices>"
        nics %= parameters["mac"].encode()
    empty = EMPTY.replace(b"<metadata/>", b"<metadata/>" + nics)
    edited = domain_edit.edit_nat(empty, lambda nat: forward_edit.add(nat, spec, options))
    return published(edited.document)


def documents(guest: str) -> list[bytes]:
    """Return the guest's definition and its running XML, as far as they exist."""
    found = []
    for which in ((), ("--inactive",)):
        try:
            found.append(run(*VIRSH, "dumpxml", *which, guest).encode())
        except Refused:
            if not which:
                raise
    return found


def listening(parameters: dict[str, Any]) -> str:
    """Return the forward as ``forward remove`` takes it."""
    from libvirt_natns.cli import forward_spec

    spec = forward_spec.parse_new(parameters["forward"])
    proto, _, rest = str(spec).partition(" ")
    return f"{rest}/{proto}"


def converge(parameters: dict[str, Any], check: bool) -> bool:
    """Bring the guest's metadata to the wanted state.  Return True for a change, made or due."""
    asked = wanted(parameters)
    ((where, what),) = asked.items()
    held = [published(each).get(where) for each in documents(parameters["guest"])]
    present = parameters["state"] == "present"
    if all(each == (what if present else None) for each in held):
        return False
    if check:
        return True
    if any(each is not None and (each != what or not present) for each in held):
        run(PROGRAM, "forward", "remove", parameters["guest"], listening(parameters))
    if present:
        options = [
            word
            for name, option in OPTIONS.items()
            if parameters[name]
            for word in (option, parameters[name])
        ]
        run(PROGRAM, "forward", "add", *options, parameters["guest"], parameters["forward"])
    return True


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENTS, supports_check_mode=True)
    try:
        module.exit_json(changed=converge(module.params, module.check_mode))
    except (Refused, OSError, ImportError, ValueError) as error:
        module.fail_json(msg=str(error))
    except Exception as error:
        # The package's own errors: one line each.
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
