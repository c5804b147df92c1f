# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all networks share in the host: transit bridges, forwarding, a few rules.

Only what the running networks need is there, and the last one takes it away.
What was made is noted in a file of the run-time directory before it is made,
so whoever comes after a kill knows what to remove.

Forwarding is switched on for the interfaces concerned alone, not for the whole
host: a host whose administrator, or another program, switched it on for all
meanwhile is told apart by the global value, and left as it is then.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from libvirt_natns import executor, firewall, glance, names, plan
from libvirt_natns.firewall import host as rules
from libvirt_natns.kernel import Kernel
from libvirt_natns.locks import locked
from libvirt_natns.model import Upstream

BRIDGE_NF = "net/bridge/bridge-nf-call-iptables"
GLOBAL_FORWARDING = "net/ipv4/conf/all/forwarding"
LIBVIRT_STATUS = Path("/run/libvirt/network")
LEFT_RULES = "firewall rules are left over"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the networks that run need of the host together.

    ``transits`` are completed upstreams of kind "host".
    """

    backend: str
    transits: tuple[Upstream, ...] = ()
    private: tuple[rules.Private, ...] = ()
    provider: tuple[rules.Provider, ...] = ()
    forwards: tuple[rules.HostForward, ...] = ()

    def with_transit(self, upstream: Upstream) -> Self:
        """The same, with one more transit, unless it is there already."""
        if upstream in self.transits:
            return self
        return replace(self, transits=(*self.transits, upstream))


@dataclass(slots=True)
class Made:
    """What is in the host because of us: bridges, forwarding, and the rules' policy."""

    bridges: list[str] = field(default_factory=list)
    forwarding: list[str] = field(default_factory=list)
    policy: str = ""


def _file() -> Path:
    return names.RUN_DIRECTORY / "host.json"


def _load() -> Made:
    try:
        return Made(**json.loads(_file().read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return Made()


def _save(made: Made) -> None:
    if made == Made():
        _file().unlink(missing_ok=True)
        return
    fresh = _file().with_suffix(".new")
    fresh.write_text(
        json.dumps({"bridges": made.bridges, "forwarding": made.forwarding, "policy": made.policy})
    )
    fresh.replace(_file())


def ensure(
    kernel: Kernel, needs_of: Callable[[], Needs], before: executor.Step | None = None
) -> list[str]:
    """Make the host as the networks need it, and no more; returns what differed.

    ``needs_of`` is asked under the host's lock, so that of two networks that
    go at once the second one sees that it is the last.  ``before`` is called
    ahead of each change.  Raises KernelError or FirewallError.
    """
    with locked(names.RUN_DIRECTORY):
        needs = needs_of()
        made = _load()
        found = _add(kernel, needs, made, before)
        found += _remove_unneeded(kernel, needs, made, before)
        found += _ensure_rules(kernel, needs, made, before)
        with suppress(OSError):
            # Only the last one finds it empty.
            names.RUN_DIRECTORY.rmdir()
        return found


def differences(kernel: Kernel, needs: Needs) -> list[str]:
    """How the host differs from what the networks need, in words."""
    found = []
    for upstream in needs.transits:
        found += executor.differences(kernel, plan_of(kernel, upstream, needs.private))
    made = _load()
    found += [f"bridge {bridge} is left over" for bridge in _unneeded(needs, made)]
    policy = _policy(kernel, needs)
    if policy.transits or policy.bridge_nf:
        found += rules.differences(policy, needs.backend)
    elif made.policy:
        found.append(LEFT_RULES)
    return found


def _unneeded(needs: Needs, made: Made) -> list[str]:
    needed = {upstream.bridge for upstream in needs.transits}
    return [bridge for bridge in made.bridges if bridge not in needed]


def plan_of(kernel: Kernel, upstream: Upstream, private: Iterable[rules.Private] = ()) -> plan.Plan:
    """The host's part of an upstream: nothing, unless it is of kind "host".

    ``private`` are the networks' own bridges: one that starts still has its
    address in the host.
    """
    if upstream.kind != "host":
        return ()
    inside = {"lo", upstream.bridge, *(each.bridge for each in private), *isolated_bridges()}
    return plan.transit(upstream, sorted(kernel.routed_links() - inside))


def isolated_bridges() -> set[str]:
    """Bridges of libvirt's active networks without ``<forward>``: nothing goes in or out there.

    By its status files, for a hook cannot ask libvirt.
    """
    found = set()
    for file in LIBVIRT_STATUS.glob("*.xml"):
        with suppress(OSError):
            seen = glance.at_network(file.read_bytes())
            found |= set() if seen.forwards else {seen.bridge}
    return found - {""}


def _add(kernel: Kernel, needs: Needs, made: Made, before: executor.Step | None) -> list[str]:
    found: list[str] = []
    for upstream in needs.transits:
        operations = plan_of(kernel, upstream, needs.private)
        _note(kernel, operations, made)
        # Nothing is taken back: what a failed start made, the next call finds
        # noted and not needed.
        found += executor.carry_out(kernel, operations, executor.Undo(), before)
    return found


def _note(kernel: Kernel, operations: Iterable[plan.Operation], made: Made) -> None:
    """Write down what is about to be changed, before it is."""
    for operation in operations:
        if isinstance(operation, plan.TransitBridge):
            made.bridges = sorted({*made.bridges, operation.name})
        elif isinstance(operation, plan.Sysctl) and executor.differs(kernel, operation):
            link = operation.key.split("/")[3]
            if link not in made.bridges:
                made.forwarding = sorted({*made.forwarding, link})
    _save(made)


def _remove_unneeded(
    kernel: Kernel, needs: Needs, made: Made, before: executor.Step | None
) -> list[str]:
    unneeded = _unneeded(needs, made)
    for bridge in unneeded:
        if before is not None:
            before(f"delete the bridge {bridge}")
        kernel.delete_link(bridge)
        made.bridges.remove(bridge)
    if not needs.transits and made.forwarding:
        if kernel.sysctl(None, GLOBAL_FORWARDING) == "0":
            for link in made.forwarding:
                kernel.set_sysctl(None, f"net/ipv4/conf/{link}/forwarding", "0")
        made.forwarding = []
    _save(made)
    return [f"bridge {bridge} was left over" for bridge in unneeded]


def _policy(kernel: Kernel, needs: Needs) -> rules.HostPolicy:
    bridge_nf = kernel.sysctl(None, BRIDGE_NF) == "1"
    return rules.HostPolicy(
        transits=tuple(
            rules.Transit(upstream.bridge, upstream.subnet)
            for upstream in needs.transits
            if upstream.bridge and upstream.subnet
        ),
        # Without bridge-nf, bridged frames never meet the host's rules.
        private=needs.private if bridge_nf else (),
        provider=needs.provider if bridge_nf else (),
        bridge_nf=bridge_nf and bool(needs.private),
        forwards=needs.forwards,
    )


def _ensure_rules(
    kernel: Kernel, needs: Needs, made: Made, before: executor.Step | None
) -> list[str]:
    policy = _policy(kernel, needs)
    if not policy.transits and not policy.bridge_nf:
        return _remove_rules(made, before)
    found = list(rules.differences(policy, needs.backend))
    if found:
        if before is not None:
            before("load the host's rules")
        made.policy = firewall.fingerprint(repr(policy))
        _save(made)
        rules.ensure(policy, needs.backend)
    return found


def _remove_rules(made: Made, before: executor.Step | None) -> list[str]:
    if not made.policy:
        return []
    if before is not None:
        before("remove the host's rules")
    rules.remove()
    made.policy = ""
    _save(made)
    return [LEFT_RULES]
