# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that can be refused about a router, looked at before anything is changed."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_address, ip_network
from typing import cast

from libvirt_natns import firewall, names
from libvirt_natns.errors import ConflictError, RouterError
from libvirt_natns.firewall.rules import Transport
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import PortSet, Protocol
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import replace
from libvirt_natns.upstream import transit
from libvirt_natns.upstream.router import dhcp, ipv6, nic, nic_objects, resolv_conf
from libvirt_natns.upstream.router.downstream import Needs
from libvirt_natns.upstream.router.journal import Kept, Target
from libvirt_natns.upstream.router.nic import Capture
from libvirt_natns.upstream.router.resolv_conf import Resolver


def upstream(config: Config, name: str | None) -> Upstream:
    """The upstream of kind "router" of that name, or the only one.  Raises RouterError."""
    routers = {each.name: each for each in config.upstreams.values() if each.kind == "router"}
    if name is None and len(routers) == 1:
        return next(iter(routers.values()))
    if name in routers:
        return routers[name]
    if name is None:
        fact = "several routers are configured" if routers else "no router is configured"
    else:
        fact = f"upstream {name} is no router"
    add = f'add [upstreams.{name or "wan"}] with kind = "router" and nic to {names.CONFIG_FILE}'
    raise RouterError(fact, f"name one of {', '.join(sorted(routers))}" if routers else add)


def confirmed(wanted: Upstream, kept: Kept) -> Upstream:
    """An upstream with what was confirmed of it, whatever the configuration says by now."""
    known = kept.target
    if known is None:
        return wanted
    every = known.addresses6 == tuple(each.ip for each in kept.before.ipv6)
    return replace(
        wanted,
        host_subnet=IPv4Network(known.host_subnet),
        host_ports=tuple(PortSet(cast("Protocol", p), a, b) for p, a, b in known.ports),
        host_address6=None if every else IPv6Address(known.addresses6[0]),
        dns=tuple(map(ip_address, known.servers)),
    )


def ports(wanted: Upstream) -> tuple[tuple[Transport, int, int], ...]:
    """The host's ports, as a target has them."""
    return tuple((each.proto, each.first, each.last) for each in wanted.host_ports)


def check_published(target: Target, needs: Needs) -> None:
    """Refuse ports of the host's that a network publishes.  Raises ConflictError."""
    for each in needs.forwards:
        if each.target.version != 4:
            continue
        for protocol, first, last in target.ports:
            if protocol == each.proto and first <= each.last and each.first <= last:
                raise ConflictError(
                    f"router {target.name}: a network publishes {protocol} port"
                    f" {max(first, each.first)}, which host_ports name now",
                    f"choose others in [upstreams.{target.name}] of {names.CONFIG_FILE}",
                )


def unapplied(wanted: Upstream, target: Target, before: Capture) -> list[str]:
    """What is configured otherwise than in a router that is up, and only a new one can have."""
    own = wanted.host_address6
    addresses6 = tuple(each.ip for each in before.ipv6) if own is None else (str(own),)
    changed = {
        "nic": wanted.nic != target.nic,
        "host_subnet": str(wanted.host_subnet) != target.host_subnet,
        "host_address6": addresses6 != target.addresses6,
    }
    return [
        f"{key} differs from the configuration: virt-natns router down {target.name}, then up"
        for key, differs in changed.items()
        if differs
    ]


def target(
    config: Config, kernel: Kernel, wanted: Upstream, kept: Capture | None, *, boot: bool = False
) -> tuple[Target, Capture, Resolver]:
    """What a router is to be, and what the host has now.  Raises RouterError.

    ``kept`` are the NIC's settings where nobody has given it any, or, at a ``boot``,
    not all of them yet.
    """
    name = wanted.nic or ""
    before = _capture(wanted, kept, boot)
    _check_names(kernel, wanted)
    _check_subnets(kernel, wanted, before)
    leased = any(each.leased for each in before.ipv4)
    if leased:
        dhcp.require()
    resolv = resolv_conf.look()
    addresses6 = _addresses6(wanted, before)
    has_ipv6 = transit.has_ipv6(kernel)
    six = ipv6.choose(config, wanted, before, addresses6) if has_ipv6 else ipv6.Ipv6()
    return (
        Target(
            name=wanted.name,
            nic=name,
            backend=firewall.choose(config.firewall).name,
            host_subnet=str(wanted.host_subnet),
            ports=ports(wanted),
            addresses6=addresses6,
            transit=str(_transit(kernel, wanted, before)),
            servers=_servers(wanted, resolv),
            leased=leased,
            transit6=six.transit,
            subnet6=six.subnet,
            own6=six.own,
        ),
        before,
        resolv,
    )


def _refuse(wanted: Upstream, fact: str, remedy: str = "") -> RouterError:
    return RouterError(f"router {wanted.name}: {fact}", remedy)


def _capture(wanted: Upstream, kept: Capture | None, boot: bool) -> Capture:
    name = wanted.nic or ""
    if name in nic.RESERVED:
        raise _refuse(wanted, f"a NIC cannot be called {name}", "rename it (ip link set NIC name)")
    found = nic.obstacle(name)
    if found:
        raise _refuse(wanted, f"{name} {found[0]}", found[1])
    before = nic.capture(None, name)
    if kept is not None and kept.name == name and (before.is_bare or boot):
        before = nic.completed(before, kept)
    if before.is_bare:
        raise _refuse(wanted, f"{name} has no address", "configure it first, as it is to be used")
    if not before.flags & nic.IFF_UP:
        raise _refuse(wanted, f"{name} is down", f"ip link set {name} up")
    if not any(route.is_default for route in before.routes):
        raise _refuse(
            wanted, f"no default route leads over {name}", "name the NIC to the outside in 'nic'"
        )
    return before


def _check_names(kernel: Kernel, wanted: Upstream) -> None:
    """Nobody else has what we are about to make.  Of ours, a kill may have left something."""
    namespace = names.router_namespace(wanted.name)
    owner = kernel.namespace_owner(namespace)
    if netns.exists(namespace) and owner not in (None, f"router {wanted.name}"):
        raise _refuse(wanted, f"namespace {namespace} is not ours", f"ip netns delete {namespace}")
    link = names.router_patch(wanted.name)
    if kernel.link(None, link) is not None:
        raise _refuse(wanted, f"a link {link} exists", f"ip link delete {link}")


def _check_subnets(kernel: Kernel, wanted: Upstream, before: Capture) -> None:
    """The host's private subnet is nobody else's."""
    for taken in (*kernel.host_routes(), *_reached(before)):
        if wanted.host_subnet.overlaps(taken):
            raise _refuse(
                wanted,
                f"the host has a route to {taken}, which overlaps {wanted.host_subnet}",
                f"choose another with 'host_subnet' in [upstreams.{wanted.name}]"
                f" of {names.CONFIG_FILE}",
            )


def _reached(before: Capture) -> Iterator[IPv4Network]:
    """What is found through the NIC, in particular."""
    for route in before.routes:
        to = ip_network(route.destination)
        if isinstance(to, IPv4Network) and to.prefixlen:
            yield to
        if route.family == nic_objects.AF_INET and route.gateway:
            yield IPv4Network(IPv4Address(route.gateway))


def _transit(kernel: Kernel, wanted: Upstream, before: Capture) -> IPv4Network:
    """The subnet behind the router for networks."""
    taken = [*kernel.host_routes(), *_reached(before), wanted.host_subnet]
    # The host's own takes the first, and the two need not meet.
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


def _addresses6(wanted: Upstream, before: Capture) -> tuple[str, ...]:
    """The host's own IPv6 addresses: those that it has, unless one is given."""
    if wanted.host_address6 is None:
        return tuple(each.ip for each in before.ipv6)
    subnets = [ip_network(f"{each.ip}/{each.prefix}", strict=False) for each in before.ipv6]
    if not any(wanted.host_address6 in subnet for subnet in subnets):
        raise _refuse(
            wanted,
            f"host_address6 {wanted.host_address6} is in no IPv6 subnet of {wanted.nic}",
            f"choose one of {', '.join(map(str, subnets)) or 'none: remove it'}",
        )
    return (str(wanted.host_address6),)


def _servers(wanted: Upstream, before: Resolver) -> tuple[str, ...]:
    named = tuple(str(each) for each in wanted.dns)
    found = resolv_conf.servers(before, named)
    if found is None:
        return ()
    if not any(_is_server(each) for each in found):
        raise _refuse(
            wanted,
            f"{resolv_conf.FILE} names no server that the host reaches without {wanted.nic}",
            f"set 'dns' in [upstreams.{wanted.name}] of {names.CONFIG_FILE}",
        )
    return tuple(found)


def _is_server(text: str) -> bool:
    return not ip_address(text).is_loopback
