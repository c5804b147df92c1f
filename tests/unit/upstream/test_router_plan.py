# SPDX-License-Identifier: LGPL-2.1-or-later
"""The plan of a router, the journal that observes it, and journals of earlier versions."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from libvirt_natns import names
from libvirt_natns.errors import KernelError, RouterError, StoreError
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import RouterUpstream
from libvirt_natns.operations.operation import ApplyContext, Operation, describe_plan
from libvirt_natns.upstream.router import (
    confirm_timer,
    confirmation,
    health,
    journal,
    nic_addresses,
    preflight,
    recover,
    router_files,
    router_plan,
)
from libvirt_natns.upstream.router.downstream import RouterNeeds
from libvirt_natns.upstream.router.host_link import HostEnd
from libvirt_natns.upstream.router.host_resolv_conf import Resolver
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.router_plan import RouterStep
from libvirt_natns.upstream.router.target import Target

EARLIER = Path(__file__).parent / "router"
"""The files of a router, as the version before this module wrote them."""

TARGET = Target(
    name="wan",
    nic="ens3",
    backend="nftables",
    host_subnet="192.168.158.0/24",
    ports=(("tcp", 22, 22),),
    addresses6=(),
    transit="10.213.252.0/22",
    servers=("192.0.2.53",),
)
NIC = Capture(
    name="ens3",
    index=2,
    mac="52:54:00:00:00:01",
    mtu=1400,
    flags=1,
    queue=1000,
    group=0,
    alias="",
    addresses=(nic_addresses.single("2001:db8::2", 64),),
)
RECORD = RouterRecord(TARGET, NIC, Resolver(), "going up", boot_id())
PLAN = """\
namespace natns-router-wan
link lo up in natns-router-wan
patch natns-wan (natns-router-wan) to host in natns-router-wan, MTU 1400
transit bridge transit (natns-transit-wan) in natns-router-wan
address 10.213.252.1/22 on transit in natns-router-wan
firewall of natns-router-wan: 15 rules, nftables
conntrack time-outs in natns-router-wan as in the host
NIC ens3 in natns-router-wan
addresses and routes of NIC ens3 in natns-router-wan
address 192.168.158.1/24 on host in natns-router-wan
address 192.168.158.2/24 on natns-wan in the host
/etc/resolv.conf names 192.0.2.53
"""


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    return tmp_path


def test_the_plan_in_words() -> None:
    plan = router_plan.make(RECORD, RouterNeeds())
    lines = describe_plan(step.operation for step in plan).splitlines(keepends=True)
    assert "".join(line for line in lines if not line.startswith("sysctl ")) == PLAN
    assert len({step.what for step in plan}) == len(plan)
    # The NIC moves into a namespace that filters already, and the host follows the NIC.
    order = [step.what for step in plan]
    assert order.index("load the rules") < order.index("move the NIC")
    assert order.index("move the NIC") < order.index("connect the host")


def test_a_plan_for_the_way_back_needs_no_sound_capture() -> None:
    damaged = replace(NIC, routes=(NicRoute("02"),))
    with pytest.raises(IndexError):
        HostEnd(TARGET, damaged).describe()
    plan = router_plan.make(replace(RECORD, before=damaged), None)
    assert len(plan) == len(router_plan.make(RECORD, RouterNeeds()))


# -- the journal observes --------------------------------------------------------


class NoKernel:
    """A kernel session for operations that do not use it."""

    def work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def looking(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forget(self) -> None:
        pass

    def distrust(self) -> None:
        pass


EVENTS: list[str] = []


@dataclass(frozen=True, slots=True)
class Noted(Operation):
    """An operation that notes what the journal has when the operation is done."""

    name: str
    fails: bool = False
    holds: bool = False
    stuck: bool = False

    def differs(self, kernel: Kernel) -> list[str]:
        return [] if self.holds else [self.name]

    def ensure(self, context: ApplyContext) -> None:
        EVENTS.append(f"{self.name}: {written()}")
        if self.fails:
            raise KernelError("refused")

    def take_back(self, kernel: Kernel) -> None:
        EVENTS.append(f"{self.name} back: {written()}")
        if self.stuck:
            raise KernelError("stuck")


def written() -> str:
    record = journal.load("wan")
    return f"{record.state}, {record.step}" if record else "nothing"


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """`router up` with other operations."""

    def run(*operations: Operation, within: float | None = None) -> list[str]:
        plan = tuple(RouterStep(f"do {each.name}", each) for each in operations)  # type: ignore[attr-defined]
        monkeypatch.setattr(router_plan, "make", lambda *_: plan)
        kernel: Any = NoKernel()
        return RouterLifecycle(Config(), kernel).up("wan", within)

    EVENTS.clear()
    monkeypatch.setattr(preflight, "upstream", lambda *_: RouterUpstream(name="wan", nic="ens3"))
    monkeypatch.setattr(preflight, "target", lambda *_, **__: (TARGET, NIC, Resolver()))
    return run


def test_each_operation_is_written_down_before_it_is_done(up: Callable[..., list[str]]) -> None:
    assert up(Noted("a"), Noted("b", holds=True), Noted("c")) == [
        "router wan is up: ens3 is in natns-router-wan"
    ]
    assert EVENTS == ["a: going up, do a", "c: going up, do c"]
    assert written() == "up, "


def test_a_router_whose_networks_are_not_known_begins_nothing(
    up: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        EVENTS.append(written())
        raise StoreError("the state database is damaged")

    monkeypatch.setattr(RouterLifecycle, "plan", fail)
    with pytest.raises(StoreError, match="damaged"):
        up(Noted("a"))
    assert EVENTS == ["nothing"]
    assert written() == "nothing"


def test_a_failure_is_taken_back_in_reverse_by_the_journal(up: Callable[..., list[str]]) -> None:
    with pytest.raises(RouterError, match="cannot do b: refused"):
        up(Noted("a"), Noted("b", fails=True), Noted("c"))
    assert EVENTS[:2] == ["a: going up, do a", "b: going up, do b"]
    back = "back: going down, do b"
    assert EVENTS[2:] == [f"c {back}", f"b {back}", f"a {back}"]
    assert written() == "nothing"


def test_an_operation_that_is_stuck_keeps_no_other_from_its_way_back(
    up: Callable[..., list[str]],
) -> None:
    with pytest.raises(KernelError, match="stuck"):
        up(Noted("a"), Noted("b", stuck=True), Noted("c", fails=True))
    assert [event.partition(":")[0] for event in EVENTS[3:]] == ["c back", "b back", "a back"]
    # The journal stays, so that the next command tries again.
    assert written() == "going down, do c"


def test_a_timer_that_does_not_start_is_named_without_a_step(
    up: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("cannot start the rollback timer")

    monkeypatch.setattr(confirm_timer, "arm", refuse)
    with pytest.raises(RouterError, match=r"^router wan: cannot start the rollback timer"):
        up(Noted("a"), within=60.0)


# -- others, until the lock is free ------------------------------------------------


@pytest.mark.parametrize("configured", [False, True])
def test_a_repair_leaves_a_router_down_that_others_took_down(
    configured: bool, up: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repair looks without the lock; `router down` has the lock, and ends first."""

    def take_down(*_: object) -> list[str]:
        journal.discard("wan")
        return ["it is damaged"]

    up(Noted("a"), Noted("b", holds=True))
    EVENTS.clear()
    monkeypatch.setattr(health, "differences", take_down)
    verbs = RouterLifecycle(Config(), cast("Kernel", NoKernel()))
    assert health.repair_all(verbs, configured=configured) == []
    assert (EVENTS, written()) == ([], "nothing")


def test_a_repair_carries_out_what_differs(
    up: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    up(Noted("a"), Noted("b", holds=True))
    EVENTS.clear()
    monkeypatch.setattr(health, "differences", lambda *_: ["it is damaged"])
    verbs = RouterLifecycle(Config(), cast("Kernel", NoKernel()))
    assert health.repair_all(verbs) == ["router wan: a"]
    assert EVENTS == ["a: up, "]


VERBS: dict[str, Callable[[RouterLifecycle], object]] = {
    "up": lambda verbs: verbs.up("wan"),
    "repair": lambda verbs: verbs.repair("wan", configured=False),
    "boot": lambda verbs: verbs.boot(RouterUpstream(name="wan", nic="ens3"), NIC),
    "expire": lambda verbs: verbs.expire("wan", 0.0),
    "follow_lease": lambda verbs: verbs.follow_lease("wan"),
    "down": lambda verbs: verbs.down("wan"),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.usefixtures("up")
def test_a_verb_trusts_no_reading_from_before_its_lock(
    verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ReadBefore(NoKernel):
        def distrust(self) -> None:
            EVENTS.append("distrust")

    @contextmanager
    def lock() -> Iterator[None]:
        EVENTS.append("lock")
        yield

    def read(*_: object) -> None:
        EVENTS.append("read")
        raise KernelError("enough")

    monkeypatch.setattr(router_files, "lock", lock)
    for module, name in ((recover, "load"), (recover, "overdue"), (journal, "load")):
        monkeypatch.setattr(module, name, read)
    with pytest.raises(KernelError, match="enough"):
        VERBS[verb](RouterLifecycle(Config(), cast("Kernel", ReadBefore())))
    assert EVENTS == ["lock", "distrust", "read"]


# -- files of an earlier version -------------------------------------------------


def test_a_router_of_the_version_before_is_read_and_planned(state_directory: Path) -> None:
    """Its NIC has a bit of everything; the files were written before routers were plans."""
    shutil.copytree(EARLIER, state_directory / "routers")
    record, confirmed = journal.load("wan"), confirmation.load("wan")
    assert record is not None
    assert confirmed is not None
    assert (confirmed.target, confirmed.before) == (record.target, record.before)
    assert (record.state, record.target.addresses6[1]) == ("up", "2001:db8:1::10")
    words = describe_plan(
        step.operation for step in router_plan.make(record, RouterNeeds())
    ).splitlines()
    host = [
        line.removesuffix(" on natns-wan in the host") for line in words if "natns-wan " in line
    ]
    assert host[1:] == [
        "address 192.168.158.2/24, fe80::2/64, 2001:db8:1::11/128, 2001:db8:1::10/128",
        "route 0.0.0.0/0 via 192.168.158.1",
        "route ::/0 via fe80::1",
    ]
    assert "/etc/resolv.conf names 198.51.100.1" in words


def test_the_files_of_a_router_are_those_of_the_version_before(state_directory: Path) -> None:
    """After a downgrade, the earlier version takes the router back."""
    shutil.copytree(EARLIER, state_directory / "routers")
    record = journal.load("wan")
    assert record is not None
    journal.save(record)
    confirmation.save(record)
    for kind in ("json", "kept"):
        written, earlier = names.router_file("wan", kind), EARLIER / f"wan.{kind}"
        assert json.loads(written.read_text()) == json.loads(earlier.read_text())
