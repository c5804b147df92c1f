# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``router up`` does, step by step; each can tell how it differs, and be taken back.

``do`` and ``undo`` converge: each can be run again after a kill in its middle, and
does nothing where nothing is to be done.  What was in the host before stands in the
journal; it is never asked of the kernel again once the first step was begun.
"""

import time
from collections.abc import Callable
from contextlib import suppress

from libvirt_natns import names
from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ConflictError, ProxyError
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.records import dataclass, replace
from libvirt_natns.upstream.router import (
    dhcp,
    downstream,
    journal,
    link_config,
    nat_rules,
    nic,
    nic_objects,
    resolv_conf,
)
from libvirt_natns.upstream.router.downstream import Needs
from libvirt_natns.upstream.router.journal import Record, Target
from libvirt_natns.upstream.router.link_config import Side
from libvirt_natns.upstream.router.nic import Capture

LINK_LOCAL_ROUTER = "fe80::1"
LINK_LOCAL_HOST = "fe80::2"
EVERYTHING = "0.0.0.0/0"
EVERYTHING6 = "::/0"
RTPROT_RA = 9
RETURN_LIMIT = 2.0
"""Seconds in which the kernel ends a namespace, and a NIC comes out of it."""

POLL = 0.02

SYSCTLS = (
    # First, for writing it resets others.
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    # The NIC keeps what the administrator chose for it.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "1"),
    # The private addresses must not be answered for on the provider's side.
    ("net/ipv4/conf/all/arp_ignore", "1"),
    ("net/ipv4/conf/all/arp_announce", "2"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
)
"""Of the router namespace, which starts with a copy of the host's."""

NIC_SETTINGS = {
    "ipv4/conf/forwarding": "1",
    "ipv4/conf/send_redirects": "0",
    "ipv6/conf/forwarding": "1",
    # What is the host's own must not become the router's, too.
    "ipv6/conf/autoconf": "0",
    "ipv6/conf/proxy_ndp": "1",
    # By default the kernel lets a neighbour wait up to 0.8 s for an answer.
    "ipv6/neigh/proxy_delay": "0",
}


@dataclass(frozen=True, slots=True)
class Work:
    """What all steps work with.  ``needs`` is what the router's networks need of it."""

    kernel: Kernel
    record: Record
    needs: Callable[[], Needs] = Needs

    @property
    def target(self) -> Target:
        return self.record.target

    @property
    def before(self) -> Capture:
        return self.record.before

    @property
    def inside(self) -> Capture:
        """The NIC as it is in the namespace."""
        return inside(self.target, self.before)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return nat_rules.rules(self.target, self.needs())


def inside(target: Target, before: Capture) -> Capture:
    """A NIC as it is in its router namespace."""
    by_ra = any(_is_by_ra(each) for each in before.routes) or any(
        each.leased for each in before.ipv6
    )
    settings = {**NIC_SETTINGS, "ipv6/conf/accept_ra": "2" if by_ra else "0"}
    found = nic.inside(before, target.addresses6, settings)
    if target.transit6:
        found = replace(
            found,
            # For ndppd, each of which would switch it off for the others when it ends.
            flags=found.flags | nic.IFF_ALLMULTI,
            addresses=(*found.addresses, *map(nic_objects.single, filter(None, [target.own6]))),
        )
    return dhcp.without_leased(found) if dhcp.current(target) else found


def _is_by_ra(route: nic_objects.Route) -> bool:
    return route.family == nic_objects.AF_INET6 and bytes.fromhex(route.body)[5] == RTPROT_RA


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that is done, and taken back; ``what`` is the text people read."""

    what: str
    differs: Callable[[Work], list[str]]
    do: Callable[[Work], None]
    undo: Callable[[Work], None]


# -- the namespace -----------------------------------------------------------


def _owner(target: Target) -> str:
    return f"router {target.name}"


def _namespace_differs(work: Work) -> list[str]:
    owner = work.kernel.namespace_owner(work.target.namespace)
    return [] if owner == _owner(work.target) else [f"namespace {work.target.namespace} is missing"]


def _make_namespace(work: Work) -> None:
    name = work.target.namespace
    if work.kernel.namespace_owner(name) == _owner(work.target):
        return
    # A client in a namespace that somebody has taken the name from keeps the NIC there.
    dhcp.end(work.target)
    # The empty file that a kill between its making and its mounting leaves, or
    # one that was not tagged yet; the checks have refused a stranger's.
    ndppd.stop_in(name)
    work.kernel.delete_namespace(name)
    work.kernel.create_namespace(name, _owner(work.target))


def _end_namespace(work: Work) -> None:
    target = work.target
    if nic.exists(target.namespace, target.nic):
        # It would go with the namespace, to wherever the kernel likes.
        raise ConflictError(
            f"{target.nic} is still in {target.namespace}", f"virt-natns router down {target.name}"
        )
    ndppd.stop_in(target.namespace)
    work.kernel.delete_namespace(target.namespace)
    journal.remove(names.router_file(target.name, "rules"))


def _settings_differ(work: Work) -> list[str]:
    if not netns.exists(work.target.namespace):
        return []
    found = work.kernel.sysctls(work.target.namespace, [key for key, _ in SYSCTLS])
    wrong = [
        f"sysctl {key} is {found[key]} in {work.target.namespace}"
        for key, value in SYSCTLS
        if found.get(key, value) != value
    ]
    return wrong + work.kernel.link_differences(work.target.namespace, "lo")


def _set_settings(work: Work) -> None:
    work.kernel.set_sysctls(work.target.namespace, SYSCTLS)
    work.kernel.set_up(work.target.namespace, "lo")


def _nothing(work: Work) -> None:
    """Ends with the namespace."""


# -- links of ours -----------------------------------------------------------


def _patch_differs(work: Work) -> list[str]:
    target = work.target
    if not netns.exists(target.namespace):
        return []
    return work.kernel.patch_differences(
        target.namespace, names.ROUTER_HOST_LINK, target.link, work.before.mtu
    )


def _make_patch(work: Work) -> None:
    target, kernel = work.target, work.kernel
    if kernel.has_patch(target.namespace, names.ROUTER_HOST_LINK, target.link):
        for where, link in ((target.namespace, names.ROUTER_HOST_LINK), (None, target.link)):
            kernel.set_mtu(where, link, work.before.mtu)
        return
    kernel.create_patch(
        target.namespace,
        names.ROUTER_HOST_LINK,
        names.mac(target.name, "router-host"),
        target.link,
        names.mac(target.name, "host-router"),
        names.altname("router", target.name),
        work.before.mtu,
    )


def _end_patch(work: Work) -> None:
    work.kernel.delete_link(work.target.link)


def _make_transit(work: Work) -> None:
    namespace, kernel = work.target.namespace, work.kernel
    if kernel.link(namespace, names.ROUTER_TRANSIT) is None:
        mac = names.mac(work.target.name, "router-transit")
        altname = f"natns-transit-{names.slug(work.target.name)}"
        kernel.create_bridge(names.ROUTER_TRANSIT, altname, mac, namespace)
    kernel.set_mtu(namespace, names.ROUTER_TRANSIT, work.before.mtu)
    link_config.ensure(downstream.transit(work.target, work.needs()))


def _transit_differs(work: Work) -> list[str]:
    return link_config.differences(downstream.transit(work.target, work.needs()))


# -- rules -------------------------------------------------------------------


def _rules_differ(work: Work) -> list[str]:
    if not netns.exists(work.target.namespace):
        return []
    return nat_rules.differences(work.target, work.rules)


def _load_rules(work: Work) -> None:
    wanted = work.rules
    if nat_rules.differences(work.target, wanted):
        nat_rules.load(work.target, wanted)


# -- the NIC -----------------------------------------------------------------


def _nic_away(work: Work) -> list[str]:
    target = work.target
    if nic.exists(target.namespace, target.nic):
        return []
    return [f"{target.nic} is not in {target.namespace}"]


def _take_nic(work: Work) -> None:
    target = work.target
    if not nic.exists(target.namespace, target.nic):
        _await_nic(target)
        nic.move(target.nic, None, target.namespace)


def _return_nic(work: Work) -> None:
    target = work.target
    with suppress(ProxyError):
        ndppd.stop_in(target.namespace)
    if nic.exists(target.namespace, target.nic):
        nic.move(target.nic, target.namespace, None, work.before.index)
    # One that was unplugged meanwhile must not keep all else from going back.
    if _await_nic(target):
        nic.put(None, work.before)


def _await_nic(target: Target) -> bool:
    """Whether the NIC is in the host, where the kernel puts it when its namespace has ended."""
    deadline = nic.clock() + RETURN_LIMIT
    while not nic.exists(None, target.nic):
        if nic.clock() >= deadline:
            return False
        time.sleep(POLL)
    return True


def _nic_differs(work: Work) -> list[str]:
    target = work.target
    if not nic.exists(target.namespace, target.nic):
        return []
    ways = downstream.gateways(target, work.before)
    found = link_config.differences(ways) if ways else []
    return nic.differences(target.namespace, nic.lasting(work.inside)) + found


def _set_nic(work: Work) -> None:
    target, wanted = work.target, work.inside
    if work.record.is_whole and nic.is_up(target.namespace, target.nic):
        # It listens to advertisements; one that was down has lost what they told.
        wanted = nic.lasting(wanted)
    nic.put(target.namespace, wanted, alone=not target.leased)
    ways = downstream.gateways(work.target, work.before)
    if ways:
        link_config.ensure(ways)


# -- the host's side ---------------------------------------------------------


def _sides(work: Work) -> tuple[Side, Side]:
    """The router's end, and the host's."""
    target = work.target
    own = target.addresses6
    quiet = (
        ("ipv6/conf/disable_ipv6", "0" if own else "1"),
        # Link-local addresses are set by hand.
        ("ipv6/conf/addr_gen_mode", "1"),
        ("ipv6/conf/accept_ra", "0"),
    )
    routers = (str(target.gateway), *([f"{LINK_LOCAL_ROUTER}/64"] if own else []))
    hosts = (
        str(target.host),
        *([f"{LINK_LOCAL_HOST}/64"] if own else []),
        *(f"{address}/128" for address in own),
    )
    return (
        Side(
            target.namespace,
            names.ROUTER_HOST_LINK,
            routers,
            tuple((f"{address}/128", LINK_LOCAL_HOST) for address in own),
            quiet,
        ),
        Side(
            None,
            target.link,
            hosts,
            (
                *_ways(work, nic_objects.AF_INET, str(target.gateway.ip)),
                *(_ways(work, nic_objects.AF_INET6, LINK_LOCAL_ROUTER) if own else ()),
            ),
            quiet,
        ),
    )


def _ways(work: Work, family: int, gateway: str) -> list[tuple[str, str]]:
    """The host's routes through the router: for everything, or what only the NIC led to.

    Where the default route leads over another link, that one stays the host's.
    """
    routes = [each for each in work.before.routes if each.family == family]
    if any(each.is_default for each in routes):
        return [(EVERYTHING if family == nic_objects.AF_INET else EVERYTHING6, gateway)]
    return [(to, gateway) for to in sorted({e.destination for e in routes if e.is_way})]


def _sides_differ(work: Work) -> list[str]:
    return [each for end in _sides(work) for each in link_config.differences(end)]


def _set_sides(work: Work) -> None:
    for end in _sides(work):
        link_config.ensure(end)


def _resolver_differs(work: Work) -> list[str]:
    named = work.target.servers
    if not named or resolv_conf.look() == resolv_conf.wanted(named, work.record.resolver):
        return []
    return [f"{resolv_conf.FILE} does not name {', '.join(named)}"]


def _set_resolver(work: Work) -> None:
    if work.target.servers:
        resolv_conf.restore(resolv_conf.wanted(work.target.servers, work.record.resolver))


def _return_resolver(work: Work) -> None:
    resolv_conf.restore(work.record.resolver)


# -- all of them -------------------------------------------------------------

STEPS = (
    Step("make the namespace", _namespace_differs, _make_namespace, _end_namespace),
    Step("set what it forwards", _settings_differ, _set_settings, _nothing),
    Step("make the patch to the host", _patch_differs, _make_patch, _end_patch),
    Step("make the transit bridge", _transit_differs, _make_transit, _nothing),
    Step("load the rules", _rules_differ, _load_rules, _nothing),
    Step("move the NIC", _nic_away, _take_nic, _return_nic),
    Step("give the NIC its addresses and routes", _nic_differs, _set_nic, _nothing),
    # Its end goes first on the way back, and with it the host's default routes.
    Step("connect the host", _sides_differ, _set_sides, _end_patch),
    Step("set the resolvers", _resolver_differs, _set_resolver, _return_resolver),
    Step(
        "keep the DHCP lease",
        lambda work: dhcp.differences(work.target, work.before),
        lambda work: dhcp.ensure(work.target, work.before),
        lambda work: dhcp.end(work.target),
    ),
)
