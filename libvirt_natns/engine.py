# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs: prepare, up, refresh, down, check, sync.

Each converges on what the recorded network needs and can be called again at
any time; each takes back what it created when it fails.  Who asked (a hook, a
service, a person) makes no difference here, and libvirt is never called: a
hook that did would deadlock.
"""

import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address

from libvirt_natns import (
    arp,
    dnsmasq,
    document,
    executor,
    firewall,
    host,
    names,
    plan,
    pool,
    resolvers,
    selection,
    transit,
)
from libvirt_natns.errors import (
    ConflictError,
    KernelError,
    LibvirtError,
    NatnsError,
    UpstreamError,
)
from libvirt_natns.firewall.host import Private, Provider
from libvirt_natns.kernel import BRIDGE_PORTS, Kernel
from libvirt_natns.locks import locked
from libvirt_natns.model import Config, Network, Upstream
from libvirt_natns.resolvers import Resolvers
from libvirt_natns.store import Record, State, Store, boot_id, now

POLL = 0.02
"""Seconds between two looks at whether another network's start is over."""

Active = Mapping[str, bytes]
"""Networks that libvirt has active: their XML by uuid."""


@dataclass(frozen=True, slots=True)
class Engine:
    """All verbs over one configuration, one state database, one kernel session.

    ``before`` is called ahead of every change to the kernel, for logs and tests.
    """

    config: Config
    store: Store
    kernel: Kernel
    before: Callable[[plan.Operation], None] | None = None

    # -- up ----------------------------------------------------------------

    def prepare(self, network: Network, xml: bytes) -> None:
        """Check all that can be refused and reserve what the network needs.

        Runs in libvirt's `start` hook, before the bridge exists.  Raises a
        NatnsError, and leaves nothing, where the network cannot come up.
        Waits while another network with an overlapping subnet is between its
        own `start` and `started`.
        """
        self._check_programs(network)
        upstream = self._upstream(network)
        selection.check_addresses(network, upstream)
        self._check_bridge(network, upstream)
        with locked(names.network_directory(network.uuid)), ExitStack() as undo:
            undo.callback(self._discard_directory, network.uuid)
            self._clear(network)
            self._reserve(network, xml, upstream, undo)
            self._await_turn(network, xml, upstream)
            undo.pop_all()

    def up(self, network: Network, xml: bytes) -> list[str]:
        """Make the network's namespace and all that is in it; returns what differed.

        Runs in `started`, when the bridge is there, and whenever a network must
        be repaired.  Raises a NatnsError and takes back what it created.
        """
        with locked(names.network_directory(network.uuid)):
            with ExitStack() as undo:
                undo.callback(self._discard_directory, network.uuid)
                repaired = self._up(network, xml, undo)
                undo.pop_all()
            return repaired

    def _up(self, network: Network, xml: bytes, undo: ExitStack) -> list[str]:
        upstream = self._upstream(network)
        # Undone last, when the network does not count any more.
        undo.callback(host.ensure, self.kernel, self._host_needs)
        record = self.store.network(network.uuid)
        if record is None or record.state not in ("starting", "up"):
            # Its `start` was missed: the hooks were installed since.
            selection.check_addresses(network, upstream)
            self._reserve(network, xml, upstream, undo)
        else:
            if record.state != "up":
                undo.callback(self.store.set_state, network.uuid, "down")
            self.store.put(self._record(network, xml, upstream, record.state))
        address = self._address(network, upstream)
        host.ensure(self.kernel, self._host_needs)
        operations = self._plan(network, upstream, address)
        with ExitStack() as created:
            repaired = executor.carry_out(self.kernel, operations, created, self.before)
            self.store.set_state(network.uuid, "up")
            created.pop_all()
        return repaired

    def _check_programs(self, network: Network) -> None:
        firewall.choose(self.config.firewall)
        if network.has_dnsmasq:
            dnsmasq.program()

    def _upstream(self, network: Network) -> Upstream:
        upstream = selection.upstream_of(network, self.config)
        if upstream.kind == "host":
            return transit.choose(self.kernel, self.store, network, upstream)
        return upstream

    def _check_bridge(self, network: Network, upstream: Upstream) -> None:
        """Refuse an upstream bridge that could not take another port."""
        if upstream.kind == "host" and self.kernel.link(None, upstream.bridge or "") is None:
            return
        problem = self._bridge_problem(upstream.bridge or "")
        if problem:
            raise UpstreamError(
                f"network {network.name}: bridge {upstream.bridge} of upstream"
                f" {upstream.name} {problem[0]}",
                problem[1],
            )

    def _bridge_problem(self, bridge: str) -> tuple[str, str] | None:
        if self.kernel.link(None, bridge) is None:
            return "does not exist", f"create it, or mend {names.CONFIG_FILE}"
        if not self.kernel.is_bridge(bridge):
            return "is not a bridge", f"name a bridge in {names.CONFIG_FILE}"
        if not self.kernel.is_up(bridge):
            return "is down", f"set it up (ip link set {bridge} up)"
        if self.kernel.port_count(bridge) >= BRIDGE_PORTS:
            return f"is full, it has {BRIDGE_PORTS} ports", "use another bridge"
        return None

    def _clear(self, network: Network) -> None:
        """Remove what an earlier run of this network left, and refuse what is foreign."""
        record = self.store.network(network.uuid)
        if record is not None and record.state != "down":
            self._teardown(record)
        wanted = names.namespace(network.name)
        for rival in self.store.networks("preparing", "starting", "up"):
            same = rival.namespace == wanted or rival.bridge == network.bridge
            # No hook told that it stopped; libvirt would not start two of that name.
            gone = rival.state == "up" and self.kernel.link(None, rival.bridge) is None
            if same and rival.uuid != network.uuid and gone:
                self._teardown(rival)
        owner = self.kernel.namespace_owner(wanted)
        if owner == network.uuid:
            self._remove(network.uuid, wanted)
        elif owner is not None:
            raise ConflictError(
                f"network {network.name}: namespace {wanted} exists and is not ours",
                f"rename the network, or delete it (ip netns delete {wanted})",
            )

    def _reserve(
        self, network: Network, xml: bytes, upstream: Upstream, undo: ExitStack
    ) -> None:
        """Record the network and lease its address; ``undo`` takes back both."""
        leased = self.store.lease(upstream.name, network.uuid)
        self.store.put(self._record(network, xml, upstream, "preparing"))
        undo.callback(self.store.set_state, network.uuid, "down")
        if leased is None:
            undo.callback(self.store.release, upstream.name, network.uuid)

        def probe(addresses: Collection[IPv4Address]) -> set[IPv4Address]:
            if upstream.probe == 0:
                return set()
            return arp.probe(upstream.bridge or "", addresses, upstream.probe)

        pool.reserve(self.store, network, upstream, probe, self.kernel.host_addresses())

    def _await_turn(self, network: Network, xml: bytes, upstream: Upstream) -> None:
        while self.store.enter_start(self._record(network, xml, upstream, "starting")):
            time.sleep(POLL)

    @staticmethod
    def _record(network: Network, xml: bytes, upstream: Upstream, state: State) -> Record:
        return Record(
            uuid=network.uuid,
            name=network.name,
            namespace=names.namespace(network.name),
            bridge=network.bridge or "",
            upstream=upstream.name,
            kind=upstream.kind,
            subnets=tuple(subnet.network for subnet in network.subnets),
            taken_over=network.taken_over,
            state=state,
            boot=boot_id(),
            since=now(),
            document=xml,
        )

    def _address(self, network: Network, upstream: Upstream) -> IPv4Address:
        """The leased address; a new one where the configuration has moved on."""
        leased = self.store.lease(upstream.name, network.uuid)
        if leased is not None and upstream.subnet and leased in upstream.subnet:
            return leased
        return pool.reserve(
            self.store, network, upstream, lambda _: set(), self.kernel.host_addresses()
        )

    # -- plan --------------------------------------------------------------

    def _plan(self, network: Network, upstream: Upstream, address: IPv4Address) -> plan.Plan:
        return plan.make(network, upstream, address, self._surroundings(network, upstream))

    def _surroundings(self, network: Network, upstream: Upstream) -> plan.Surroundings:
        private = self.kernel.mtu(network.bridge or "")
        outside = self.kernel.mtu(upstream.bridge or "")
        if private is None or outside is None:
            missing = network.bridge if private is None else upstream.bridge
            raise KernelError(f"network {network.name}: bridge {missing} is missing")
        return plan.Surroundings(
            private_mtu=private,
            upstream_mtu=outside,
            backend=firewall.choose(self.config.firewall).name,
            dnsmasq=self._daemon(network, upstream, plan.path_mtu(private, outside)),
        )

    def _daemon(
        self, network: Network, upstream: Upstream, mtu: int | None
    ) -> dnsmasq.Daemon | None:
        if not network.has_dnsmasq:
            return None
        translated = dnsmasq.read_libvirts(network.name) if network.taken_over else None
        servers = tuple(a for a in upstream.dns if isinstance(a, IPv4Address))
        asked = Resolvers(servers) if servers else resolvers.host_resolvers()
        return dnsmasq.Daemon(
            uuid=network.uuid,
            namespace=names.namespace(network.name),
            bridge=network.bridge or "",
            configuration=dnsmasq.make(network, translated, asked, mtu),
            hosts="" if network.taken_over else dnsmasq.hosts_file(network),
        )

    def describe(self, network: Network) -> str:
        """What would be done for a network, in words; changes and leases nothing."""
        upstream = self._upstream_unchosen(network)
        selection.check_addresses(network, upstream)
        address = self.store.lease(upstream.name, network.uuid) or pool.next_address(
            self.store, network, upstream, self.kernel.host_addresses()
        )
        private = self.kernel.mtu(network.bridge or "") or network.mtu or 1500
        outside = self.kernel.mtu(upstream.bridge or "") or 1500
        around = plan.Surroundings(
            private, outside, firewall.choose(self.config.firewall).name, None
        )
        if network.has_dnsmasq:
            daemon = dnsmasq.Daemon(
                network.uuid, names.namespace(network.name), network.bridge or "", ""
            )
            around = replace(around, dnsmasq=daemon)
        shared = host.plan_of(self.kernel, upstream)
        return plan.describe((*shared, *plan.make(network, upstream, address, around)))

    def _upstream_unchosen(self, network: Network) -> Upstream:
        upstream = selection.upstream_of(network, self.config)
        if upstream.kind != "host":
            return upstream
        known = upstream.subnet or self.store.transit(upstream.name)
        return transit.complete(
            upstream, known or transit.free(self.kernel, network, upstream)[0]
        )

    # -- refresh -----------------------------------------------------------

    def refresh(self, network: Network, xml: bytes) -> list[str]:
        """Apply a changed network XML (`net-update`) to a network that is up.

        libvirt has written its dnsmasq's files by now.  Connections live on.
        """
        record = self.store.network(network.uuid)
        if record is None or record.state != "up":
            return []
        repaired = self.up(network, xml)
        if not repaired and network.has_dnsmasq:
            # Only the hosts files can have changed.
            dnsmasq.reload(network.uuid, record.namespace)
        return repaired

    # -- down --------------------------------------------------------------

    def down(self, uuid: str) -> None:
        """Remove all of a network but its lease, by recorded state alone.

        Missing things are success; everything is tried before the first error
        is raised.
        """
        record = self.store.network(uuid)
        if record is None or record.state == "down":
            return
        with locked(names.network_directory(uuid)):
            self._teardown(record)

    def _teardown(self, record: Record) -> None:
        self._remove(record.uuid, record.namespace)
        self.store.set_state(record.uuid, "down")
        host.ensure(self.kernel, self._host_needs)

    def _remove(self, uuid: str, namespace: str) -> None:
        """Delete a namespace and all that belongs to it.

        Its links go first: a namespace that ends loses its rules before its
        links, and would let packets out untranslated in between.
        """
        errors = []
        for step in (
            lambda: self.kernel.delete_link(names.upstream_patch(uuid)),
            lambda: self.kernel.delete_link(names.private_patch(uuid)),
            lambda: dnsmasq.stop(uuid),
            lambda: self._delete_own_namespace(uuid, namespace),
            lambda: self._discard_directory(uuid),
        ):
            try:
                step()
            except NatnsError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _delete_own_namespace(self, uuid: str, namespace: str) -> None:
        # None: nothing, or the empty file that a killed start left.
        if self.kernel.namespace_owner(namespace) in (uuid, None):
            self.kernel.delete_namespace(namespace)

    @staticmethod
    def _discard_directory(uuid: str) -> None:
        shutil.rmtree(names.network_directory(uuid), ignore_errors=True)

    def abandon(self, network: Network) -> None:
        """Remove what libvirt itself leaves of a network whose `started` has failed.

        It thinks the network inactive, yet its bridge and dnsmasq live on, and
        every later start would find the address in use.
        """
        dnsmasq.stop_libvirts(network.name)
        if network.bridge:
            self.kernel.delete_link(network.bridge)

    def hand_back(self, record: Record) -> None:
        """Take a running network down and give libvirt's bridge its addresses back."""
        network = document.parse_network(record.document)
        self.down(record.uuid)
        if not network.taken_over or self.kernel.link(None, record.bridge) is None:
            return
        for subnet in network.subnets:
            self.kernel.add_address(None, record.bridge, subnet.interface)
        for route in network.routes:
            self.kernel.add_route(None, route.destination, route.gateway, record.bridge)

    # -- host --------------------------------------------------------------

    def _host_needs(self) -> host.Needs:
        """What all networks that run or start need of the host together."""
        transits, private, provider = {}, [], []
        for record in self.store.networks("preparing", "starting", "up"):
            upstream = self.config.upstreams.get(record.upstream)
            if upstream is None or not record.this_boot:
                continue
            private.append(Private(record.bridge, record.subnets))
            subnet = upstream.subnet or self.store.transit(upstream.name)
            address = self.store.lease(upstream.name, record.uuid)
            if upstream.kind == "host" and subnet is not None:
                transits[upstream.name] = transit.complete(upstream, subnet)
            elif upstream.bridge and address:
                provider.append(Provider(upstream.bridge, address))
        return host.Needs(
            firewall.choose(self.config.firewall).name,
            tuple(transits.values()),
            tuple(private),
            tuple(provider),
        )

    # -- check and sync ----------------------------------------------------

    def differences(self, record: Record) -> list[str]:
        """How the kernel differs from what a network that is up needs, in words."""
        if record.state != "up":
            return []
        try:
            network = document.parse_network(record.document)
            upstream = self._upstream_unchosen(network)
            address = self.store.lease(upstream.name, record.uuid)
            if address is None:
                return [f"no address of upstream {upstream.name} is leased"]
            return executor.differences(self.kernel, self._plan(network, upstream, address))
        except NatnsError as error:
            return [str(error)]

    def host_differences(self) -> list[str]:
        """The same for what the networks share in the host."""
        try:
            return host.differences(self.kernel, self._host_needs())
        except NatnsError as error:
            return [str(error)]

    def sync(self, active: Active | None) -> list[tuple[str, str]]:
        """Repair everything; returns what was done, as (network, what) pairs.

        ``active`` is what libvirt runs; None where it cannot be asked: then a
        network whose bridge is there counts as active.  What is well is not
        touched.  Errors are raised together, after all that can be repaired was.
        """
        done: list[tuple[str, str]] = []
        errors: list[str] = []
        for name, step in self._steps(active):
            try:
                done += [(name, what) for what in step()]
            except NatnsError as error:
                errors.append(str(error))
        if errors:
            raise LibvirtError("; ".join(errors))
        return done

    def _steps(self, active: Active | None) -> list[tuple[str, Callable[[], list[str]]]]:
        steps: list[tuple[str, Callable[[], list[str]]]] = []
        known = self.store.networks("preparing", "starting", "up")
        for record in known:
            if not self._is_active(record, active):
                steps.append((record.name, lambda r=record: self._end(r)))
            elif active is None:
                steps.append((record.name, lambda r=record: self._repair(r.document)))
        for xml in (active or {}).values():
            steps.append(("", lambda x=xml: self._repair(x)))
        steps.append(("host", self._repair_host))
        return steps

    def _is_active(self, record: Record, active: Active | None) -> bool:
        if record.state in ("preparing", "starting") and record.this_boot:
            # In the middle of its start, unless that has died.
            if now() - record.since < 30:
                return True
        if active is not None:
            return record.uuid in active
        return self.kernel.link(None, record.bridge) is not None

    def _end(self, record: Record) -> list[str]:
        self.down(record.uuid)
        return ["was not running any more: removed"]

    def _repair(self, xml: bytes) -> list[str]:
        network = document.parse_network(xml)
        if not self.handles(network) and self._state(network) != "up":
            return []
        if self._state(network) in ("preparing", "starting"):
            return []
        return self.up(network, xml)

    def _state(self, network: Network) -> State | None:
        record = self.store.network(network.uuid)
        return record.state if record and record.this_boot else None

    def handles(self, network: Network) -> bool:
        """Whether the configuration makes a network ours."""
        return selection.verdict(network, self.config).handled

    def _repair_host(self) -> list[str]:
        return host.ensure(self.kernel, self._host_needs)
