# SPDX-License-Identifier: LGPL-2.1-or-later
"""Carrying out a plan: what is changed, in which order, and how it is taken back."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Interface, IPv6Address
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from libvirt_natns import names
from libvirt_natns.errors import (
    AddressTakenError,
    ConflictError,
    FirewallError,
    KernelError,
)
from libvirt_natns.firewall.backends import fingerprint
from libvirt_natns.kernel import address_probe, netns
from libvirt_natns.kernel.veth import VethPair
from libvirt_natns.operations.addressing import Addresses, SendLimit, Withdrawal
from libvirt_natns.operations.carry_out import carry_out, plan_differences
from libvirt_natns.operations.firewall_operations import Firewall, fingerprint_file
from libvirt_natns.operations.link_operations import LinkUp, Patch
from libvirt_natns.operations.namespaces import Namespace, namespace_owner
from libvirt_natns.operations.neighbour_operations import Announcement, ProxiedNeighbours
from libvirt_natns.operations.operation import Operation
from libvirt_natns.operations.undo import Undo

UUID = "c0ffee00-0000-4000-8000-000000000001"
OTHER = "c0ffee00-0000-4000-8000-000000000002"
ADDRESS = IPv4Interface("10.0.0.1/24")
NAMESPACE = Namespace("nat-a", UUID)
UP = LinkUp("nat-a", "virbr10")
WITHDRAWAL = Withdrawal("virbr10", ADDRESS)
PATCH = Patch("nat-a", "virbr10", "0a:0", "natin-1", "fe:0", "natns-private-a", 1500)
ANNOUNCEMENT = Announcement("nat-a", "upstream", IPv4Address("192.0.2.1"), "0a:0", 0.2)


class FakeKernel:
    """Notes every change in ``done``; what exists is in plain attributes.

    ``broken`` is the change that fails, after it was made.  All namespaces are one, with
    one patch, one link and the addresses ``host``.
    """

    def __init__(self, broken: str = "") -> None:
        self.done: list[str] = []
        self.broken = broken
        self.owner: str | None = None
        self.patched = False
        self.up = False
        self.host_addresses = {ADDRESS}
        self.patches = FakePatches(self)

    def at(self, _: str | None) -> "FakeView":
        return FakeView(self)

    @property
    def host(self) -> "FakeView":
        return FakeView(self)

    def work(self) -> AbstractContextManager[None]:
        return nullcontext()

    def looking(self) -> AbstractContextManager[None]:
        return nullcontext()

    def forget(self) -> None:
        pass

    def note(self, change: str) -> None:
        self.done.append(change)
        if self.broken == change:
            raise KernelError(f"{change} is broken")

    def namespace_owner(self, name: str) -> str | None:
        return self.owner

    def create_namespace(self, name: str, owner: str) -> None:
        self.owner = owner
        self.note("create namespace")

    def delete_namespace(self, name: str) -> None:
        self.owner = None
        self.note("delete namespace")


class FakePatches:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def exists(self, pair: VethPair) -> bool:
        return self.kernel.patched

    def differences(self, pair: VethPair) -> list[str]:
        return [] if self.kernel.patched else ["patch is missing"]

    def create(self, pair: VethPair) -> None:
        self.kernel.patched = True
        self.kernel.note("create patch")


class FakeView:
    def __init__(self, kernel: FakeKernel) -> None:
        self.links = FakeLinks(kernel)
        self.addresses = FakeAddresses(kernel)


class FakeLinks:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def delete(self, name: str) -> None:
        self.kernel.patched = False
        self.kernel.note(f"delete {name}")

    def differences(self, name: str) -> list[str]:
        return [] if self.kernel.up else ["link is down"]

    def set_up(self, name: str) -> None:
        self.kernel.up = True
        self.kernel.note("set up")


class FakeAddresses:
    def __init__(self, kernel: FakeKernel) -> None:
        self.kernel = kernel

    def of(self, link: str) -> set[IPv4Interface]:
        return set(self.kernel.host_addresses)

    def foreign(self, link: str, wanted: Iterable[IPv4Interface]) -> set[IPv4Interface]:
        return set()

    def add(self, link: str, address: IPv4Interface) -> None:
        self.kernel.host_addresses.add(address)
        self.kernel.note("add address")

    def remove(self, link: str, address: IPv4Interface) -> None:
        self.kernel.host_addresses.discard(address)
        self.kernel.note("remove address")

    def replace(self, link: str, wanted: Iterable[IPv4Interface]) -> None:
        self.kernel.host_addresses = set(wanted)
        self.kernel.note("set addresses")


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    return tmp_path


def carried_out(kernel: Any, *plan: Operation, **more: Any) -> list[str]:  # noqa: ANN401
    with Undo() as undo:
        repaired = carry_out(kernel, plan, undo, **more)
        undo.pop_all()
    return repaired


def test_everything_is_made_once() -> None:
    kernel = FakeKernel()
    told: list[object] = []
    plan = (NAMESPACE, PATCH, WITHDRAWAL, UP)
    repaired = carried_out(kernel, *plan, before=told.append)
    assert told == list(plan)
    # Of a namespace that is new nobody wants to hear what it lacks.
    assert repaired == ["namespace nat-a is missing"]
    made = list(kernel.done)
    assert carried_out(kernel, *plan, before=told.append) == []
    assert kernel.done == made
    assert len(told) == len(plan)


def test_what_fails_is_taken_back_in_reverse() -> None:
    kernel = FakeKernel(broken="set up")
    with pytest.raises(KernelError, match="set up is broken"):
        carried_out(kernel, NAMESPACE, PATCH, WITHDRAWAL, UP)
    assert kernel.done[-3:] == ["add address", "delete natin-1", "delete namespace"]
    assert (kernel.owner, kernel.patched, kernel.host_addresses) == (None, False, {ADDRESS})


@pytest.mark.parametrize("broken", ["create namespace", "create patch", "remove address"])
def test_the_half_made_is_taken_back_too(broken: str, run_directory: Path) -> None:
    kernel = FakeKernel(broken=broken)
    with pytest.raises(KernelError, match=f"{broken} is broken"):
        carried_out(kernel, NAMESPACE, PATCH, WITHDRAWAL, UP)
    assert (kernel.owner, kernel.patched, kernel.host_addresses) == (None, False, {ADDRESS})
    assert not list(run_directory.rglob("namespace"))


def test_what_was_there_is_never_taken_back() -> None:
    kernel = FakeKernel(broken="set up")
    kernel.owner, kernel.patched, kernel.host_addresses = UUID, True, set()
    with pytest.raises(KernelError):
        carried_out(kernel, NAMESPACE, PATCH, WITHDRAWAL, UP)
    assert kernel.done == ["set up"]


def test_an_undo_that_fails_hides_nothing_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = FakeKernel(broken="set up")
    monkeypatch.setattr(FakeLinks, "delete", failing)
    with pytest.raises(KernelError, match="set up is broken"):
        carried_out(kernel, NAMESPACE, PATCH, WITHDRAWAL, UP)
    assert kernel.done[-2:] == ["add address", "delete namespace"]


def failing(*_: object) -> None:
    raise KernelError("cannot be taken back")


class NeighbourKernel:
    """Answers for fd00::2, and has no limit of packet sizes as it should be."""

    def work(self) -> AbstractContextManager[None]:
        return nullcontext()

    looking = work

    def at(self, _: str | None) -> SimpleNamespace:
        return SimpleNamespace(
            neighbours6=SimpleNamespace(proxied=lambda _: {IPv6Address("fd00::2")}),
            route_limits=SimpleNamespace(differing=lambda destinations, *_: list(destinations)),
        )


def test_differences_show_what_was_expected() -> None:
    """The missing and the extra proxy entries, and the limit that a route should have."""
    answered = ProxiedNeighbours("nat-a", "virbr10", (IPv6Address("fd00::1"),))
    limits = [SendLimit("nat-a", "virbr10", (ADDRESS,), (), mtu) for mtu in (1400, None)]
    assert plan_differences(cast("Any", NeighbourKernel()), [answered, *limits]) == [
        "proxy entries on virbr10 in nat-a differ: missing fd00::1, extra fd00::2",
        "packets to 10.0.0.0/24 in nat-a are not limited to 1400 octets",
        "packets to 10.0.0.0/24 in nat-a are limited below the MTU of virbr10",
    ]


@pytest.mark.parametrize(("owner", "whose"), [("", "another program"), (OTHER, OTHER)])
def test_a_foreign_namespace_is_refused_and_spared(owner: str, whose: str) -> None:
    kernel = FakeKernel()
    kernel.owner = owner
    with pytest.raises(ConflictError, match=f"namespace nat-a belongs to {whose}"):
        carried_out(kernel, NAMESPACE)
    assert kernel.done == []
    assert kernel.owner == owner


def test_the_untagged_namespace_of_a_killed_start_is_made_anew() -> None:
    class KilledError(BaseException):
        pass

    def killed(name: str, owner: str) -> None:
        kernel.owner = ""
        raise KilledError

    kernel = FakeKernel()
    kernel.create_namespace = killed  # type: ignore[method-assign]
    with pytest.raises(KilledError):
        # Nothing is taken back by a process that is gone.
        carry_out(kernel, [NAMESPACE], Undo())  # type: ignore[arg-type]
    later = FakeKernel()
    later.owner = ""
    assert namespace_owner(later, NAMESPACE) == UUID  # type: ignore[arg-type]
    carried_out(later, NAMESPACE)
    assert later.done == ["delete namespace", "create namespace"]
    # From now on an untagged one would be a stranger's.
    later.owner = ""
    assert namespace_owner(later, NAMESPACE) == ""  # type: ignore[arg-type]


def test_neighbours_are_told_only_when_something_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[object] = []
    monkeypatch.setattr(Announcement, "ensure", lambda *_: announced.append(1))
    kernel = FakeKernel()
    kernel.up = True
    assert carried_out(kernel, UP, ANNOUNCEMENT) == []
    assert not announced
    kernel.up = False
    second = replace(ANNOUNCEMENT, address=ANNOUNCEMENT.address + 1)
    # Telling so is no repair of its own.
    assert carried_out(kernel, UP, ANNOUNCEMENT, second) == ["link is down"]
    assert len(announced) == 2


def test_differences_go_on_after_an_error_but_not_into_a_missing_namespace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = FakeKernel()
    monkeypatch.setattr(kernel.patches, "differences", failing)
    plan = (NAMESPACE, PATCH, UP)
    assert plan_differences(kernel, plan) == [  # type: ignore[arg-type]
        "namespace nat-a is missing"
    ]
    kernel.owner = UUID
    assert plan_differences(kernel, plan) == [  # type: ignore[arg-type]
        "cannot be taken back",
        "link is down",
    ]
    assert kernel.done == []


# Firewall


class FakeBackend:
    """A firewall that holds what was loaded; ``fails`` as long as that is set."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.held = ""
        self.fails = False
        self.is_gone = False
        self.listed = 0
        self.meddler: Callable[[], None] = lambda: None
        self._changes = 0
        self._seen = ""

    def render(self, rules: object, layout: str) -> str:
        return f"{self.name} {rules} {layout}"

    def apply(self, namespace: str, rules: object, layout: str) -> None:
        if self.fails:
            raise FirewallError("it refuses")
        self.held = self._seen = self.render(rules, layout)
        self._changes += 1
        self.meddler()

    def clear(self, namespace: str) -> None:
        if self.is_gone:
            raise FirewallError("its program is missing")
        self.held = ""

    def digest(self, namespace: str) -> str:
        self.listed += 1
        return fingerprint(f"dump of {self.held}") if self.held else ""

    def listing(self, namespace: str) -> str:
        return self.held

    def generation(self, namespace: str) -> str:
        if self.held != self._seen:
            self._seen = self.held
            self._changes += 1
        return "" if self.name == "iptables" else str(self._changes)


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeBackend]:
    both = {name: FakeBackend(name) for name in ("nftables", "iptables")}
    choose: Callable[[str], FakeBackend] = both.__getitem__
    monkeypatch.setattr("libvirt_natns.firewall.backends.named", choose)
    return both


def rules(backend: str) -> Firewall:
    return Firewall("nat-a", UUID, backend, ())


def test_rules_are_loaded_once_and_again_when_altered(backends: dict[str, FakeBackend]) -> None:
    kernel = FakeKernel()
    assert carried_out(kernel, rules("nftables")) == ["firewall of nat-a is missing or was altered"]
    assert backends["nftables"].listed == 1
    assert carried_out(kernel, rules("nftables")) == []
    # As long as the kernel counts no change, the rules need not be listed.
    assert backends["nftables"].listed == 1
    backends["nftables"].held += " and more"
    assert carried_out(kernel, rules("nftables"))
    assert "more" not in backends["nftables"].held


@pytest.mark.parametrize("damage", ["directory", "link", "octets", "words"])
def test_rules_are_loaded_whatever_is_in_the_fingerprints_place(
    backends: dict[str, FakeBackend], damage: str
) -> None:
    file = fingerprint_file(UUID)
    file.parent.mkdir(parents=True)
    if damage == "directory":
        (file / "more").mkdir(parents=True)
    elif damage == "link":
        file.symlink_to("/nowhere/at/all")
    elif damage == "words":
        file.write_text("rules of another program")
    else:
        file.write_bytes(b"\xff\xfe")
    assert carried_out(FakeKernel(), rules("nftables"))
    assert file.is_file()
    assert not file.is_symlink()
    assert carried_out(FakeKernel(), rules("nftables")) == []


def test_rules_of_a_router_that_an_earlier_version_loaded_are_current(
    backends: dict[str, FakeBackend], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version wrote a digest of the listing, and no generation."""
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path)
    firewall = replace(rules("nftables"), owner="wan", layout="router")
    carried_out(FakeKernel(), firewall)
    file = firewall.rule_set.file
    assert file == tmp_path / "routers" / "wan.rules"
    wanted = file.read_text().split()[:2]
    assert len(file.read_text().split()) == 4
    file.write_text(" ".join([*wanted, fingerprint(backends["nftables"].held)]))
    assert firewall.rule_set.was_loaded_last()
    assert carried_out(FakeKernel(), firewall) == []
    backends["nftables"].held += " and more"
    assert carried_out(FakeKernel(), firewall)


def test_a_former_backend_that_cannot_work_is_told_of_once(
    backends: dict[str, FakeBackend],
) -> None:
    """Such as nftables, where the program nft was removed while networks run."""
    kernel = FakeKernel()
    carried_out(kernel, rules("nftables"))
    backends["nftables"].is_gone = True
    with pytest.raises(FirewallError, match="its program is missing"):
        carried_out(kernel, rules("iptables"))
    assert carried_out(kernel, rules("iptables")) == []


def test_a_full_disk_does_not_keep_rules_away(
    backends: dict[str, FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    carried_out(FakeKernel(), rules("nftables"))
    assert backends["nftables"].held


def test_a_change_elsewhere_in_the_namespace_is_none_of_the_rules(
    backends: dict[str, FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = FakeKernel()
    carried_out(kernel, rules("nftables"))
    monkeypatch.setattr(backends["nftables"], "generation", lambda _: "another")
    assert carried_out(kernel, rules("nftables")) == []
    assert backends["nftables"].listed == 2


def test_what_was_loaded_into_another_namespace_does_not_count(
    backends: dict[str, FakeBackend],
) -> None:
    kernel = FakeKernel()
    carried_out(kernel, NAMESPACE, rules("nftables"))
    assert fingerprint_file(UUID).exists()
    kernel.owner = None
    carried_out(kernel, NAMESPACE)
    assert not fingerprint_file(UUID).exists()


def test_what_was_done_is_not_looked_at() -> None:
    kernel = FakeKernel()
    assert carried_out(kernel, NAMESPACE, PATCH, UP, done=(NAMESPACE, PATCH)) == []
    assert kernel.done == ["set up"]


def test_rules_that_somebody_changes_meanwhile_are_loaded_again(
    backends: dict[str, FakeBackend],
) -> None:
    kernel = FakeKernel()
    backend = backends["nftables"]
    meddled: list[str] = []

    def meddle() -> None:
        if len(meddled) < 2:
            meddled.append(backend.held)
            backend.held = "somebody else's"

    backend.meddler = meddle
    carried_out(kernel, rules("nftables"))
    assert len(meddled) == 2
    assert backend.held == meddled[0]
    assert not plan_differences(kernel, [rules("nftables")])  # type: ignore[arg-type]


def test_rules_that_somebody_always_changes_are_given_up(backends: dict[str, FakeBackend]) -> None:
    backend = backends["nftables"]

    def meddle() -> None:
        backend.held += "!"

    backend.meddler = meddle
    with pytest.raises(FirewallError, match="another program changes the rules"):
        carried_out(FakeKernel(), rules("nftables"))


def test_a_change_right_after_the_load_is_not_taken_for_ours(
    backends: dict[str, FakeBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest of a change by another program would make that change look loaded."""
    kernel, backend = FakeKernel(), backends["nftables"]
    read = backend.digest

    def meddle(namespace: str) -> str:
        backend.held += " and more"
        return read(namespace)

    monkeypatch.setattr(backend, "digest", meddle)
    carried_out(kernel, rules("nftables"))
    monkeypatch.setattr(backend, "digest", read)
    assert carried_out(kernel, rules("nftables"))
    assert "more" not in backend.held
    assert carried_out(kernel, rules("nftables")) == []


@pytest.mark.parametrize("name", ["nftables", "iptables"])
def test_no_rules_at_all_are_never_what_was_wanted(
    backends: dict[str, FakeBackend], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken away between loading and listing, by somebody who is seen by no number."""
    kernel, backend = FakeKernel(), backends[name]
    monkeypatch.setattr(backend, "generation", lambda _: "")
    backend.meddler = lambda: setattr(backend, "held", "")
    carried_out(kernel, rules(name))
    assert plan_differences(kernel, [rules(name)])  # type: ignore[arg-type]
    backend.meddler = lambda: None
    carried_out(kernel, rules(name))
    assert not plan_differences(kernel, [rules(name)])  # type: ignore[arg-type]


def test_what_nobody_waits_for_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[object] = []

    def announce(link: str, address: object, mac: str, probing: float) -> bool:
        announced.append((link, probing))
        return len(announced) < 2

    monkeypatch.setattr(netns, "entered", lambda _: nullcontext())
    monkeypatch.setattr(address_probe, "announce", announce)
    kept: list[Callable[[], None]] = []
    carried_out(FakeKernel(), NAMESPACE, ANNOUNCEMENT, later=kept.append)
    assert not announced
    (work,) = kept
    work()
    # Who goes on has time to ask first.
    assert announced == [("upstream", ANNOUNCEMENT.probing)]
    with pytest.raises(AddressTakenError, match=r"192\.0\.2\.1 of nat-a is in use"):
        work()


def test_only_a_new_address_is_probed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address in force is announced after a repair, and never given up to a neighbour."""
    announced: list[object] = []

    def announce(link: str, address: object, mac: str, probing: float) -> bool:
        announced.append((address, probing))
        return True

    monkeypatch.setattr(netns, "entered", lambda _: nullcontext())
    monkeypatch.setattr(address_probe, "announce", announce)
    kernel = FakeKernel()
    held = IPv4Interface("192.0.2.1/24")
    kernel.host_addresses = {held}
    new = IPv4Interface("192.0.2.2/32")
    addresses = Addresses("nat-a", "upstream", (held, new))
    other = replace(ANNOUNCEMENT, address=new.ip)
    carried_out(kernel, addresses, ANNOUNCEMENT, other, later=lambda work: work())
    assert announced == [(held.ip, 0.0), (new.ip, ANNOUNCEMENT.probing)]
    announced.clear()
    carried_out(kernel, addresses, ANNOUNCEMENT, other, later=lambda work: work())
    assert announced == []
    carried_out(kernel, UP, ANNOUNCEMENT, later=lambda work: work())
    assert announced == [(held.ip, 0.0)]


def test_a_new_address_of_a_start_that_was_built_ahead_is_announced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    announced: list[object] = []

    def announce(link: str, address: object, mac: str, probing: float) -> bool:
        announced.append(address)
        return True

    monkeypatch.setattr(netns, "entered", lambda _: nullcontext())
    monkeypatch.setattr(address_probe, "announce", announce)
    kernel = FakeKernel()
    kernel.owner = UUID
    moved = Addresses("nat-a", "upstream", (IPv4Interface("192.0.2.1/24"),))
    carried_out(kernel, NAMESPACE, moved, ANNOUNCEMENT, done=[NAMESPACE])
    assert announced == [ANNOUNCEMENT.address]


def test_another_backend_takes_over_even_after_a_failure(backends: dict[str, FakeBackend]) -> None:
    kernel = FakeKernel()
    carried_out(kernel, rules("nftables"))
    backends["iptables"].fails = True
    with pytest.raises(FirewallError):
        carried_out(kernel, rules("iptables"))
    assert backends["nftables"].held
    backends["iptables"].fails = False
    assert carried_out(kernel, rules("iptables"))
    assert backends["iptables"].held
    assert not backends["nftables"].held
