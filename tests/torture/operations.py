# SPDX-License-Identifier: LGPL-2.1-or-later
"""What users do with networks and guests, each with the outcome that it must have.

An operation finds its slot in any state: "start" of a network that runs destroys
it.  It raises WrongError where libvirt, or a hook of ours, decides otherwise than
the model.
"""

import time
from collections.abc import Callable
from threading import Thread

import libvirt
from lab import FastGuest
from lab_domains import asked, nic
from model import MOST_RUNNING, PILLARS, Choice, Net
from views import upstream_address
from world import RefusedError, World

from libvirt_natns.state.networks import START_LIMIT

NAMESPACE = "urn:libvirt-natns:1"


class WrongError(Exception):
    """Something is not as the model says."""


Operation = Callable[[World, Choice], bool]
"""Carries a choice out; returns whether it was a fault, which has to be repaired first."""


# -- networks ------------------------------------------------------------------


def start(world: World, choice: Choice) -> bool:
    """Define and start a network, or destroy it where it runs."""
    net = world.model.nets[choice.slot]
    if world.is_active(net):
        end(world, net)
    elif len(world.active()) >= MOST_RUNNING:
        end(world, crowd(world)[choice.variant % len(crowd(world))])
    else:
        begin(world, net)
    return False


def begin(world: World, net: Net) -> None:
    """Start a network, defined or not, which must do."""
    if not world.is_defined(net):
        world.define(net)
    world.start(net)


def end(world: World, net: Net) -> None:
    world.destroy(net)


def crowd(world: World) -> list[Net]:
    """The networks that run and may be destroyed."""
    return [net for net in world.active() if not net.is_pillar]


def cycle(world: World, choice: Choice) -> bool:
    """Destroy a network that runs, and start it at once."""
    if running := crowd(world):
        net = running[choice.variant % len(running)]
        world.destroy(net)
        begin(world, net)
    return False


def undefine(world: World, choice: Choice) -> bool:
    """Destroy and undefine a network; its guests go on running."""
    net = world.model.nets[choice.slot]
    if world.is_active(net):
        world.destroy(net)
    if world.is_defined(net):
        world.undefine(net)
    return False


def transient(world: World, choice: Choice) -> bool:
    """Create a network without defining it."""
    undefine(world, choice)
    if len(world.active()) < MOST_RUNNING:
        world.create_network(world.model.nets[choice.slot].xml())
    return False


def rename(world: World, choice: Choice) -> bool:
    """Define a network anew under another name, with its uuid.

    Not under a guest that runs: its NIC names a network that is nobody's then, and
    `check` says so for good.
    """
    net = world.model.nets[choice.slot]
    if any(f"<source network='{net.name}'" in xml for xml in world.active_guests().values()):
        return False
    undefine(world, choice)
    net.name = f"net{net.slot}" if net.name.endswith("x") else f"net{net.slot}x"
    if len(world.active()) < MOST_RUNNING:
        begin(world, net)
    return False


def update(world: World, choice: Choice) -> bool:
    """Add a DHCP host to a network that runs, or remove it."""
    running = [net for net in crowd(world) if net.kind in ("stock", "forwards", "host upstream")]
    if not running:
        return False
    net = running[choice.variant % len(running)]
    number = choice.variant % 8
    xml = f"<host mac='52:54:00:00:03:{number:02x}' ip='{net.subnet}.{60 + number}'/>"
    flags = libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
    section = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST
    live = world.ask(lambda c: c.networkLookupByUUIDString(net.uuid).XMLDesc(0))
    present = f"52:54:00:00:03:{number:02x}" in live
    command = (
        libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE
        if present
        else libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST
    )
    world.ask(
        lambda c: c.networkLookupByUUIDString(net.uuid).update(command, section, -1, xml, flags)
    )
    return False


def disable(world: World, choice: Choice) -> bool:
    """Define a network anew as one that is not ours, or as ours again."""
    net = world.model.nets[choice.slot]
    # Which address a host has and which twin may run beside it is libvirt's business then.
    if net.kind != "own subnet":
        return False
    if world.is_active(net):
        world.destroy(net)
    net.disabled = not net.disabled
    world.define(net)
    world.start(net)
    return False


def together(world: World, choice: Choice) -> bool:
    """Start three networks at once."""
    rest = [net for net in world.model.nets[3:] if not world.is_active(net)]
    nets = [rest[(choice.variant + number * 5) % len(rest)] for number in range(3)]
    nets = list(dict.fromkeys(nets))
    for net in crowd(world)[: max(0, len(world.active()) + len(nets) - MOST_RUNNING)]:
        world.destroy(net)
    refused: list[str] = []

    def one(net: Net) -> None:
        began = time.monotonic()
        try:
            begin(world, net)
        except RefusedError as error:
            if time.monotonic() - began < START_LIMIT:
                refused.append(f"{net.name}: {error}")
                return
            # It has waited for its turn for as long as it may: the machine is too busy.
            _begin_again(world, net, refused)

    threads = [Thread(target=one, args=(net,)) for net in nets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        raise WrongError(f"refused: {refused}")
    return False


def _begin_again(world: World, net: Net, refused: list[str]) -> None:
    time.sleep(START_LIMIT)
    try:
        begin(world, net)
    except RefusedError as error:
        refused.append(f"{net.name}, for the second time: {error}")


def give_up(world: World, choice: Choice) -> bool:
    """Start a network that libvirt itself refuses, past our `start`."""
    net = world.model.nets[choice.slot]
    if net.kind == "metadata address" or net.disabled:
        return False
    undefine(world, choice)
    broken = f'<ip address="10.66.{net.slot}.1" netmask="255.255.255.0"><tftp root="/none"/></ip>'
    world.define(net, more=broken)
    try:
        world.start(net)
    except RefusedError as error:
        if "libvirt-natns" in str(error):
            raise WrongError(f"refused by us: {error}") from error
    else:
        raise WrongError(f"{net.name} was started without its TFTP root")
    world.undefine(net)
    if not world.resident:
        # Without the service the next event of a network of ours removes what is left.
        nets = world.model.nets[choice.other :] + world.model.nets[PILLARS:]
        other = next(each for each in nets if not each.disabled and each is not net)
        if world.is_active(other):
            world.destroy(other)
        begin(world, other)
        world.destroy(other)
    return False


def refuse(world: World, choice: Choice) -> bool:
    """Start a network that our `start` refuses."""
    undefine(world, choice)
    net = world.model.nets[choice.slot]
    world.define(net, instead='<natns:upstream name="none"/>')
    try:
        world.start(net)
    except RefusedError as error:
        if "libvirt-natns" not in str(error):
            raise WrongError(f"refused, but not by us: {error}") from error
    else:
        raise WrongError(f"{net.name} was started on an upstream that is none")
    world.undefine(net)
    return False


# -- guests --------------------------------------------------------------------


def network_for(world: World, choice: Choice) -> Net:
    """A network of ours that runs and can serve a guest."""
    nets = [net for net in world.active() if not net.disabled and net.kind != "no DHCP"]
    return nets[choice.variant % len(nets)]


def guest(world: World, choice: Choice) -> bool:
    """Start a guest that publishes a port, or destroy it where it runs."""
    one = world.model.guests[choice.guest]
    if one.name in world.active_guests():
        world.ask(lambda c: c.lookupByName(one.name).destroy())
        return False
    net = network_for(world, choice)
    world.ask(lambda c: c.createXML(one.xml(net.name), libvirt.VIR_DOMAIN_START_PAUSED))
    return False


def failing_guest(world: World, choice: Choice) -> bool:
    """Start a guest that libvirt gives up after our `prepare`."""
    one = world.model.guests[choice.guest]
    if one.name in world.active_guests():
        world.ask(lambda c: c.lookupByName(one.name).destroy())
    xml = one.xml(network_for(world, choice).name, broken=True)
    try:
        world.ask(lambda c: c.createXML(xml, libvirt.VIR_DOMAIN_START_PAUSED))
    except RefusedError as error:
        if "libvirt-natns" in str(error):
            raise WrongError(f"refused by us: {error}") from error
        return False
    raise WrongError(f"{one.name} was started without its log")


def metadata(world: World, choice: Choice) -> bool:
    """Have a running guest publish another port; without the service that takes a sync."""
    one = world.model.guests[choice.guest]
    if one.name not in world.active_guests():
        return False
    one.moved = not one.moved
    # libvirt adds the namespace and its prefix.
    element = f"<nat>{one.published}</nat>".replace("natns:", "")
    kind, live = libvirt.VIR_DOMAIN_METADATA_ELEMENT, libvirt.VIR_DOMAIN_AFFECT_LIVE
    world.ask(
        lambda c: c.lookupByName(one.name).setMetadata(kind, element, "natns", NAMESPACE, live)
    )
    return not world.resident


def plug(world: World, choice: Choice) -> bool:
    """Plug a second NIC into a running guest; to take it out takes a system in the guest."""
    one = world.model.guests[choice.guest]
    xml = world.active_guests().get(one.name)
    if xml is None or one.second_mac in xml:
        return False
    net = network_for(world, choice)
    world.ask(lambda c: c.lookupByName(one.name).attachDevice(nic(net.name, one.second_mac)))
    return False


# -- traffic -------------------------------------------------------------------


def reach(world: World, choice: Choice) -> bool:
    """A guest in a network that runs gets out, and is reached by what it publishes."""
    nets = [net for net in crowd(world) if not net.disabled]
    if not nets:
        return False
    net = nets[choice.variant % len(nets)]
    with FastGuest(net.bridge, name="passer") as passer:
        passer.static(f"{net.subnet}.50/24", f"{net.subnet}.1")
        # One echo, which must not be lost; on a busy machine it may be late.
        if not passer.ping(world.provider.gateway, timeout=10):
            raise WrongError(f"no way out of {net.name}")
        if net.kind == "forwards":
            passer.serve("tcp", 80)
            if asked("upstream", "tcp", upstream_address(net.name), 7000 + net.slot) is None:
                raise WrongError(f"no way in to {net.name}")
    return False


OPERATIONS: dict[str, tuple[Operation, int]] = {
    "start": (start, 30),
    "cycle": (cycle, 8),
    "undefine": (undefine, 5),
    "transient": (transient, 5),
    "rename": (rename, 4),
    "update": (update, 6),
    "disable": (disable, 2),
    "together": (together, 4),
    "give_up": (give_up, 5),
    "refuse": (refuse, 3),
    "guest": (guest, 12),
    "failing_guest": (failing_guest, 3),
    "metadata": (metadata, 5),
    "plug": (plug, 5),
    "reach": (reach, 4),
}
