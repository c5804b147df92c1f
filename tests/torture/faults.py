# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kills at random moments, and damage from behind.

After a kill the model follows libvirt: whether a start that was cut short has come
to its end is libvirt's word, and all of ours must agree with it.
"""

import signal
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

from lab import LabError, run, wait_for
from model import Choice, Net
from operations import OPERATIONS, Operation, WrongError, crowd
from world import LIMIT, RefusedError, World

from libvirt_natns import names
from libvirt_natns.daemons import dnsmasq

INTERRUPTED = ("start", "cycle", "guest", "start", "transient", "plug")
"""Operations in the midst of which somebody is killed."""

HOOKS = "/etc/libvirt/hooks/"


def _meanwhile(world: World, choice: Choice) -> Thread:
    """Begin an operation, and wait for the moment of the kill."""
    operation, _ = OPERATIONS[INTERRUPTED[choice.variant % len(INTERRUPTED)]]

    def work() -> None:
        # Whether it is refused depends on the moment.
        with suppress(RefusedError, WrongError, LabError):
            operation(world, choice)

    thread = Thread(target=work, daemon=True)
    thread.start()
    time.sleep(choice.delay)
    return thread


def _join(thread: Thread) -> None:
    thread.join(90)
    if thread.is_alive():
        raise WrongError("libvirt does not come to an end")


# -- kills ---------------------------------------------------------------------


def kill_service(world: World, choice: Choice) -> bool:
    """Kill the service; systemd would start it again at once."""
    if world.service is None:
        return False
    thread = _meanwhile(world, choice)
    if choice.variant % 3:
        world.service.kill()
    else:
        world.service.signal(signal.SIGTERM)
        wait_for(lambda: world.service and not world.service.runs, timeout=LIMIT)
    time.sleep(choice.delay / 2)
    world.restart_service()
    _join(thread)
    return True


def kill_hook(world: World, choice: Choice) -> bool:
    """Kill the hooks that run at a moment."""
    thread = _meanwhile(world, choice)
    for pid in world.processes(HOOKS):
        world.kill(pid)
    _join(thread)
    return True


def kill_libvirtd(world: World, choice: Choice) -> bool:
    """Kill libvirtd and start it again.

    Where that cuts the start of a network short, libvirt forgets the bridge it has made.
    The bridge of a network that is not ours is the administrator's to delete.
    """
    thread = _meanwhile(world, choice)
    if (pid := world.libvirtd.pid) is not None:
        world.kill(pid)
        wait_for(lambda: not Path(f"/proc/{pid}").exists(), timeout=LIMIT)
    # A hook may outlive it.
    _join(thread)
    wait_for(lambda: not world.processes(HOOKS), timeout=90, what="the hooks' end")
    world.reconnect()
    active = world.active()
    for net in world.model.nets:
        if net.disabled and net not in active:
            run("ip", "link", "delete", net.bridge, check=False)
    return True


def reload_libvirtd(world: World, choice: Choice) -> bool:
    """Have libvirtd read its configuration again, which restarts its dnsmasq."""
    if (pid := world.libvirtd.pid) is not None:
        import os

        os.kill(pid, signal.SIGHUP)
    return True


def kill_dnsmasq(world: World, choice: Choice) -> bool:
    """Kill the dnsmasq of a network of ours."""
    net = _target(world, choice)
    pid = dnsmasq.running(net.uuid, net.namespace) if net else None
    if pid is not None:
        world.kill(pid)
    return True


# -- damage --------------------------------------------------------------------

DAMAGE = (
    "ip -n {ns} route del default",
    "ip link del {private}",
    "ip link del {upstream}",
    "ip netns exec {ns} nft flush ruleset; ip netns exec {ns} iptables -t nat -F",
    "ip netns exec {ns} sysctl -qw net.ipv4.ip_forward=0",
    "ip address add {subnet}.1/24 dev {bridge}",
    "ip netns del {ns}",
    "ip -n {ns} link set upstream down",
    "ip -n {ns} address flush dev {bridge}",
    # The last: the kernel tells the service nothing of files.
    "rm -rf /run/libvirt-natns/networks/{uuid}",
)


def _target(world: World, choice: Choice) -> Net | None:
    """A network to damage; a pillar's stream may break then."""
    nets = [net for net in world.active() if not net.disabled]
    net = nets[choice.slot % len(nets)] if nets else None
    if net is not None and net.is_pillar:
        world.excused.add(net.name)
    return net


def damage(world: World, choice: Choice) -> bool:
    """Break something of a network that runs."""
    net = _target(world, choice)
    if net is None:
        return False
    known = DAMAGE[:-1] if world.resident else DAMAGE
    command = known[choice.variant % len(known)].format(
        ns=net.namespace,
        private=names.private_patch(net.uuid),
        upstream=names.upstream_patch(net.uuid),
        subnet=net.subnet,
        bridge=net.bridge,
        uuid=net.uuid,
    )
    run("sh", "-c", command, check=False)
    return True


def damage_host(world: World, choice: Choice) -> bool:
    """Break what the networks share in the host."""
    if any(net.kind == "host upstream" for net in crowd(world)) and world.may_damage_host():
        commands = ("ip link set natns-host down", "ip address flush dev natns-host")
        run("sh", "-c", commands[choice.variant % len(commands)], check=False)
        return True
    return False


FAULTS: dict[str, tuple[Operation, int]] = {
    "kill_service": (kill_service, 4),
    "kill_hook": (kill_hook, 5),
    "kill_libvirtd": (kill_libvirtd, 2),
    "reload_libvirtd": (reload_libvirtd, 1),
    "kill_dnsmasq": (kill_dnsmasq, 4),
    "damage": (damage, 8),
    "damage_host": (damage_host, 1),
}
