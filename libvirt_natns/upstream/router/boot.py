# SPDX-License-Identifier: LGPL-2.1-or-later
"""A router at a boot: it comes up as it was confirmed, or the host gets its NIC back.

No other program configures the NIC, so the host must end with a network in any case.  The
confirmed settings suffice; the configuration and the database are used where they can be
read.  A router that does not come up gives its NIC back to the host.  The addresses and
routes come from the confirmed settings, from the journal, or from the restore script.
"""

from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

from libvirt_natns import names
from libvirt_natns.errors import NatnsError, RouterError, StoreError
from libvirt_natns.kernel import netns
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.state.database import SQLError
from libvirt_natns.upstream.router import (
    confirmation,
    hardware,
    journal,
    nic_completion,
    nic_link,
    nic_restore,
    nic_snapshot,
    preflight,
    recover,
    restore_script,
)
from libvirt_natns.upstream.router.confirmation import ConfirmedRouter
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.lifecycle import NeedsOf, RouterLifecycle
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.recover import Say
from libvirt_natns.upstream.router.target import Target


def up(verbs: RouterLifecycle, name: str, say: Say) -> list[str]:
    """Make a router as it was confirmed, or repair it; returns in words what was done.

    ``say`` is called for each problem on the way.  Any failure becomes a RouterError, once
    the host has its NIC again.
    """
    kept = recover.kept(name, say)
    try:
        if kept is None:
            raise RouterError(
                f"router {name}: its confirmed settings are lost",
                f"virt-natns router up {name}",
            )
        return _up(verbs, name, kept, say)
    except Exception as error:
        ended = rescue(verbs, name, kept)
        if isinstance(error, NatnsError):
            raise RouterError(f"{error.fact}; {ended}", error.remedy) from error
        raise RouterError(
            f"router {name}: {type(error).__name__}: {error}; {ended}",
            f"virt-natns router up {name}",
        ) from error


def _up(verbs: RouterLifecycle, name: str, kept: ConfirmedRouter, say: Say) -> list[str]:
    with suppress(NatnsError):
        record = journal.load(name)
        if record is not None and record.is_whole and not record.is_overdue:
            return verbs.boot(_upstream(verbs.config, name, kept), kept.before)
    link = hardware.await_link(kept.before)
    if link is None:
        mac = kept.before.permanent or kept.before.mac
        raise RouterError(
            f"router {name}: there is no NIC {kept.nic}, and none with the MAC address {mac}",
            "see ip link",
        )
    verbs = replace(verbs, needs=_needs(verbs, say))
    had = hardware.renamed(kept.before, link)
    upstream = replace(_upstream(verbs.config, name, kept), nic=link)
    done = verbs.boot(upstream, had)
    if link != kept.nic:
        done.append(f"router {name}: NIC {kept.nic} is called {link} now")
    if kept.target is not None:
        # An earlier version may have confirmed the router, or the script is damaged.
        with suppress(OSError):
            confirmation.write_script(replace(kept.target, nic=link), had)
    return done


def _needs(verbs: RouterLifecycle, say: Say) -> NeedsOf:
    """Return the needs of a router's networks; with a broken database they need nothing."""

    def needs(target: Target) -> RouterNeeds:
        try:
            return verbs.needs(target)
        except (StoreError, SQLError) as error:
            if not errors:
                say(f"cannot read the networks of router {target.name}: {error}")
            errors.append(error)
            return RouterNeeds()

    errors: list[Exception] = []
    return needs


def _upstream(config: Config, name: str, kept: ConfirmedRouter) -> RouterUpstream:
    """Return the upstream as it was confirmed; changes of the configuration do not count."""
    upstream = config.routers.get(name)
    if upstream is None:
        upstream = RouterUpstream(name=name, nic=kept.nic)
        target = kept.target
        if target is not None:
            upstream = replace(
                upstream,
                subnet=IPv4Network(target.transit),
                subnet6=IPv6Network(target.subnet6) if target.subnet6 else None,
            )
    return replace(preflight.confirmed(upstream, kept), nic=kept.nic)


# -- the way back ------------------------------------------------------------


def rescue(verbs: RouterLifecycle, name: str, kept: ConfirmedRouter | None) -> str:
    """Give the host its NIC back; returns in words how that ended.  Raises nothing.

    A router that is up is left alone.
    """
    if _stands(name):
        return "the router is up"
    with suppress(Exception):
        _bring_back(verbs, name, kept)
    if kept is not None:
        with suppress(Exception):
            link = configure_bare(kept.before)
            if link:
                return f"{link} has its own addresses in the host"
    # The script also works for a capture of another kernel, if this kernel refuses its messages.
    said = restore_script.run(names.router_file(name, "restore"))
    if not said:
        return "the NIC has its own addresses in the host"
    return f"the NIC is left as it is ({said})"


def _stands(name: str) -> bool:
    with suppress(NatnsError, OSError):
        record = journal.load(name)
        if record is not None and record.is_whole:
            return nic_link.exists(record.target.namespace, record.target.nic)
    return False


def _bring_back(verbs: RouterLifecycle, name: str, kept: ConfirmedRouter | None) -> None:
    """Move the NIC out of a namespace that a failed step has left it in."""
    namespace = names.router_namespace(name)
    if not netns.exists(namespace):
        return
    with suppress(NatnsError, OSError):
        verbs.down(name, force=True)
    inside = hardware.find_in(namespace, kept.before) if kept and netns.exists(namespace) else None
    if inside:
        nic_link.move(inside, namespace, None)
    with suppress(NatnsError):
        verbs.kernel.host.links.delete(names.router_patch(name))


def configure_bare(kept: Capture) -> str:
    """Configure a NIC of the host that has no address from its confirmed settings.

    At a boot no other program does, and without an address no login gets in.  A port of a
    bridge or bond is left alone.  Returns the NIC's name, "" where it still has no address.
    Raises KernelError.
    """
    link = hardware.find(kept)
    if link is None:
        return ""
    with nic_link.session(None) as sock:
        listed = nic_link.find(sock, link)
    if listed is None or listed.master:
        return link
    present = nic_snapshot.capture(None, link)
    if present.is_bare:
        had = hardware.made_permanent(hardware.renamed(kept, link))
        nic_restore.put(None, nic_completion.completed(present, had))
    return "" if nic_snapshot.capture(None, link).is_bare else link
