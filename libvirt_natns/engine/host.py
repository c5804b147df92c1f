# SPDX-License-Identifier: LGPL-2.1-or-later
"""What all networks share in the host: transit bridges, forwarding, a few rules.

Only what the running networks need is there, and the last one takes it away.
What was made is noted in a file of the run-time directory before it is made,
so whoever comes after a kill knows what to remove.

Forwarding is switched on for the interfaces concerned alone, not for the whole
host, and rules see to it that they forward for a transit bridge alone.  A host whose
administrator, or another program, switched it on for all meanwhile is told apart by the
global value, and left as it is then.  In IPv6 there is but the global one (``host_ipv6``).

Networks come and go one by one, and there may be a thousand: ``adjust`` adds and
removes what one of them needs, as long as nothing else differs from what ``ensure``
left, which compares everything.  What the host holds for each network is in the
state database; whether it is still so, the rules' fingerprint tells.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, network_of
from libvirt_natns.documents import xml_sniff
from libvirt_natns.engine import apply, host_ipv6, plan
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import host as rules
from libvirt_natns.firewall import host_nftables, host_parts, nfnetlink, nftables, zones
from libvirt_natns.firewall.host_parts import Part
from libvirt_natns.kernel import outward_links
from libvirt_natns.kernel.locks import locked
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.upstream import Upstream
from libvirt_natns.records import asdict, dataclass, field, replace
from libvirt_natns.state.store import Store

BRIDGE_NF = "net/bridge/bridge-nf-call-iptables"
BRIDGE_NF6 = "net/bridge/bridge-nf-call-ip6tables"
GLOBAL_FORWARDING = "net/ipv4/conf/all/forwarding"
LIBVIRT_STATUS = Path("/run/libvirt/network")
STATUS_LIMIT = 5.0
"""Seconds in which libvirt writes a network's status file, once its hooks have ended."""

STATUS_PAUSE = 0.02
LOADED = "loaded"
LEFT_RULES = "firewall rules are left over"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a network that runs, or all of them together, need of the host.

    ``transits`` are completed upstreams of kind "host", ``public`` are subnets that
    pass its bridge untranslated.  ``routes`` lead to those that the host routes, and
    ``routes6`` tells whether it must forward IPv6 at all.  ``dhcp`` are bridges on which
    a DHCP server leases addresses.
    """

    transits: tuple[Upstream, ...] = ()
    private: tuple[rules.Private, ...] = ()
    provider: tuple[rules.Provider, ...] = ()
    forwards: tuple[rules.HostForward, ...] = ()
    public: tuple[rules.Provider, ...] = ()
    routes: tuple[plan.Route, ...] = ()
    routes6: bool = False
    dhcp: tuple[str, ...] = ()


def together(all_needs: Iterable[Needs]) -> Needs:
    """What several networks need."""
    parts = list(all_needs)
    return Needs(
        tuple({each.name: each for part in parts for each in part.transits}.values()),
        tuple(each for part in parts for each in part.private),
        tuple(each for part in parts for each in part.provider),
        tuple(each for part in parts for each in part.forwards),
        tuple(each for part in parts for each in part.public),
        tuple(each for part in parts for each in part.routes),
        any(part.routes6 for part in parts),
        tuple(dict.fromkeys(each for part in parts for each in part.dhcp)),
    )


@dataclass(slots=True)
class Made:
    """What is in the host because of us.

    ``zones`` are the numbers that private bridges have in conntrack, ``ways`` what the rules
    took for links that lead out.  ``policy`` is "" unless there are rules of ours.
    ``seen`` is their fingerprint as it was when all that the database says was in them; ""
    while that is not sure.  ``counts`` tell how often networks need what they have in common, and
    ``parents`` are the foreign tables that have a chain of ours.  ``routes`` are routes
    to networks' prefixes, each as destination, gateway and link, and ``settings`` what
    the sysctls were that we changed for IPv6.
    """

    bridges: list[str] = field(default_factory=list)
    forwarding: list[str] = field(default_factory=list)
    policy: str = ""
    seen: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    parents: list[str] = field(default_factory=list)
    routes: list[list[str]] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    zones: dict[str, int] = field(default_factory=dict)
    ways: dict[str, object] = field(default_factory=dict)


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
    text, fresh = json.dumps(asdict(made)), _file().with_suffix(".new")
    try:
        fresh.write_text(text)
    except OSError:
        fresh.unlink(missing_ok=True)
        # No room for a second file, yet a network that ends must be able to say so.
        with _file().open("r+") as present:
            present.write(text)
            present.truncate()
        return
    fresh.replace(_file())


@dataclass(frozen=True, slots=True)
class Host:
    """What the networks share.

    ``needs_of`` tells by network what all of them need, or a single one;
    ``backend`` the name of the firewall's.  ``before`` is called ahead of each
    change.
    """

    kernel: Kernel
    store: Store
    needs_of: Callable[[str | None], Mapping[str, Needs]]
    backend: Callable[[], str]
    before: apply.Step | None = None

    # -- one network -------------------------------------------------------

    def is_adjusted(self, network: str) -> bool:
        """Whether the host needs nothing for a network, and has nothing for it.

        So it is with most: where bridged frames do not meet the host's rules, one
        on an existing bridge concerns the host no more than any guest.
        """
        made = _load()
        if made != Made() and not made.seen:
            return False
        needs = self.needs_of(network).get(network, Needs())
        return self._part(needs, made) == Part() and not self.store.host.part(network)

    def leave(self) -> None:
        """Remove the run-time directory, if nothing is in it any more."""
        with suppress(OSError):
            if any(names.RUN_DIRECTORY.iterdir()):
                return
            with locked(names.RUN_DIRECTORY):
                names.RUN_DIRECTORY.rmdir()

    def adjust(self, network: str) -> list[str]:
        """Make the host as one network needs it; returns what differed.

        Compares everything where that network is not all that has changed.
        Raises KernelError or FirewallError.
        """
        with self._alone():
            try:
                found = self._adjust(network, _load())
            except FirewallError:
                found = None
            return self._ensure() if found is None else found

    def _part(self, needs: Needs, made: Made) -> Part:
        part = host_parts.make(_policy(self.kernel, needs, made.zones))
        routes = [_words(route) for route in needs.routes]
        return replace(part, routes=routes, routes6=needs.routes6)

    def _adjust(self, network: str, made: Made) -> list[str] | None:
        """The same, or None where it takes more."""
        needs = self.needs_of(network).get(network, Needs())
        _assign_zones(needs, made)
        old, new = host_parts.load(self.store.host.part(network)), self._part(needs, made)
        counts = Counter(made.counts)
        counts.update(new.counts())
        counts.subtract(old.counts())
        script = host_parts.script(old, new, made.parents)
        same = {key for key, count in counts.items() if count > 0} == set(made.counts)
        if script is None or not same or not made.seen or made.seen != host_parts.seen():
            return None
        seen = made.seen
        plans = self._noted(needs, made)
        if self._facts(needs, made) != made.ways:
            # The rules come first, or for a moment more would be forwarded.
            return None
        found = self._carry_out(plans)
        self._remove_routes([each for each in old.routes if each not in new.routes], made)
        if old != new:
            made.seen = ""
            _save(made)
            if script:
                self._announce("load the host's rules")
                nftables.run(None, script)
            self.store.host.put_part(network, host_parts.dump(new))
            made.counts = dict(counts)
        if not made.seen:
            made.seen = seen
            _save(made)
        return found

    # -- all of them -------------------------------------------------------

    def ensure(self) -> list[str]:
        """Make the host as the networks need it, and no more; returns what differed.

        What they need is asked under the host's lock, so that of two that go at
        once the second one sees that it is the last.  Raises KernelError or
        FirewallError.
        """
        with self._alone():
            return self._ensure()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the host's lock; what was seen ahead of it, others may have changed."""
        with locked(names.RUN_DIRECTORY):
            self.kernel.forget()
            yield

    def _ensure(self) -> list[str]:
        parts = self.needs_of(None)
        needs = together(parts.values())
        made = _load()
        before = asdict(made)
        made.seen = ""
        made.zones = zones.assigned({each.bridge for each in needs.private}, made.zones)
        plans = self._noted(needs, made)
        found = self._remove_unneeded(needs, made)
        made.ways = self._facts(needs, made)
        # Ahead of the forwarding that they limit.
        found += self._ensure_rules(needs, made)
        found += self._carry_out(plans)
        self._note_parts(parts, made)
        if asdict(made) != before:
            _save(made)
        with suppress(OSError):
            # Only the last one finds it empty.
            names.RUN_DIRECTORY.rmdir()
        return found

    def _note_parts(self, all_needs: Mapping[str, Needs], made: Made) -> None:
        """Note what the host holds for each network by now."""
        parts = {uuid: self._part(needs, made) for uuid, needs in all_needs.items()}
        self.store.host.put_parts({uuid: host_parts.dump(part) for uuid, part in parts.items()})
        counts: Counter[str] = Counter()
        for part in parts.values():
            counts.update(part.counts())
        there = bool(made.bridges or made.policy or made.routes or made.settings)
        if not there:
            made.zones = {}
        made.counts = dict(counts) if there else {}
        made.parents = nfnetlink.parents(host_nftables.CHAIN) if there else []
        made.seen = host_parts.seen() if there and self.backend() == nftables.name else ""

    def differences(self) -> list[str]:
        """How the host differs from what the networks need, in words."""
        needs = together(self.needs_of(None).values())
        found = []
        for upstream in needs.transits:
            found += apply.differences(self.kernel, plan_of(self.kernel, upstream, needs.private))
        found += apply.differences(self.kernel, host_ipv6.plan_of(self.kernel, needs))
        made = _load()
        found += [f"bridge {bridge} is left over" for bridge in _unneeded(needs, made)]
        found += [f"the route to {route[0]} is left over" for route in _stray(needs, made)]
        policy = self._policy(needs, made)
        if not policy.is_empty:
            found += rules.differences(policy, self.backend())
        elif made.policy:
            found.append(LEFT_RULES)
        return found

    def obstacles(self) -> tuple[str, ...]:
        """Chains of an administrator's that drop the networks' packets, one line each."""
        return rules.obstacles(_policy(self.kernel, together(self.needs_of(None).values()), {}))

    # -- bridges and forwarding --------------------------------------------

    def _noted(self, needs: Needs, made: Made) -> list[plan.Plan]:
        """What is to be there besides rules; what of it will be changed is noted."""
        plans = [plan_of(self.kernel, each, needs.private) for each in needs.transits]
        for operations in plans:
            self._note(operations, made)
        operations = host_ipv6.plan_of(self.kernel, needs)
        self._note_ipv6(operations, made)
        return [*plans, operations]

    def _carry_out(self, plans: Iterable[plan.Plan]) -> list[str]:
        # Nothing is taken back: what a failed start made, the next call finds noted and
        # not needed.
        return [
            line
            for operations in plans
            for line in apply.carry_out(self.kernel, operations, apply.Undo(), self.before)
        ]

    def _facts(self, needs: Needs, made: Made) -> dict[str, object]:
        """What the rules depend on besides the networks, as cheap to ask as that can be."""
        if not (made.bridges or made.settings):
            return {}
        # Each private bridge has a zone; a look at each of them would take its time.
        inner = {*made.bridges, *made.zones, *(each.bridge for each in needs.private)}
        alone = self.kernel.sysctl(None, GLOBAL_FORWARDING) == "0"
        return {
            "bridges": list(outward_links.bridges(inner)),
            "closed": made.forwarding if alone else [],
            "closed6": made.settings.get(host_ipv6.FORWARDING) == "0",
        }

    def _policy(self, needs: Needs, made: Made) -> rules.HostPolicy:
        """What the host must let through, and no more."""
        policy = _policy(self.kernel, needs, made.zones)
        facts = self._facts(needs, made)
        if not facts:
            return policy
        active = list(_active_networks())
        inner = {*made.bridges, *(each.bridge for each in needs.private)}
        # A bridge that libvirt itself made has a MAC address in its network's XML.
        inner |= {each.bridge for each in active if each.mac}
        by_name = self.backend() != nftables.name
        ways = rules.Ways(
            outward=outward_links.bridges(inner),
            links=outward_links.links(inner) if by_name else (),
            closed=tuple(made.forwarding) if facts["closed"] else (),
            closed6=bool(facts["closed6"]) and not any(each.forwards6 for each in active),
        )
        return replace(policy, ways=ways)

    def _note_ipv6(self, operations: Iterable[plan.Operation], made: Made) -> None:
        """The same for routes and the sysctls of IPv6."""
        routes, settings = list(made.routes), dict(made.settings)
        for operation in operations:
            if isinstance(operation, plan.Route):
                routes += [_words(operation)] if _words(operation) not in routes else []
            elif isinstance(operation, plan.Sysctl) and apply.differs(self.kernel, operation):
                former = self.kernel.sysctl(None, operation.key) or ""
                settings.setdefault(operation.key, former)
        if (routes, settings) != (made.routes, made.settings):
            made.routes, made.settings, made.seen = routes, settings, ""
            _save(made)

    def _remove_routes(self, routes: Iterable[list[str]], made: Made) -> None:
        for route in routes:
            destination, _, link = route
            self._announce(f"remove the route to {destination}")
            self.kernel.remove_route(None, network_of(destination), link)
            if route in made.routes:
                made.routes.remove(route)
                _save(made)

    def _note(self, operations: Iterable[plan.Operation], made: Made) -> None:
        """Write down what is about to be changed, before it is."""
        bridges, forwarding = set(made.bridges), set(made.forwarding)
        for operation in operations:
            if isinstance(operation, plan.TransitBridge):
                bridges.add(operation.name)
            elif isinstance(operation, plan.Sysctl) and apply.differs(self.kernel, operation):
                link = operation.key.split("/")[3]
                if link not in bridges:
                    forwarding.add(link)
        if (bridges, forwarding) != (set(made.bridges), set(made.forwarding)):
            made.bridges, made.forwarding = sorted(bridges), sorted(forwarding)
            made.seen = ""
            _save(made)

    def _remove_unneeded(self, needs: Needs, made: Made) -> list[str]:
        unneeded = _unneeded(needs, made)
        for bridge in unneeded:
            self._announce(f"delete the bridge {bridge}")
            self.kernel.delete_link(bridge)
            made.bridges.remove(bridge)
        if not needs.transits and made.forwarding:
            if self.kernel.sysctl(None, GLOBAL_FORWARDING) == "0":
                for link in made.forwarding:
                    self.kernel.set_sysctl(None, forwarding_of(link), "0")
            made.forwarding = []
        stray = _stray(needs, made)
        self._remove_routes(stray, made)
        if not needs.routes6 and made.settings:
            self._announce("forward no IPv6 any more")
            if not any(each.forwards6 for each in _active_networks()):
                host_ipv6.put_back(self.kernel, made.settings)
            made.settings = {}
        found = [f"bridge {bridge} was left over" for bridge in unneeded]
        return found + [f"the route to {route[0]} was left over" for route in stray]

    # -- rules -------------------------------------------------------------

    def _announce(self, what: str) -> None:
        if self.before is not None:
            self.before(what)

    def _ensure_rules(self, needs: Needs, made: Made) -> list[str]:
        policy = self._policy(needs, made)
        if policy.is_empty:
            return self._remove_rules(made)

        def announce() -> None:
            self._announce("load the host's rules")
            made.policy = LOADED
            _save(made)

        return list(rules.ensure(policy, self.backend(), announce))

    def _remove_rules(self, made: Made) -> list[str]:
        if not made.policy:
            return []
        self._announce("remove the host's rules")
        rules.remove()
        made.policy = ""
        return [LEFT_RULES]


def _words(route: plan.Route) -> list[str]:
    return [str(route.destination), str(route.gateway or ""), route.link]


def _stray(needs: Needs, made: Made) -> list[list[str]]:
    """Routes of ours to networks that do not need them."""
    needed = [_words(route) for route in needs.routes]
    return [route for route in made.routes if route not in needed]


def _unneeded(needs: Needs, made: Made) -> list[str]:
    needed = {upstream.bridge for upstream in needs.transits}
    return [bridge for bridge in made.bridges if bridge not in needed]


def _assign_zones(needs: Needs, made: Made) -> None:
    """Give the bridges of one network their zones, besides those of all others."""
    found = zones.assigned({each.bridge for each in needs.private}, made.zones)
    made.zones = {**made.zones, **found}


def _policy(kernel: Kernel, needs: Needs, taken: Mapping[str, int]) -> rules.HostPolicy:
    bridge_nf = kernel.sysctl(None, BRIDGE_NF) == "1"
    bridge_nf6 = kernel.sysctl(None, BRIDGE_NF6) == "1"
    six = [each for each in needs.private if any(net.version == 6 for net in each.subnets)]
    # Without bridge-nf, bridged frames never meet the host's rules.
    private = needs.private if bridge_nf else tuple(six) if bridge_nf6 else ()
    private = tuple(replace(each, zone=taken.get(each.bridge, 0)) for each in private)
    return rules.HostPolicy(
        transits=tuple(
            rules.Transit(upstream.bridge, side.subnet)
            for upstream in needs.transits
            for side in map(upstream.side, FAMILIES)
            if upstream.bridge and side.subnet
        ),
        private=private,
        provider=tuple(
            each
            for each in needs.provider
            if each.routed or (bridge_nf6 if each.address.version == 6 else bridge_nf)
        ),
        bridge_nf=bridge_nf and bool(needs.private),
        forwards=needs.forwards,
        bridge_nf6=bridge_nf6 and bool(six),
        public=needs.public,
        dhcp=needs.dhcp if bridge_nf else (),
    )


def plan_of(kernel: Kernel, upstream: Upstream, private: Iterable[rules.Private] = ()) -> plan.Plan:
    """The host's part of an upstream: nothing, unless it is of kind "host".

    ``private`` are the networks' own bridges: one that starts still has its
    address in the host.
    """
    if upstream.kind != "host":
        return ()
    links = kernel.routed_links() - {"lo", upstream.bridge, *(each.bridge for each in private)}
    closed = [link for link in links if kernel.sysctl(None, forwarding_of(link)) != "1"]
    if any(map(kernel.is_bridge, closed)):
        # Only now, for libvirt has a file a network.
        links -= isolated_bridges()
    return plan.transit(upstream, sorted(links))


def forwarding_of(link: str) -> str:
    """The setting that has the host forward what comes in by a link."""
    return f"net/ipv4/conf/{link}/forwarding"


def isolated_bridges() -> set[str]:
    """Bridges of libvirt's active networks without ``<forward>``: nothing goes in or out there.

    By its status files, for a hook cannot ask libvirt.
    """
    return {seen.bridge for seen in _active_networks() if not seen.forwards} - {""}


def _active_networks() -> Iterator[xml_sniff.Glance]:
    """libvirt's active networks, by its status files."""
    for file in LIBVIRT_STATUS.glob("*.xml"):
        with suppress(OSError):
            yield xml_sniff.at_network(file.read_bytes())


def await_status(network: str) -> None:
    """Wait for the status file of a network that starts, for ``STATUS_LIMIT`` seconds at most.

    libvirt writes it after the last hook.
    """
    end = time.monotonic() + STATUS_LIMIT
    while not (LIBVIRT_STATUS / f"{network}.xml").exists() and time.monotonic() < end:
        time.sleep(STATUS_PAUSE)
