# SPDX-License-Identifier: LGPL-2.1-or-later
"""Metrics in Prometheus' text format: the only user of prometheus-client.

Gauges are counted at each question.  Counters count events as they happen, in the service
alone.  A counter has no label for the network: a host that starts a transient network for
each job would have ever more labels.  The log has the network of each event.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from libvirt_natns import __version__
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile.obstacles import KINDS, ObstacleKind
from libvirt_natns.service import census

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds: from an event that changes nothing to the longest wait for another network."""

WITHOUT_SERVICE = (
    "# The service does not answer: metrics of answers, changes and heals are missing.\n"
)

KindsByNetwork = Mapping[str, Collection[ObstacleKind]]
"""The kinds of obstacles that a network has, by its name."""

NONE_LOOKED_AT: KindsByNetwork = {}
"""The service looks for obstacles now and then; before its first look there is no gauge."""

GaugeRow = tuple[tuple[str, ...], float | None]
"""A gauge's labels and value; None leaves it out."""


class _Registry(CollectorRegistry):
    """Leaves out the series with the time at which each counter was made."""

    def collect(self) -> Iterator[Metric]:
        """See ``CollectorRegistry``."""
        for family in super().collect():
            family.samples = [
                sample for sample in family.samples if not sample.name.endswith("_created")
            ]
            yield family


class Metrics:
    """The counters of the service; safe for threads."""

    def __init__(self) -> None:
        self._registry = _Registry()
        ProcessCollector(registry=self._registry)
        self._answers = self._histogram(
            "hook_duration_seconds",
            "Time that the service took to answer hooks and questions.",
            ("hook", "operation", "outcome"),
        )
        self._changes = self._histogram(
            "change_duration_seconds", "Time that changes of networks took.", ("verb",)
        )
        self._heals = self._histogram(
            "heal_duration_seconds",
            "Time that healing a network, or the host's shared part, took.",
            (),
        )
        self._failures = Counter(
            "libvirt_natns_failures_total",
            "Attempts of the service that failed.",
            ("what",),
            registry=self._registry,
        )

    def _histogram(self, name: str, text: str, labels: tuple[str, ...]) -> Histogram:
        return Histogram(
            f"libvirt_natns_{name}", text, labels, buckets=BUCKETS, registry=self._registry
        )

    def answered(self, hook: str, operation: str, outcome: str, seconds: float) -> None:
        """Count an answer to a hook or a person; ``outcome`` is "done" or "refused"."""
        self._answers.labels(hook, operation, outcome).observe(seconds)

    def changed(self, verb: str, seconds: float) -> None:
        """Count a verb that has ended well."""
        self._changes.labels(verb).observe(seconds)

    def healed(self, seconds: float) -> None:
        """Count a repair of damage."""
        self._heals.observe(seconds)

    def failed(self, what: str) -> None:
        """Count a failure; ``what`` is one of a few words."""
        self._failures.labels(what).inc()

    def text(
        self,
        engine: Engine,
        given_up: Collection[str] = (),
        obstacles: KindsByNetwork = NONE_LOOKED_AT,
    ) -> str:
        """Return all metrics; ``given_up`` are the networks that are not healed any more.

        Raises StoreError.
        """
        counted: bytes = generate_latest(self._registry)
        return gauges(engine, given_up, obstacles) + counted.decode()


def gauges(
    engine: Engine,
    given_up: Collection[str] | None = None,
    obstacles: KindsByNetwork = NONE_LOOKED_AT,
) -> str:
    """Return the gauges; None stands for what only the service knows, where it does not answer.

    Raises StoreError.
    """
    registry = CollectorRegistry()
    registry.register(_Gauges(census.take(engine), given_up, obstacles))
    text: bytes = generate_latest(registry)
    return text.decode()


class _Gauges(Collector):
    """Turns a census into families of gauges."""

    def __init__(
        self,
        counted: census.Census,
        given_up: Collection[str] | None,
        obstacles: KindsByNetwork,
    ) -> None:
        self._counted = counted
        self._given_up = given_up
        self._obstacles = obstacles

    def collect(self) -> Iterator[Metric]:
        """See ``Collector``."""
        yield _gauge("build_info", "The version.", ("version",), [((__version__,), 1)])
        yield from self._all_networks()
        yield from self._pools()
        yield from self._each_network()

    def _all_networks(self) -> Iterator[Metric]:
        states = [((state,), number) for state, number in self._counted.networks.items()]
        yield _gauge("networks", "Recorded networks, by state.", ("state",), states)
        if self._given_up is not None:
            text = "Networks, and the shared part of the host, that are not healed any more."
            yield _gauge("networks_given_up", text, (), [((), len(self._given_up))])
        text = "Running guests with published ports or addresses."
        yield _gauge("guests", text, (), [((), self._counted.guests)])

    def _pools(self) -> Iterator[Metric]:
        pools = self._counted.pools.items()
        for name, text, rows in (
            (
                "pool_addresses",
                "Addresses, or prefixes, that an upstream's pool can lease.",
                [(key, pool.size) for key, pool in pools],
            ),
            (
                "pool_leased_addresses",
                "Upstream addresses, or prefixes, that are leased, also to networks that are down.",
                [(key, pool.leased) for key, pool in pools],
            ),
            (
                "pool_used_addresses",
                "Leased upstream addresses, or prefixes, of networks and guests that run.",
                [(key, pool.in_use) for key, pool in pools],
            ),
        ):
            yield _gauge(name, text, ("upstream", "kind"), rows)

    def _each_network(self) -> Iterator[Metric]:
        running = self._counted.running
        for name, text, rows in (
            (
                "forwards",
                "Published ports and ranges that are in force.",
                [((network.name,), network.forwards) for network in running],
            ),
            (
                "dhcp_leases",
                "DHCP leases of guests that have not expired.",
                [((network.name,), network.dhcp_leases) for network in running],
            ),
            (
                "dnsmasq_running",
                "1 if the dnsmasq that the network needs runs, else 0.",
                [((network.name,), network.dnsmasq) for network in running],
            ),
            (
                "conntrack_entries",
                "Connections that are tracked in the network's namespace.",
                [((network.name,), network.connections) for network in running],
            ),
            (
                "conntrack_entries_limit",
                "Connections that can be tracked in the network's namespace.",
                [((network.name,), network.limit) for network in running],
            ),
        ):
            yield _gauge(name, text, ("network",), rows)
        kinds = [
            ((name, kind), kind in found)
            for name, found in self._obstacles.items()
            for kind in KINDS
        ]
        text = (
            "1 if the obstacle keeps the network's guests from the outside or from names, else 0."
        )
        yield _gauge("network_obstacle", text, ("network", "obstacle"), kinds)


def _gauge(name: str, text: str, labels: tuple[str, ...], rows: Iterable[GaugeRow]) -> Metric:
    family = GaugeMetricFamily(f"libvirt_natns_{name}", text, labels=labels)
    for values, value in rows:
        if value is not None:
            family.add_metric(values, value)
    return family
