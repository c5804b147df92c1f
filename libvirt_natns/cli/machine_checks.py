# SPDX-License-Identifier: LGPL-2.1-or-later
"""The examinations of ``virt-natns doctor`` that concern the machine: modules, kernel, upstream.

The kernel's abilities are tried out in a network namespace that no other process sees, and
that ends with the trial.
"""

import importlib.util
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Address, IPv4Network

from libvirt_natns import names
from libvirt_natns.cli import hook_files
from libvirt_natns.daemons import dns_probe, dns_relay, firewalld, ndppd, resolv_conf, udhcpc
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.engine.host import zone
from libvirt_natns.errors import (
    FirewallError,
    InstallError,
    ProxyError,
    UpstreamError,
)
from libvirt_natns.firewall import backends, helper_trial
from libvirt_natns.firewall.namespace_policy import Policy
from libvirt_natns.firewall.namespace_rules import ruleset
from libvirt_natns.kernel.link_kinds import try_link_kinds
from libvirt_natns.kernel.netns import in_scratch_namespace
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.upstream import DhcpUpstream, Helper, HostUpstream, RouterUpstream
from libvirt_natns.state import database
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import attach_checks, routers, transit
from libvirt_natns.upstream.router import health
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

ANSWER_LIMIT = 1.5
"""Seconds in which a resolver of the host answers."""

OWN_MODULES = {"libvirt": "python3-libvirt", "prometheus_client": "python3-prometheus-client"}
"""Modules that the command and the service need, and the hooks do not, with their packages."""


def python_modules() -> str:
    """Examine whether the hooks' interpreter, which may not be ours, finds its modules."""
    for module, package in OWN_MODULES.items():
        if importlib.util.find_spec(module) is None:
            raise InstallError(f"the module {module} is missing", f"install {package}")
    interpreter = hook_files.interpreter()
    library = str(names.library())
    program = f"import sys; sys.path.append({library!r}); {hook_files.NEEDED}"
    done = subprocess.run(
        [interpreter, "-I", "-c", program],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise InstallError(
            f"{interpreter} cannot run the hooks ({said})",
            "install python3-lxml and python3-pyroute2",
        )
    return f"{interpreter} has all modules"


def links(settings: Config) -> str:
    """Examine whether the kernel has the links and namespaces that networks need."""
    macvlan = any(upstream.is_macvlan for upstream in settings.upstreams.values())
    in_scratch_namespace(partial(try_link_kinds, macvlan=macvlan))
    kinds = "bridges, veth and macvlan" if macvlan else "bridges and veth"
    return f"this kernel has network namespaces, {kinds}"


def firewall_backend(settings: Config) -> str:
    """Examine whether the kernel takes each kind of rule."""
    backend = backends.choose(settings.firewall)
    policy = Policy(
        inner="inner",
        upstream=names.UPSTREAM_LINK,
        subnets=(IPv4Network("10.0.0.0/24"),),
        gateways=(IPv4Address("10.0.0.1"),),
        address=IPv4Address("192.0.2.2"),
    )
    # Each kind of rule may need a kernel module of its own, so all kinds are loaded.
    in_scratch_namespace(lambda: backend.apply(None, ruleset(policy)))
    followed = set[Helper]()
    for upstream in settings.upstreams.values():
        place = f"[upstreams.{upstream.name}] of {names.CONFIG_FILE}"
        remedy = f"remove the name from helpers in {place}"
        helper_trial.check(upstream.helpers, backend.name, f"upstream {upstream.name}", remedy)
        followed.update(upstream.helpers)
    following = f", and follows {' and '.join(sorted(followed))}" if followed else ""
    return f"{backend.name}, and the kernel accepts all kinds of rules{following}"


def firewalld_zone() -> str:
    """Examine whether firewalld, where it runs, lets packets of networks pass."""
    fault = zone.problem()
    if fault:
        raise FirewallError(fault)
    if not firewalld.is_running():
        return "does not run"
    if firewalld.is_strict():
        raise FirewallError(
            "firewalld rejects the ports that guests publish on the upstream host"
            " (StrictForwardPorts=yes)",
            "set StrictForwardPorts=no in /etc/firewalld/firewalld.conf",
        )
    return f"runs, and knows the zone {firewalld.ZONE}"


def default_upstream(settings: Config) -> str:
    """Examine whether the default upstream can take networks."""
    upstream = settings.upstreams[settings.upstream]
    if isinstance(upstream, HostUpstream):
        return f"{upstream.name}, routed by this host itself"
    if isinstance(upstream, RouterUpstream):
        return _router(settings, upstream)
    segment = BridgeSegment.of(upstream)
    with Kernel() as kernel:
        problem = attach_checks.problem(kernel, segment)
    if problem:
        raise UpstreamError(
            f"{segment.in_words} of upstream {upstream.name} {problem[0]}", problem[1]
        )
    how = "macvlan on " if upstream.is_macvlan else ""
    by = f"{upstream.name}, by {how}{segment.in_words}"
    client = " ".join(udhcpc.program()) if isinstance(upstream, DhcpUpstream) else ""
    return f"{by}; addresses by DHCP, with {client}" if client else by


def _router(settings: Config, upstream: RouterUpstream) -> str:
    """Examine the router namespace of an upstream."""
    with Kernel() as kernel:
        state, record, differences = health.of(RouterLifecycle(settings, kernel), upstream.name)
    if state not in ("up", "unconfirmed") or record is None:
        said = f"{state} ({differences[0]})" if differences else state
        raise UpstreamError(
            f"the router of upstream {upstream.name} is {said}",
            f"virt-natns router up {upstream.name}",
        )
    return f"{upstream.name}, by {upstream.nic} in {record.target.namespace}"


def ipv6(settings: Config) -> str:
    """Examine what the default upstream needs for IPv6, where it has any."""
    upstream = settings.upstreams[settings.upstream]
    if isinstance(upstream, RouterUpstream):
        return _ipv6_of_router(upstream)
    own = upstream.subnet6 or upstream.prefixes6
    in_host = isinstance(upstream, HostUpstream)
    if not own and not in_host:
        return f"upstream {upstream.name} has no IPv6"
    with Kernel() as kernel:
        if in_host and not transit.has_ipv6(kernel):
            return "neither the host nor the networks have IPv6"
    try:
        backends.choose(settings.firewall, ipv6=True)
    except FirewallError as error:
        if own:
            raise
        # The configuration asks for no IPv6 of its own, so this is no failure.
        return f"networks cannot have IPv6: {error}"
    if upstream.subnet6 is not None:
        ndppd.program()
    ways = ["NAT66"] if isinstance(upstream, HostUpstream) or upstream.pool6 else []
    ways += ["routed prefixes"] if upstream.prefixes6 else []
    ways += ["parts of the upstream's subnet, by ndppd"] if upstream.subnet6 else []
    return ", ".join(ways)


def _ipv6_of_router(upstream: RouterUpstream) -> str:
    whole = routers.complete(upstream)
    if whole.subnet6 is None:
        return f"upstream {upstream.name} has no IPv6"
    ways = ["NAT66"]
    ways += ["routed prefixes"] if whole.prefixes6 else []
    if whole.own6 is not None:
        with suppress(ProxyError):
            ndppd.program()
            ways.append(f"parts of {whole.own6}, by ndppd")
    return ", ".join(ways)


def silent_resolvers() -> str:
    """Return the host's resolvers in words if all of them are silent; "" if any answers."""
    servers = resolv_conf.nameservers(text_if_any(dns_relay.RESOLV_CONF))
    if not servers:
        return f"{dns_relay.RESOLV_CONF} names none"
    with ThreadPoolExecutor() as pool:
        ask = partial(dns_probe.ask, port=resolv_conf.DNS_PORT, name="", limit=ANSWER_LIMIT)
        replies = list(pool.map(ask, servers))
    return "" if "answers" in replies else ", ".join(map(str, servers))


def state_database() -> str:
    """Examine whether the state database can be read; make none."""
    database.check_there()
    if not (names.STATE_DIRECTORY / "state.db").exists():
        return "does not exist yet, and is made when needed"
    store = Store()
    try:
        store.check()
        with store.transaction():
            return f"{store.path}, {len(store.networks.all())} networks"
    finally:
        store.close()
