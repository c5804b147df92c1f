# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refuses a router that cannot come up, and decides its target, before anything changes."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from socket import AF_INET
from typing import cast

from libvirt_natns import names
from libvirt_natns.errors import ConflictError, RouterError
from libvirt_natns.firewall import backends
from libvirt_natns.firewall.rule import Transport
from libvirt_natns.kernel import login_session, netlink, netns
from libvirt_natns.kernel.routes import is_way_out
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import PortProtocol, PortSet
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.upstream import transit
from libvirt_natns.upstream.router import (
    host_addresses,
    host_resolv_conf,
    ipv6_choice,
    lease_identity,
    nic_checks,
    nic_completion,
    nic_lease,
    nic_link,
    nic_snapshot,
    nic_sources,
)
from libvirt_natns.upstream.router.confirmation import ConfirmedRouter
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.host_resolv_conf import Resolver
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target


def upstream(config: Config, name: str | None) -> RouterUpstream:
    """Return the upstream of kind "router" of that name, or the only one.  Raises RouterError."""
    routers = config.routers
    if name is None and len(routers) == 1:
        return next(iter(routers.values()))
    if name in routers:
        return routers[name]
    if name is None:
        fact = "several routers are configured" if routers else "no router is configured"
    else:
        fact = f"upstream {name} is not of kind router"
    add = f'add [upstreams.{name or "wan"}] with kind = "router" and nic to {names.CONFIG_FILE}'
    raise RouterError(fact, f"name one of {', '.join(sorted(routers))}" if routers else add)


def confirmed(wanted: RouterUpstream, kept: ConfirmedRouter) -> RouterUpstream:
    """Return an upstream as it was confirmed; later changes of the configuration do not count."""
    target = kept.target
    if target is None:
        return wanted
    all_own = target.addresses6 == tuple(address.ip for address in kept.before.ipv6)
    return replace(
        wanted,
        host_subnet=IPv4Network(target.host_subnet),
        host_ports=tuple(PortSet(cast("PortProtocol", p), a, b) for p, a, b in target.ports),
        host_address6=None if all_own else IPv6Address(target.addresses6[0]),
        client_id=target.client_id,
        host_addresses=tuple(map(IPv4Address, target.addresses4)),
        dns=tuple(map(ip_address, target.servers)),
    )


def ports(wanted: RouterUpstream) -> tuple[tuple[Transport, int, int], ...]:
    """Return the host's ports, in the form of a target."""
    return tuple((port_set.proto, port_set.first, port_set.last) for port_set in wanted.host_ports)


def check_published(target: Target, needs: RouterNeeds) -> None:
    """Refuse host ports that a network publishes.  Raises ConflictError."""
    for forward in needs.forwards:
        if forward.target.version != 4:
            continue
        for protocol, first, last in target.ports:
            if protocol == forward.proto and first <= forward.last and forward.first <= last:
                raise ConflictError(
                    f"router {target.name}: a network publishes {protocol} port"
                    f" {max(first, forward.first)}, which host_ports has now",
                    f"choose other host_ports in [upstreams.{target.name}] of {names.CONFIG_FILE}",
                )


def check_session(target: Target, addresses: Collection[str]) -> None:
    """Refuse a router that would cut the caller's own session.  Raises ConflictError.

    The session came in by one of ``addresses``, and host_ports lack its port.
    """
    for entrance in login_session.entrances():
        if entrance.address.version == 6 and not entrance.address.is_unspecified:
            # The host keeps its IPv6 addresses, with all ports.
            continue
        if str(entrance.address) not in addresses and not entrance.address.is_unspecified:
            continue
        proto, port = entrance.proto, entrance.port
        if not any(proto == p and first <= port <= last for p, first, last in target.ports):
            raise ConflictError(
                f"router {target.name}: your session came in by {proto} port {port}, which"
                " host_ports lack, so you could not log in again",
                f'add "{proto}/{port}" to host_ports in [upstreams.{target.name}]'
                f" of {names.CONFIG_FILE}",
            )


def unapplied(wanted: RouterUpstream, target: Target, before: Capture) -> list[str]:
    """Return the changes of the configuration that only a router made anew can have."""
    own = wanted.host_address6
    addresses6 = tuple(address.ip for address in before.ipv6) if own is None else (str(own),)
    identity = target.client_id or lease_identity.of_mac(before.mac)
    changed = {
        "nic": wanted.nic != target.nic,
        "host_subnet": str(wanted.host_subnet) != target.host_subnet,
        "host_address6": addresses6 != target.addresses6,
        "client_id": wanted.client_id not in ("", identity),
        "host_addresses": wanted.host_addresses is not None
        and set(map(str, wanted.host_addresses)) != set(target.addresses4),
    }
    return [
        f"{key} differs from the configuration: virt-natns router down {target.name}, then up"
        for key, differs in changed.items()
        if differs
    ]


def target(
    config: Config,
    kernel: Kernel,
    wanted: RouterUpstream,
    kept: Capture | None,
    *,
    boot: bool = False,
) -> tuple[Target, Capture, Resolver]:
    """Return the target of a router, the NIC's capture and resolv.conf.  Raises RouterError.

    ``kept``, the confirmed settings, complete a NIC without addresses.  At a ``boot`` they
    complete a NIC that lacks some, too.
    """
    before = _capture(wanted, kept, boot)
    _check_names(kernel, wanted)
    _check_subnets(kernel, wanted, before)
    leased = any(address.leased for address in before.ipv4)
    if leased:
        nic_lease.require()
    resolv = host_resolv_conf.look()
    addresses6 = _addresses6(wanted, before)
    has_ipv6 = transit.has_ipv6(kernel)
    six = ipv6_choice.choose(config, wanted, before, addresses6) if has_ipv6 else ipv6_choice.Ipv6()
    return (
        Target(
            name=wanted.name,
            nic=wanted.nic,
            backend=backends.choose(config.firewall).name,
            host_subnet=str(wanted.host_subnet),
            ports=ports(wanted),
            addresses6=addresses6,
            transit=str(_transit(kernel, wanted, before)),
            servers=_servers(wanted, resolv),
            leased=leased,
            sources=nic_sources.choose(before),
            client_id=lease_identity.choose(wanted, before, boot=boot),
            addresses4=host_addresses.choose(wanted, before, boot=boot),
            transit6=six.transit,
            subnet6=six.subnet,
            own6=six.own,
        ),
        before,
        resolv,
    )


def _refuse(wanted: RouterUpstream, fact: str, remedy: str = "") -> RouterError:
    return RouterError(f"router {wanted.name}: {fact}", remedy)


def _capture(wanted: RouterUpstream, kept: Capture | None, boot: bool) -> Capture:
    name = wanted.nic
    if name in nic_link.RESERVED:
        raise _refuse(wanted, f"a NIC cannot be called {name}", "rename it (ip link set NIC name)")
    fault = nic_checks.fault_of(name)
    if fault:
        raise _refuse(wanted, f"{name} {fault[0]}", fault[1])
    before = nic_snapshot.capture(None, name)
    if kept is not None and kept.name == name and (before.is_bare or boot):
        before = nic_completion.completed(before, kept)
    if before.is_bare:
        raise _refuse(wanted, f"{name} has no address", "configure its addresses and routes first")
    if not before.flags & netlink.IFF_UP:
        raise _refuse(wanted, f"{name} is down", f"ip link set {name} up")
    if not any(route.is_default for route in before.routes):
        raise _refuse(
            wanted, f"no default route leads over {name}", "name the NIC to the outside in 'nic'"
        )
    return before


def _check_names(kernel: Kernel, wanted: RouterUpstream) -> None:
    """Refuse names of ours that others have.  A kill may have left a namespace of ours."""
    namespace = names.router_namespace(wanted.name)
    owner = kernel.namespace_owner(namespace)
    if netns.exists(namespace) and owner not in (None, f"router {wanted.name}"):
        if owner:
            raise _refuse(
                wanted, f"namespace {namespace} belongs to {owner}", "rename the upstream"
            )
        raise _refuse(wanted, f"namespace {namespace} is not ours", f"ip netns delete {namespace}")
    link = names.router_patch(wanted.name)
    if kernel.host.links.get(link) is not None:
        raise _refuse(wanted, f"a link {link} exists", f"ip link delete {link}")


def _check_subnets(kernel: Kernel, wanted: RouterUpstream, before: Capture) -> None:
    """Refuse a ``host_subnet`` that overlaps another subnet of the host or NIC."""
    for taken in (*kernel.host.routes.destinations(), *_reached(before)):
        if wanted.host_subnet.overlaps(taken):
            raise _refuse(
                wanted,
                f"the host has a route to {taken}, which overlaps {wanted.host_subnet}",
                f"choose another with 'host_subnet' in [upstreams.{wanted.name}]"
                f" of {names.CONFIG_FILE}",
            )


def _reached(before: Capture) -> Iterator[IPv4Network]:
    """Yield the subnets and gateways that routes over the NIC lead to."""
    for route in before.routes:
        to = ip_network(route.destination)
        if isinstance(to, IPv4Network) and not is_way_out(to):
            yield to
        if route.family == AF_INET and route.gateway:
            yield IPv4Network(IPv4Address(route.gateway))


def _transit(kernel: Kernel, wanted: RouterUpstream, before: Capture) -> IPv4Network:
    """Return the transit subnet, behind the router for networks."""
    taken = [*kernel.host.routes.destinations(), *_reached(before), wanted.host_subnet]
    # The upstream "host" takes the first candidate, and should not meet this one.
    first, *others = transit.CANDIDATES
    candidates = [wanted.subnet] if wanted.subnet else [*others, first]
    for subnet in candidates:
        if not any(map(subnet.overlaps, taken)):
            return subnet
    raise _refuse(
        wanted,
        f"the host has routes into {', '.join(map(str, candidates))}",
        f"choose a free one with 'subnet' in [upstreams.{wanted.name}] of {names.CONFIG_FILE}",
    )


def _addresses6(wanted: RouterUpstream, before: Capture) -> tuple[str, ...]:
    """Return the host's own IPv6 addresses: all of the NIC, or the configured one."""
    if wanted.host_address6 is None:
        return tuple(address.ip for address in before.ipv6)
    subnets = [
        ip_network(f"{address.ip}/{address.prefix}", strict=False) for address in before.ipv6
    ]
    if not any(wanted.host_address6 in subnet for subnet in subnets):
        raise _refuse(
            wanted,
            f"host_address6 {wanted.host_address6} is in no IPv6 subnet of {wanted.nic}",
            f"choose one of {', '.join(map(str, subnets)) or 'none: remove it'}",
        )
    return (str(wanted.host_address6),)


def _servers(wanted: RouterUpstream, before: Resolver) -> tuple[str, ...]:
    named = tuple(str(server) for server in wanted.dns)
    servers = host_resolv_conf.servers(before, named)
    if servers is None:
        return ()
    if all(ip_address(server).is_loopback for server in servers):
        raise _refuse(
            wanted,
            f"{host_resolv_conf.FILE} names no server that the host reaches without {wanted.nic}",
            f"set 'dns' in [upstreams.{wanted.name}] of {names.CONFIG_FILE}",
        )
    return tuple(servers)
