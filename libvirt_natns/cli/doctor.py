# SPDX-License-Identifier: LGPL-2.1-or-later
"""``virt-natns doctor``: does this machine have what libvirt-natns needs?

Every examination changes nothing.  What the kernel can do is tried out in a
network namespace that nobody else sees and that ends with the trial.
"""

import importlib.util
import subprocess
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from ipaddress import IPv4Address, IPv4Network
from typing import Literal

from libvirt_natns import firewall, names
from libvirt_natns.cli import install, service_control, trust
from libvirt_natns.daemons import dnsmasq, libvirt, ndppd, udhcpc
from libvirt_natns.documents import config
from libvirt_natns.engine import host, reconcile
from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import (
    ConfigError,
    FirewallError,
    InstallError,
    LibvirtError,
    NatnsError,
    ProxyError,
    UpstreamError,
)
from libvirt_natns.firewall import neighbour_tables
from libvirt_natns.firewall.rules import Policy, ruleset
from libvirt_natns.kernel import netns
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state import database
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import attachment, routers, transit
from libvirt_natns.upstream.router.lifecycle import Machine

DROP_IN_SINCE = (6, 5, 0)
"""The libvirt that first looked into hooks/network.d."""

OWN_MODULES = {"libvirt": "python3-libvirt", "prometheus_client": "python3-prometheus-client"}
"""What the command and the service need, and the hooks do not."""

Examination = Callable[[], str]
"""Says what it found; a NatnsError says what is broken and how to mend it."""

Engines = Callable[[Config], AbstractContextManager[Engine]]
"""Makes an engine over a configuration; one that makes no state database."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, and what is to be said of it."""

    what: str
    state: Literal["ok", "warn", "broken"]
    said: str


def examine(engine: Engines) -> list[Finding]:
    """All examinations, in the order in which one would mend what they find."""
    settings, finding = _configuration()
    found = [finding]
    for what, examination in _examinations(engine, settings):
        try:
            found.append(Finding(what, "ok", examination()))
        except NatnsError as error:
            found.append(Finding(what, "broken", str(error)))
    warnings = (*_obstacles(engine, settings), *_neighbour_tables(engine, settings))
    return [*found, *warnings, trusted()]


def trusted() -> Finding:
    """Return whether the code that hooks run as root is root's alone."""
    found = trust.findings()
    if not found:
        return Finding("code", "ok", "root alone may write the package and the interpreter")
    more = f", and {len(found) - 1} more" if len(found) > 1 else ""
    return Finding(
        "code",
        "warn",
        f"hooks run it as root, and {found[0]}{more}: install it where root alone may write",
    )


def text(findings: Iterable[Finding]) -> str:
    """The findings, a line each."""
    lines = [f"{finding.state:<6}  {finding.what}: {finding.said}" for finding in findings]
    return "\n".join(lines)


def _configuration() -> tuple[Config, Finding]:
    """The configuration; the defaults, for what follows, where it is wrong."""
    try:
        settings = config.load()
    except ConfigError as error:
        return Config(), Finding("configuration", "broken", str(error))
    there = names.CONFIG_FILE if names.CONFIG_FILE.exists() else "no file, the defaults apply"
    said = f"{there}; scope {settings.scope}, upstream {settings.upstream}"
    return settings, Finding("configuration", "ok", said)


def _examinations(engine: Engines, settings: Config) -> list[tuple[str, Examination]]:
    return [
        ("program dnsmasq", dnsmasq.program),
        ("Python modules", _modules),
        ("namespaces and links", lambda: _links(settings)),
        ("firewall", lambda: _firewall(settings)),
        ("upstream", lambda: _upstream(settings)),
        ("IPv6", lambda: _ipv6(settings)),
        ("state database", _store),
        ("hooks", _hooks),
        ("service", service_control.examine),
        ("libvirt", _libvirt),
        ("hooks in libvirt", _seen),
        ("host's firewall", lambda: _host(engine, settings)),
        ("networks", lambda: _networks(engine, settings)),
        ("guests", lambda: _guests(engine, settings)),
    ]


# -- the machine -------------------------------------------------------------


def _modules() -> str:
    """Whether the hooks' own interpreter finds what it needs: not always this one."""
    for module, package in OWN_MODULES.items():
        if importlib.util.find_spec(module) is None:
            raise InstallError(f"the module {module} is missing", f"install {package}")
    interpreter = install.interpreter()
    library = str(names.library())
    program = f"import sys; sys.path.append({library!r}); {install.NEEDED}"
    done = subprocess.run(
        [interpreter, "-I", "-c", program], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        raise InstallError(
            f"{interpreter} cannot run the hooks ({said})",
            "install python3-lxml and python3-pyroute2",
        )
    return f"all there for {interpreter}"


def _links(settings: Config) -> str:
    macvlan = any(each.attach == "macvlan" for each in settings.upstreams.values())
    with_kernel(lambda kernel: kernel.try_links(macvlan=macvlan))
    kinds = "bridges, veth and macvlan" if macvlan else "bridges and veth"
    return f"this kernel has network namespaces, {kinds}"


def _firewall(settings: Config) -> str:
    backend = firewall.choose(settings.firewall)
    policy = Policy(
        inner="inner",
        upstream=names.UPSTREAM_LINK,
        subnets=(IPv4Network("10.0.0.0/24"),),
        gateways=(IPv4Address("10.0.0.1"),),
        address=IPv4Address("192.0.2.2"),
    )
    # All of a network's rules: each may need a module of its own.
    in_scratch_namespace(lambda: backend.apply(None, ruleset(policy)))
    return f"{backend.name}, and the kernel takes all kinds of rules"


def in_scratch_namespace(trial: Callable[[], object]) -> None:
    """Run ``trial`` in a network namespace that ends with it.

    A thread of its own is moved there, so nothing needs moving back.
    """
    errors: list[NatnsError] = []

    def run() -> None:
        try:
            netns.leave()
            trial()
        except NatnsError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def with_kernel(trial: Callable[[Kernel], object]) -> None:
    """The same, with a session of the kernel's there."""

    def run() -> None:
        with Kernel() as kernel:
            trial(kernel)

    in_scratch_namespace(run)


def _upstream(settings: Config) -> str:
    upstream = settings.upstreams[settings.upstream]
    if upstream.kind == "host":
        return f"{upstream.name}, routed by this host itself"
    if upstream.kind == "router":
        return _router(settings, upstream)
    with Kernel() as kernel:
        problem = attachment.problem(kernel, upstream)
    if problem:
        raise UpstreamError(
            f"{upstream.segment} of upstream {upstream.name} {problem[0]}", problem[1]
        )
    how = "macvlan on " if upstream.attach == "macvlan" else ""
    by = f"{upstream.name}, by {how}{upstream.segment}"
    return f"{by}; addresses by DHCP, which takes {_udhcpc()}" if upstream.by_dhcp else by


def _udhcpc() -> str:
    return " ".join(udhcpc.program())


def _ipv6(settings: Config) -> str:
    """What the default upstream needs for IPv6, where it has any."""
    upstream = settings.upstreams[settings.upstream]
    if upstream.kind == "router":
        return _ipv6_of_router(upstream)
    own = upstream.subnet6 or upstream.prefixes6
    if not own and upstream.kind != "host":
        return f"upstream {upstream.name} has none"
    with Kernel() as kernel:
        if upstream.kind == "host" and not transit.has_ipv6(kernel):
            return "the host has none, nor have networks"
    try:
        firewall.choose(settings.firewall, ipv6=True)
    except FirewallError as error:
        if own:
            raise
        # Nobody has asked for any yet.
        return f"networks cannot have any: {error}"
    if upstream.subnet6 is not None:
        ndppd.program()
    ways = ["NAT66"] if upstream.pool6 or upstream.kind == "host" else []
    ways += ["routed prefixes"] if upstream.prefixes6 else []
    ways += ["parts of the upstream's subnet, by ndppd"] if upstream.subnet6 else []
    return ", ".join(ways)


def _ipv6_of_router(upstream: Upstream) -> str:
    whole = routers.complete(upstream)
    if whole.subnet6 is None:
        return f"upstream {upstream.name} has none"
    ways = ["NAT66"]
    ways += ["routed prefixes"] if whole.prefixes6 else []
    if whole.own6 is not None:
        with suppress(ProxyError):
            ndppd.program()
            ways.append(f"parts of {whole.own6}, by ndppd")
    return ", ".join(ways)


def _router(settings: Config, upstream: Upstream) -> str:
    with Kernel() as kernel:
        health, record, found = Machine(settings, kernel).health(upstream.name)
    if health not in ("up", "unconfirmed") or record is None:
        said = f"{health} ({found[0]})" if found else health
        raise UpstreamError(
            f"the router of upstream {upstream.name} is {said}",
            f"virt-natns router up {upstream.name}",
        )
    return f"{upstream.name}, by {upstream.nic} in {record.target.namespace}"


def _store() -> str:
    database.check_there()
    if not (names.STATE_DIRECTORY / "state.db").exists():
        return "none yet, made when it is needed"
    store = Store()
    try:
        store.check()
        with store.transaction():
            return f"{store.path}, {len(store.networks.all())} networks"
    finally:
        store.close()


# -- libvirt and what runs ---------------------------------------------------


def _hooks() -> str:
    installed = install.installed_hooks()
    missing = [hook for hook in install.HOOKS if not set(install.places(hook)) & set(installed)]
    if missing:
        raise InstallError(f"not installed: {', '.join(missing)}", "run virt-natns install")
    old = [str(file) for file in installed if not install.is_current(file)]
    if old:
        raise InstallError(f"not this version's: {', '.join(old)}", "run virt-natns install")
    return ", ".join(map(str, installed))


def _libvirt() -> str:
    version = libvirt.version()
    dotted = ".".join(map(str, version))
    beside = [file for file in install.installed_hooks() if file.name == install.DROP_IN]
    if beside and version < DROP_IN_SINCE:
        raise LibvirtError(
            f"libvirt {dotted} does not run {beside[0]}",
            f"call it from {beside[0].parent.with_suffix('')}",
        )
    return f"version {dotted} answers"


def _seen() -> str:
    if not install.installed_hooks():
        raise InstallError("there is none to be seen", "run virt-natns install")
    blind = install.blind_daemons()
    if blind:
        raise LibvirtError(
            f"{', '.join(blind)} has not looked for hooks since ours were installed",
            f"systemctl reload {' '.join(blind)}",
        )
    return "every running daemon has looked for them"


def _host(engine: Engines, settings: Config) -> str:
    with engine(settings) as verbs:
        bridged = verbs.kernel.sysctl(None, host.BRIDGE_NF) == "1"
        found = reconcile.host_differences(verbs)
    if found:
        raise NatnsError(f"{len(found)} of our rules differ ({found[0]})", "run virt-natns sync")
    if bridged:
        return "sees bridged frames (bridge-nf-call-iptables is 1); ours are let through"
    return "does not see bridged frames"


def _obstacles(engine: Engines, settings: Config) -> list[Finding]:
    """Warn of chains of an administrator's that drop the networks' packets."""
    try:
        with engine(settings) as verbs:
            notes = reconcile.host_obstacles(verbs)
    except NatnsError:
        # An examination above says why.
        return []
    return [Finding("others' chains", "warn", note) for note in notes]


def _networks(engine: Engines, settings: Config) -> str:
    with engine(settings) as verbs:
        missed = reconcile.missed(verbs, libvirt.active_networks)
    if missed:
        told = "; ".join(f"{name} {what}" for name, what in missed)
        raise NatnsError(told, "run virt-natns sync")
    return "those that are active in libvirt have their routers"


def _neighbour_tables(engine: Engines, settings: Config) -> list[Finding]:
    """Warn of tables without room for the networks that there are."""
    try:
        with engine(settings) as verbs:
            networks = len(verbs.store.host.users())
    except NatnsError:
        # An examination above says why.
        return []
    room = neighbour_tables.examine(networks)
    return [Finding("neighbour tables", "warn" if room.tight else "ok", room.said)]


def _guests(engine: Engines, settings: Config) -> str:
    with engine(settings) as verbs:
        found = reconcile.guest_differences(verbs, libvirt.active_domains)
    if found:
        told = "; ".join(f"{name}: {what}" for name, what in found)
        raise NatnsError(told, "run virt-natns sync")
    return "those that run have published what their metadata says"
