# SPDX-License-Identifier: LGPL-2.1-or-later
"""A router at a boot: it is made as it was confirmed, or the host has its NIC as it was.

Everything else was told to keep off the NIC, so the host must end with its network in any
case.  The settings that were confirmed suffice; the configuration and the database are used
where they can be read.  Where the router does not come up, its NIC gets its own addresses and
routes back: by what was kept, by the journal, else by the shell script that was written
where the router was confirmed.
"""

from contextlib import suppress
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterError, StoreError
from libvirt_natns.kernel import netns
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import replace
from libvirt_natns.state.database import SQLError
from libvirt_natns.upstream.router import hardware, journal, nic, preflight, recover, restore
from libvirt_natns.upstream.router.downstream import Needs
from libvirt_natns.upstream.router.journal import Kept, Record, Target
from libvirt_natns.upstream.router.lifecycle import Machine, NeedsOf
from libvirt_natns.upstream.router.nic import Capture
from libvirt_natns.upstream.router.recover import Say


def up(machine: Machine, name: str, say: Say) -> list[str]:
    """Make a router as it was confirmed, or repair it; returns what was done.

    ``say`` hears what is wrong on the way.  Raises RouterError once the host has its NIC
    again, whatever went wrong.
    """
    kept = recover.kept(name, say)
    try:
        if kept is None:
            raise RouterError(
                f"router {name}: what was confirmed of it is lost",
                f"virt-natns router up {name}",
            )
        return _up(machine, name, kept, say)
    except Exception as error:
        ended = rescue(machine, name, kept)
        if isinstance(error, NatnsError):
            raise RouterError(f"{error.fact}; {ended}", error.remedy) from error
        raise RouterError(
            f"router {name}: {type(error).__name__}: {error}; {ended}",
            f"virt-natns router up {name}",
        ) from error


def _up(machine: Machine, name: str, kept: Kept, say: Say) -> list[str]:
    with suppress(NatnsError):
        record = journal.load(name)
        if record is not None and record.is_whole and not record.is_overdue:
            return machine.boot(_upstream(machine.config, name, kept), kept.before)
    link = hardware.await_link(kept.before)
    if link is None:
        mac = kept.before.permanent or kept.before.mac
        raise RouterError(
            f"router {name}: there is no NIC {kept.nic}, and none with the MAC address {mac}",
            "ip link lists those that are there",
        )
    machine = replace(machine, needs=_needs(machine, say))
    had = hardware.renamed(kept.before, link)
    upstream = replace(_upstream(machine.config, name, kept), nic=link)
    done = machine.boot(upstream, had)
    if link != kept.nic:
        done.append(f"router {name}: the kernel names {kept.nic} {link} now")
    if kept.target is not None:
        # An earlier version may have confirmed it, or the script has been damaged.
        with suppress(OSError):
            journal.write_script(replace(kept.target, nic=link), had)
    return done


def _needs(machine: Machine, say: Say) -> NeedsOf:
    """What networks need of a router that comes up: nothing, where the database is broken."""

    def needs(target: Target) -> Needs:
        try:
            return machine.needs(target)
        except (StoreError, SQLError) as error:
            if not told:
                say(f"the networks of router {target.name} are not known: {error}")
            told.append(error)
            return Needs()

    told: list[Exception] = []
    return needs


def _upstream(config: Config, name: str, kept: Kept) -> Upstream:
    """The upstream as it was confirmed, whatever the configuration says by now."""
    found = config.upstreams.get(name)
    if found is None or found.kind != "router":
        found = Upstream(name, "router", nic=kept.nic)
        known = kept.target
        if known is not None:
            found = replace(
                found,
                subnet=IPv4Network(known.transit),
                subnet6=IPv6Network(known.subnet6) if known.subnet6 else None,
            )
    return replace(preflight.confirmed(found, kept), nic=kept.nic)


# -- the way back ------------------------------------------------------------


def rescue(machine: Machine, name: str, kept: Kept | None) -> str:
    """Have the host end with its NIC; returns in words how it ended.  Raises nothing.

    A router that stands is left alone.
    """
    if _stands(name):
        return "the router stands"
    with suppress(Exception):
        _bring_back(machine, name, kept)
    if kept is not None:
        with suppress(Exception):
            link = configure_bare(kept.before)
            if link:
                return f"{link} has its own addresses in the host"
    # Also for a NIC that another kernel's messages cannot describe.
    said = restore.run(names.router_file(name, "restore"))
    if not said:
        return "the NIC has its own addresses in the host"
    return f"the NIC is left as it is ({said})"


def _stands(name: str) -> bool:
    with suppress(NatnsError, OSError):
        record = journal.load(name)
        return record is not None and record.is_whole and _is_away(record)
    return False


def _is_away(record: Record) -> bool:
    return nic.exists(record.target.namespace, record.target.nic)


def _bring_back(machine: Machine, name: str, kept: Kept | None) -> None:
    """Move the NIC out of a namespace that a failed step has left it in."""
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return
    with suppress(NatnsError, OSError):
        machine.down(name, force=True)
    inside = hardware.find_in(namespace, kept.before) if kept and netns.exists(namespace) else None
    if inside:
        nic.move(inside, namespace, None)
    with suppress(NatnsError):
        machine.kernel.delete_link(names.router_patch(name))


def configure_bare(kept: Capture) -> str:
    """Give a NIC of the host what was kept of it, where it is there, single and has no address.

    At a boot no other program does, and without it no login gets in.  Returns the NIC's name, ""
    where it has no address all the same.  Raises KernelError.
    """
    link = hardware.find(kept)
    if link is None:
        return ""
    with nic.session(None) as opened:
        found = nic.find(opened, link)
    if found is None or found.number(nic.IFLA_MASTER):
        return link
    present = nic.capture(None, link)
    if present.is_bare:
        had = hardware.lasting(hardware.renamed(kept, link))
        nic.put(None, nic.completed(present, had))
    return "" if nic.capture(None, link).is_bare else link
