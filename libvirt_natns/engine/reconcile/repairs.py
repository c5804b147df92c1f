# SPDX-License-Identifier: LGPL-2.1-or-later
"""Repairs of several networks at once.

Each worker has a database connection and a kernel session of its own.  A network without
differences costs processor time alone, of which Python gives one thread at a time.  A repair
mostly waits: for an address that might answer, for dnsmasq, and for the kernel.  So workers
are added while no network is done.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace

from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.reconcile.active import Finding
from libvirt_natns.errors import named
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.state.store import Store

NamedRepair = tuple[str, Callable[[Engine], list[str]]]
"""A network's name, and a function that repairs the network and returns what was wrong."""

WORKERS = 8
"""The most networks that are repaired at once."""

PATIENCE = 0.02
"""Seconds without a network that is done, after which one worker more begins."""

ROUNDS = 3
"""The most repairs of one network, if its XML in libvirt changes at the same time."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Differences that were repaired, and the errors of those that could not be."""

    repaired: list[Finding]
    errors: list[str]


def repair_all(engine: Engine, repairs: Iterable[NamedRepair]) -> Outcome:
    """Carry out all repairs, whichever of them fail."""
    return together(_outcomes(engine, repairs))


def repair_latest(
    engine: Engine,
    documents: Mapping[str, bytes],
    ask: Callable[[], Mapping[str, bytes] | None],
    repair: Callable[[str, bytes], NamedRepair],
) -> Outcome:
    """Repair each network or guest by its XML, and again if libvirt has other XML by then.

    An event may bring newer XML, and have it applied, between the listing and the repair.
    The repair by the older XML is wrong then, and no further event will come.
    """
    done: list[Outcome] = []
    for _ in range(ROUNDS):
        outcomes = _outcomes(engine, [repair(*each) for each in documents.items()])
        by_uuid = dict(zip(documents, outcomes, strict=True))
        touched = {uuid for uuid, one in by_uuid.items() if one.repaired or one.errors}
        latest = (ask() if touched else None) or {}
        documents = {
            uuid: latest[uuid]
            for uuid in touched & latest.keys()
            if latest[uuid] != documents[uuid]
        }
        for uuid, one in by_uuid.items():
            done.append(replace(one, errors=[]) if uuid in documents else one)
    return together(done)


def _outcomes(engine: Engine, repairs: Iterable[NamedRepair]) -> list[Outcome]:
    """Return the outcome of each repair, in order.  Several are carried out at once."""
    jobs = list(enumerate(repairs))
    waiting = deque(jobs)
    outcomes: dict[int, Outcome] = {}

    def work() -> None:
        with _engine_like(engine) as own:
            while waiting:
                try:
                    number, repair = waiting.popleft()
                except IndexError:
                    return
                outcomes[number] = _attempt(own, repair)
                # The kernel session would keep a socket in each namespace.
                own.kernel.close()

    if len(jobs) > 1:
        # A worker may get no thread, descriptor or database connection.
        with suppress(Exception), ThreadPoolExecutor(WORKERS) as pool:
            workers = [pool.submit(work)]
            while waiting and len(workers) < WORKERS:
                done = len(outcomes)
                if wait(workers, PATIENCE).not_done and len(outcomes) > done:
                    continue
                workers.append(pool.submit(work))
    for number, repair in waiting:
        outcomes[number] = _attempt(engine, repair)
    return [outcomes[number] for number, _ in jobs]


def together(outcomes: Iterable[Outcome]) -> Outcome:
    """Return several outcomes as one."""
    whole = Outcome([], [])
    for each in outcomes:
        whole.repaired.extend(each.repaired)
        whole.errors.extend(each.errors)
    return whole


@contextmanager
def _engine_like(engine: Engine) -> Iterator[Engine]:
    """Open a database connection and a kernel session for one worker."""
    with closing(Store(engine.store.path.parent)) as store, Kernel() as kernel:
        yield replace(engine, store=store, kernel=kernel)


def _attempt(engine: Engine, repair: NamedRepair) -> Outcome:
    name, fix = repair
    try:
        return Outcome([(name, what) for what in fix(engine)], [])
    except Exception as error:  # an error must not keep the other repairs
        return Outcome([], [named(name, error)])
