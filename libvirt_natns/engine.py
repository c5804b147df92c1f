# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verbs: prepare, up, refresh, down.

Each converges on what the recorded network needs and can be called again at
any time; each takes back what it created when it fails.  Who asked (a hook, a
service, a person) makes no difference here, and libvirt is never called: a
hook that did would deadlock.
"""

import shutil
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address

from libvirt_natns import arp, dnsmasq, document, executor, host, names, plan, pool, selection
from libvirt_natns.errors import ConflictError, NatnsError, UpstreamError
from libvirt_natns.executor import Undo
from libvirt_natns.kernel import BRIDGE_PORTS, Kernel
from libvirt_natns.locks import locked
from libvirt_natns.model import Config, Network, Upstream
from libvirt_natns.planner import Planner
from libvirt_natns.store import START_LIMIT, Record, State, Store, boot_id, now

POLL = 0.02
"""Seconds between two looks at whether another network's start is over."""


@dataclass(frozen=True, slots=True)
class Engine:
    """All verbs over one configuration, one state database, one kernel session.

    ``before`` is called ahead of every change to the kernel, for logs and tests.
    """

    config: Config
    store: Store
    kernel: Kernel
    before: Callable[[plan.Operation], None] | None = None

    @property
    def planner(self) -> Planner:
        return Planner(self.config, self.store, self.kernel)

    # -- up ----------------------------------------------------------------

    def prepare(self, network: Network, xml: bytes) -> None:
        """Check all that can be refused and reserve what the network needs.

        Runs in libvirt's `start` hook, before the bridge exists.  Raises a
        NatnsError, and leaves nothing, where the network cannot come up.
        Waits while another network with an overlapping subnet is between its
        own `start` and `started`.
        """
        self._check_programs(network)
        upstream = self.planner.upstream(network)
        selection.check_addresses(network, upstream)
        self._check_bridge(network, upstream)
        with locked(names.network_directory(network.uuid)), Undo() as undo:
            undo.add(self._discard_directory, network.uuid)
            self._clear(network)
            self._reserve(network, xml, upstream, undo)
            self._await_turn(network, xml, upstream)
            undo.pop_all()

    def up(self, network: Network, xml: bytes) -> list[str]:
        """Make the network's namespace and all that is in it; returns what differed.

        Runs in `started`, when the bridge is there, and whenever a network must
        be repaired.  Raises a NatnsError and takes back what it created.
        """
        with locked(names.network_directory(network.uuid)), Undo() as undo:
            upstream = self._admit(network, xml, undo)
            address = self._address(network, upstream)
            host.ensure(self.kernel, self.planner.host_needs)
            operations = self.planner.plan(network, upstream, address)
            repaired = executor.carry_out(self.kernel, operations, undo, self.before)
            record = self.store.network(network.uuid)
            if repaired or record is None or record.state != "up":
                self.store.set_state(network.uuid, "up")
            undo.pop_all()
        return repaired

    def _admit(self, network: Network, xml: bytes, undo: Undo) -> Upstream:
        """The upstream of a network whose `start` was answered, or is made up for here."""
        upstream = self.planner.upstream(network)
        known = self.store.network(network.uuid)
        state = known.state if known and known.this_boot else None
        if state != "up":
            undo.add(self._discard_directory, network.uuid)
            # Later than the network's state is set back, so it does not count any more.
            undo.add(host.ensure, self.kernel, self.planner.host_needs)
        if state not in ("starting", "up"):
            selection.check_addresses(network, upstream)
            self._reserve(network, xml, upstream, undo)
            return upstream
        if state == "starting":
            undo.add(self.store.set_state, network.uuid, "down")
        if known and (known.document, known.upstream) != (xml, upstream.name):
            self.store.put(self._record(network, xml, upstream, known.state))
        return upstream

    def _check_programs(self, network: Network) -> None:
        self.planner.backend()
        if network.has_dnsmasq:
            dnsmasq.program()

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
        for rival in self.store.networks("preparing", "starting", "up"):
            if rival.uuid != network.uuid and self._superseded(rival, network):
                self._teardown(rival)
        namespace = plan.Namespace(names.namespace(network.name), network.uuid)
        owner = executor.namespace_owner(self.kernel, namespace)
        if owner == network.uuid:
            self._remove(network.uuid, namespace.name)
        elif owner is not None:
            raise ConflictError(
                f"network {network.name}: namespace {namespace.name} exists and is not ours",
                f"rename the network, or delete it (ip netns delete {namespace.name})",
            )

    def _superseded(self, rival: Record, network: Network) -> bool:
        """Whether a start of ``network`` shows that ``rival`` has gone unnoticed."""
        if rival.name == network.name:
            # libvirt has no two of a name, and starts none that is active.
            return True
        if rival.bridge != network.bridge or self.kernel.link(None, rival.bridge):
            return False
        return rival.state == "up" or now() - rival.since > START_LIMIT

    def _reserve(self, network: Network, xml: bytes, upstream: Upstream, undo: Undo) -> None:
        """Record the network and lease its address; ``undo`` takes back both."""
        leased = self.store.lease(upstream.name, network.uuid)
        self.store.put(self._record(network, xml, upstream, "preparing"))
        undo.add(self.store.set_state, network.uuid, "down")
        if leased is None:
            undo.add(self.store.release, upstream.name, network.uuid)

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
        host.ensure(self.kernel, self.planner.host_needs)

    def _remove(self, uuid: str, namespace: str) -> None:
        """Delete a namespace and all that belongs to it.

        Its links go first: a namespace that ends loses its rules before its
        links, and would let packets out untranslated in between.
        """
        steps: tuple[Callable[[], None], ...] = (
            partial(self.kernel.delete_link, names.upstream_patch(uuid)),
            partial(self.kernel.delete_link, names.private_patch(uuid)),
            partial(dnsmasq.stop, uuid),
            partial(self._delete_own_namespace, uuid, namespace),
            partial(self._discard_directory, uuid),
        )
        errors = []
        for step in steps:
            try:
                step()
            except NatnsError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _delete_own_namespace(self, uuid: str, namespace: str) -> None:
        # None: nothing, or the empty file that a killed start left.
        owner = executor.namespace_owner(self.kernel, plan.Namespace(namespace, uuid))
        if owner in (uuid, None):
            self.kernel.delete_namespace(namespace)

    @staticmethod
    def _discard_directory(uuid: str) -> None:
        directory = names.network_directory(uuid)
        shutil.rmtree(directory, ignore_errors=True)
        with suppress(OSError):
            # Only the last network finds it empty.
            directory.parent.rmdir()

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
