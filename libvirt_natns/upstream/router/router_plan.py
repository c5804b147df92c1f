# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a router: all operations of ``router up``, in order.

The way back takes the operations back in reverse.  The state of the host before the first
operation stands in the journal; the kernel is never asked for it again.

A plan is made without a look at the NIC's addresses and routes.  So a router with a
capture that is damaged in part can still be taken back.
"""

from dataclasses import dataclass

from libvirt_natns import names
from libvirt_natns.firewall.rule import Rule
from libvirt_natns.operations.firewall_operations import Firewall
from libvirt_natns.operations.link_operations import LinkUp, Patch, TransitBridge
from libvirt_natns.operations.namespaces import HostTimeOuts, Settings
from libvirt_natns.operations.operation import Operation
from libvirt_natns.upstream.router import downstream, host_link, nat_rules
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.host_addresses import RoutedToHost
from libvirt_natns.upstream.router.host_link import HostEnd
from libvirt_natns.upstream.router.host_resolv_conf import ResolvConf
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.moved_nic import InnerNic, MovedNic
from libvirt_natns.upstream.router.nic_lease import KeptLease
from libvirt_natns.upstream.router.router_namespace import RouterNamespace
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


@dataclass(frozen=True, slots=True)
class RouterStep:
    """An operation of a router's plan; ``what`` is its name for people, and in the journal."""

    what: str
    operation: Operation


RouterPlan = tuple[RouterStep, ...]


def make(record: RouterRecord, needs: RouterNeeds | None) -> RouterPlan:
    """Return the plan of a router with the needs of its networks.

    Without ``needs`` the plan has no rules, and is only good to take the router back.
    """
    target, before = record.target, record.before
    namespace = target.namespace
    return (
        RouterStep("make the namespace", RouterNamespace(target)),
        RouterStep("set the sysctls", Settings(namespace, SYSCTLS)),
        RouterStep("set its loopback link up", LinkUp(namespace, "lo")),
        RouterStep("make the patch to the host", _patch(target, before.mtu)),
        RouterStep("make the transit bridge", _transit_bridge(target, before.mtu)),
        RouterStep(
            "configure the transit bridge", downstream.transit(target, needs or nat_rules.NOTHING)
        ),
        RouterStep("load the rules", _firewall(target, needs)),
        RouterStep("take the host's time-outs over", HostTimeOuts(namespace)),
        RouterStep("move the NIC", MovedNic(namespace, target.nic, before)),
        RouterStep(
            "give the NIC its addresses and routes", InnerNic(target, before, record.is_whole)
        ),
        RouterStep("connect the router", host_link.router_end(target)),
        *_kept_addresses(target),
        RouterStep("connect the host", HostEnd(target, before)),
        RouterStep("set the resolvers", ResolvConf(target.servers, record.resolver)),
        RouterStep("keep the DHCP lease", KeptLease(target, before)),
    )


def _kept_addresses(target: Target) -> tuple[RouterStep, ...]:
    if not target.addresses4:
        return ()
    return (RouterStep("route the host's addresses", RoutedToHost(target)),)


def _patch(target: Target, mtu: int) -> Patch:
    return Patch(
        target.namespace,
        names.ROUTER_HOST_LINK,
        names.mac(target.name, "router-host"),
        target.link,
        names.mac(target.name, "host-router"),
        names.altname("router", target.name),
        mtu,
    )


def _transit_bridge(target: Target, mtu: int) -> TransitBridge:
    return TransitBridge(
        names.ROUTER_TRANSIT,
        f"natns-transit-{names.slug(target.name)}",
        names.mac(target.name, "router-transit"),
        target.namespace,
        mtu,
    )


def _firewall(target: Target, needs: RouterNeeds | None) -> Firewall:
    rules: tuple[Rule, ...] = () if needs is None else nat_rules.rules(target, needs)
    return nat_rules.firewall(target, rules)
