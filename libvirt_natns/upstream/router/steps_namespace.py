# SPDX-License-Identifier: LGPL-2.1-or-later
"""Steps for the router namespace: its settings, links of ours, and firewall rules."""

from libvirt_natns import names
from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel import netns
from libvirt_natns.upstream.router import (
    downstream,
    link_config,
    nat_rules,
    nic_lease,
    nic_link,
    router_files,
)
from libvirt_natns.upstream.router.step_context import Step, StepContext, keep
from libvirt_natns.upstream.router.target import Target

SYSCTLS = (
    # The kernel resets other settings where this one is written, so it comes first.
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv6/conf/default/forwarding", "1"),
    ("net/ipv6/conf/all/disable_ipv6", "0"),
    ("net/ipv6/conf/default/disable_ipv6", "0"),
    ("net/ipv6/conf/default/accept_ra", "0"),
    # The NIC keeps the value that the administrator chose for it.
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "1"),
    # The provider's side must get no answer for the private addresses.
    ("net/ipv4/conf/all/arp_ignore", "1"),
    ("net/ipv4/conf/all/arp_announce", "2"),
    ("net/ipv4/conf/all/accept_redirects", "0"),
    ("net/ipv4/conf/all/send_redirects", "0"),
    ("net/ipv4/conf/default/send_redirects", "0"),
    ("net/ipv4/conf/all/accept_source_route", "0"),
)
"""Settings of the router namespace, which starts with a copy of the host's."""


# -- the namespace -----------------------------------------------------------


def _owner(target: Target) -> str:
    return f"router {target.name}"


def _namespace_differs(context: StepContext) -> list[str]:
    target = context.target
    owner = context.kernel.namespace_owner(target.namespace)
    return [] if owner == _owner(target) else [f"namespace {target.namespace} is missing"]


def _make_namespace(context: StepContext) -> None:
    name = context.target.namespace
    if context.kernel.namespace_owner(name) == _owner(context.target):
        return
    # A DHCP client in a namespace without a name keeps the NIC there.
    nic_lease.end(context.target)
    # A kill may have left the empty mount point, or a namespace that was not tagged
    # yet; the preflight has refused a namespace of another program.
    ndppd.stop_in(name)
    context.kernel.delete_namespace(name)
    context.kernel.create_namespace(name, _owner(context.target))


def _end_namespace(context: StepContext) -> None:
    target = context.target
    if nic_link.exists(target.namespace, target.nic):
        # The kernel would move the NIC to the initial namespace, which need not be the host.
        raise ConflictError(
            f"{target.nic} is still in {target.namespace}", f"virt-natns router down {target.name}"
        )
    ndppd.stop_in(target.namespace)
    context.kernel.delete_namespace(target.namespace)
    router_files.remove(names.router_file(target.name, "rules"))


def _settings_differ(context: StepContext) -> list[str]:
    namespace = context.target.namespace
    if not netns.exists(namespace):
        return []
    present = context.kernel.at(namespace).sysctls.values([key for key, _ in SYSCTLS])
    wrong = [
        f"sysctl {key} is {present[key]} in {namespace}"
        for key, value in SYSCTLS
        if present.get(key, value) != value
    ]
    return wrong + context.kernel.at(namespace).links.differences("lo")


def _set_settings(context: StepContext) -> None:
    context.kernel.at(context.target.namespace).sysctls.set_all(SYSCTLS)
    context.kernel.at(context.target.namespace).links.set_up("lo")


# -- links of ours -----------------------------------------------------------


def _patch_differs(context: StepContext) -> list[str]:
    target = context.target
    if not netns.exists(target.namespace):
        return []
    return context.kernel.patch_differences(
        target.namespace, names.ROUTER_HOST_LINK, target.link, context.before.mtu
    )


def _make_patch(context: StepContext) -> None:
    target, kernel = context.target, context.kernel
    if kernel.has_patch(target.namespace, names.ROUTER_HOST_LINK, target.link):
        for where, link in ((target.namespace, names.ROUTER_HOST_LINK), (None, target.link)):
            kernel.at(where).links.set_mtu(link, context.before.mtu)
        return
    kernel.create_patch(
        target.namespace,
        names.ROUTER_HOST_LINK,
        names.mac(target.name, "router-host"),
        target.link,
        names.mac(target.name, "host-router"),
        names.altname("router", target.name),
        context.before.mtu,
    )


def end_patch(context: StepContext) -> None:
    """Delete the patch between host and router; a missing patch is success."""
    context.kernel.host.links.delete(context.target.link)


def _make_transit(context: StepContext) -> None:
    namespace, kernel = context.target.namespace, context.kernel
    if kernel.at(namespace).links.get(names.ROUTER_TRANSIT) is None:
        mac = names.mac(context.target.name, "router-transit")
        altname = f"natns-transit-{names.slug(context.target.name)}"
        kernel.create_bridge(names.ROUTER_TRANSIT, altname, mac, namespace)
    kernel.at(namespace).links.set_mtu(names.ROUTER_TRANSIT, context.before.mtu)
    link_config.ensure(downstream.transit(context.target, context.needs()))


def _transit_differs(context: StepContext) -> list[str]:
    return link_config.differences(downstream.transit(context.target, context.needs()))


# -- firewall rules ----------------------------------------------------------


def _rules_differ(context: StepContext) -> list[str]:
    if not netns.exists(context.target.namespace):
        return []
    return nat_rules.differences(context.target, context.rules)


def _load_rules(context: StepContext) -> None:
    wanted = context.rules
    if nat_rules.differences(context.target, wanted):
        nat_rules.load(context.target, wanted)


STEPS = (
    Step("make the namespace", _namespace_differs, _make_namespace, _end_namespace),
    Step("set what it forwards", _settings_differ, _set_settings, keep),
    Step("make the patch to the host", _patch_differs, _make_patch, end_patch),
    Step("make the transit bridge", _transit_differs, _make_transit, keep),
    Step("load the rules", _rules_differ, _load_rules, keep),
)
