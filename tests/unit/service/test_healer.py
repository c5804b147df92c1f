# SPDX-License-Identifier: LGPL-2.1-or-later
"""When a network is looked at, and when it is given up."""

import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.observer import HOST, NOBODY
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.errors import KernelError
from libvirt_natns.firewall import nfnetlink
from libvirt_natns.model.configuration import Config
from libvirt_natns.service import healer, trouble
from libvirt_natns.service.healer import Healer
from libvirt_natns.service.log import Log
from libvirt_natns.state.networks import NetworkRecord

LIMIT = 10.0


class Networks:
    """A table of networks in which a network "x-1" has the name "x"."""

    def get(self, uuid: str) -> NetworkRecord:
        return cast(NetworkRecord, SimpleNamespace(name=uuid.partition("-")[0]))


class Sessions:
    """Sessions, and engines, with that table alone."""

    store = cast(Any, SimpleNamespace(networks=Networks()))

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        yield cast(Engine, self)


Look = Callable[[str], list[str] | None]


class Scripted(Healer):
    """A healer whose repairs do as they are told."""

    def __init__(self, look: Look) -> None:
        self.log = io.StringIO()
        self.looked: list[tuple[str, float]] = []
        self.healed: list[float] = []
        self.failures: list[str] = []
        self.script: Look = look
        super().__init__(
            Sessions(),
            Log(self.log),
            on_heal=self.healed.append,
            on_failure=self.failures.append,
            repair=self._play,
        )

    def _play(self, engine: Engine, uuid: str, record: NetworkRecord | None) -> list[str] | None:
        self.looked.append((uuid, time.monotonic()))
        return self.script(uuid)

    def times(self, uuid: str) -> int:
        return sum(each == uuid for each, _ in self.looked)

    def events(self) -> list[str]:
        return [line.split("network=")[0] for line in self.log.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same proportions, but faster."""
    names = (
        "DELAY", "HOST_DELAY", "HOST_PAUSE", "AGAIN", "RECHECK", "BRIDGE_PAUSE", "STARTING",
    )  # fmt: skip
    for name in names:
        monkeypatch.setattr(healer, name, getattr(healer, name) / 50)


@contextmanager
def running(look: Look) -> Iterator[Scripted]:
    made = Scripted(look)
    made.start()
    try:
        yield made
    finally:
        made.stop()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, condition
        time.sleep(0.002)


def test_what_is_well_is_not_spoken_of() -> None:
    with running(lambda uuid: []) as made:
        for _ in range(100):
            made.suspect("x-1")
        until(lambda: made.looked)
    assert made.times("x-1") == 1
    assert made.log.getvalue() == ""
    assert made.healed == []
    assert made.health() == {}


def test_a_repair_is_told_and_looked_at_once_more() -> None:
    answers = [["route is missing", "link is down"], []]
    with running(lambda uuid: answers.pop(0)) as made:
        made.suspect("x-1")
        until(lambda: not answers)
    assert made.log.getvalue().count("\n") == 1
    assert 'event=healed network=x wrong="route is missing; link is down" seconds=' in (
        made.log.getvalue()
    )
    assert len(made.healed) == 1


def test_who_keeps_undoing_it_wins_loudly() -> None:
    with running(lambda uuid: ["rules are missing"]) as made:
        made.suspect("x-1")
        until(made.health)
        assert made.health() == {
            "x-1": "repairs are undone repeatedly: rules are missing (repaired 6 times within 60 s)"
        }
        looked = made.times("x-1")
        assert looked == trouble.REPAIRS + 1
        made.suspect("x-1")
        made.suspect("y-1")
        until(lambda: made.times("y-1"))
        assert made.times("x-1") == looked
        assert made.events()[looked] == 'level=error event="given up" '
        assert made.failures[:1] == ["heal"]
        made.relent("x")
        assert "x-1" not in made.health()
        made.suspect("x-1")
        until(lambda: made.times("x-1") > looked)


def test_reloads_of_the_ruleset_are_no_fight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reload makes the tables of others anew."""
    numbers = iter(range(1000))
    monkeypatch.setattr(nfnetlink, "table_numbers", lambda: {"inet filter": next(numbers)})
    line = ["nftables: table inet natns is missing"]
    answers = [line for _ in range(trouble.ALL_REPAIRS * 2)] + [[]]
    with running(lambda uuid: answers.pop(0)) as made:
        made.suspect(HOST)
        until(lambda: not answers)
        assert made.health() == {}


def test_a_fight_is_over_when_something_changes() -> None:
    """The other program may have gone by then."""
    fighting = ["rules are missing"]
    with running(lambda uuid: fighting.copy()) as made:
        made.suspect("x-1")
        until(made.health)
        made.suspect("x-1")
        # Given up once more.
        until(lambda: made.times("x-1") == 2 * (trouble.REPAIRS + 1))
        until(made.health)
        fighting.clear()
        made.suspect("x-1")
        until(lambda: not made.health())


def test_repairs_of_different_things_are_no_fight() -> None:
    answers = [[f"thing {number} is missing"] for number in range(trouble.REPAIRS * 2)] + [[]]
    with running(lambda uuid: answers.pop(0)) as made:
        made.suspect("x-1")
        until(lambda: not answers)
        assert made.health() == {}


def test_anything_again_and_again_is_one() -> None:
    numbers = iter(range(1000))
    with running(lambda uuid: [f"foreign address {next(numbers)}"]) as made:
        made.suspect("x-1")
        until(made.health)
        assert made.times("x-1") == trouble.ALL_REPAIRS + 1


def refuse(uuid: str) -> list[str]:
    raise KernelError("bridge virbr10 is missing")


def test_what_cannot_be_repaired_is_tried_again_ever_more_seldom() -> None:
    with running(refuse) as made:
        made.suspect("x-1")
        until(made.health)
        assert made.health() == {"x-1": "cannot be repaired: bridge virbr10 is missing"}
        moments = [moment for _, moment in made.looked]
        pauses = [after - before for before, after in pairwise(moments)]
        assert len(moments) == trouble.REPAIRS + 1
        assert all(pause >= healer.AGAIN * 2**tried for tried, pause in enumerate(pauses))
        assert made.events() == [
            'level=warning event="not healed" ',
            'level=error event="given up" ',
        ]
        # Something has changed, and now it works.
        made.script = lambda uuid: []
        made.suspect("x-1")
        until(lambda: not made.health())
        until(lambda: len(made.events()) == 3)
        assert made.events()[2] == "level=notice event=recovered "


def test_a_change_that_does_not_help_is_not_told_of() -> None:
    with running(refuse) as made:
        made.suspect("x-1")
        until(made.health)
        looked = made.times("x-1")
        made.suspect("x-1")
        until(lambda: made.times("x-1") > looked)
        until(made.is_idle)
        assert len(made.events()) == 2
        assert made.health()


def test_a_slow_network_delays_no_other() -> None:
    release = threading.Event()

    def look(uuid: str) -> list[str]:
        if uuid == "slow-1":
            assert release.wait(LIMIT)
        return []

    with running(look) as made:
        made.suspect("slow-1")
        until(lambda: made.times("slow-1"))
        for number in range(5):
            made.suspect(f"x-{number}")
        until(lambda: len(made.looked) == 6)
        # Never twice at once.
        made.suspect("slow-1")
        made.suspect("y-1")
        until(lambda: made.times("y-1"))
        assert made.times("slow-1") == 1
        release.set()
        until(lambda: made.times("slow-1") == 2)


def test_the_host_comes_first_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healer, "HOST_DELAY", LIMIT)
    release = threading.Event()

    def look(uuid: str) -> list[str]:
        if uuid == HOST:
            assert release.wait(LIMIT)
        return []

    with running(look) as made:
        made.suspect(HOST)
        made.suspect("x-1")
        until(lambda: made.looked)
        time.sleep(healer.DELAY * 5)  # the network is long due
        assert [uuid for uuid, _ in made.looked] == [HOST]
        release.set()
        until(lambda: made.times("x-1"))


@pytest.mark.parametrize("why", ["a fight", "failures"])
def test_a_host_that_was_given_up_is_left_alone(why: str) -> None:
    def look(uuid: str) -> list[str]:
        if uuid == HOST and why == "failures":
            raise KernelError("no room")
        return ["rules are missing"] if uuid == HOST else []

    with running(look) as made:
        made.suspect(HOST)
        until(made.health)
        looked = made.times(HOST)
        for number in range(20):
            made.suspect(f"x-{number}")
            until(partial(made.times, f"x-{number}"))
        assert made.times(HOST) == looked
        assert HOST in made.health()


def test_a_host_that_could_not_be_repaired_is_tried_at_its_time() -> None:
    """A network that is due in between does not have the host tried at once."""

    def look(uuid: str) -> list[str]:
        if uuid == HOST:
            raise KernelError("no room")
        return []

    with running(look) as made:
        made.suspect(HOST)
        while not made.health():
            made.suspect("x-1")
            time.sleep(healer.DELAY)
        moments = [moment for uuid, moment in made.looked if uuid == HOST]
        pauses = [after - before for before, after in pairwise(moments)]
        assert all(pause >= healer.AGAIN * 2**tried for tried, pause in enumerate(pauses))


@pytest.mark.parametrize("uuid", [HOST, "x-1"])
def test_a_start_that_goes_on_says_nothing_of_a_network_that_was_given_up(uuid: str) -> None:
    with running(refuse) as made:
        made.suspect(uuid)
        until(made.health)
        told = made.events()
        looked = made.times(uuid)
        made.script = lambda uuid: None
        made.suspect(uuid)
        until(lambda: made.times(uuid) > looked + 1)
        assert uuid in made.health()
        assert made.events() == told


class Shared(Sessions):
    """An engine whose host lacks an address, while another network's start goes on."""

    def __init__(self, looks: int) -> None:
        self.observer = NOBODY
        self.looks = looks
        self.repairs = 0
        self.store = cast(Any, SimpleNamespace(networks=self))

    def all(self, *states: str) -> list[Any]:
        self.looks -= 1
        return [SimpleNamespace(unfinished=self.looks >= 0)]

    def get(self, uuid: str) -> None:
        return None

    def ensure_host(self) -> list[str]:
        self.repairs += 1
        return ["natns-host in the host lacks an address"]


def test_damage_in_the_host_during_a_start_is_repaired_after_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = Shared(looks=3)
    monkeypatch.setattr(
        comparison, "host_differences", lambda engine: [] if shared.repairs else ["lacks it"]
    )
    made = Healer(shared, Log(io.StringIO()))
    made.start()
    try:
        made.suspect(HOST)
        # Networks that are due meanwhile are not held up, nor does the host come first then.
        made.suspect("x-1")
        until(lambda: shared.repairs)
        assert shared.looks >= -3
    finally:
        made.stop()


def test_its_own_verbs_are_told_from_others() -> None:
    at_work = []

    def look(uuid: str) -> list[str]:
        at_work.append(made.at_work)
        made.relent("x")
        return ["rules are missing"]

    with running(look) as made:
        made.suspect("x-1")
        until(made.health)
        assert all(at_work)
        assert not made.at_work
