# SPDX-License-Identifier: LGPL-2.1-or-later
"""The sockets of a session: where they lead, and when they are opened again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, route_socket, rtnetlink
from libvirt_natns.kernel.channel import Sockets
from libvirt_natns.kernel.session import Kernel


class Machine:
    """Namespaces by name, as inodes; the calling thread is in one of them."""

    def __init__(self) -> None:
        self.named: dict[str, int] = {"nat-a": 1, "nat-b": 2}
        self.here = 0
        self.looked: list[str | None] = []

    def inode(self, name: str | None) -> int | None:
        self.looked.append(name)
        return self.named.get(name) if name else self.here

    @contextmanager
    def entered(self, name: str | None) -> Iterator[None]:
        if name and name not in self.named:
            raise KernelError(f"network namespace {name} is missing")
        self.here = self.named[name] if name else 0
        yield
        self.here = 0


class Opened:
    """A socket that knows the namespace in which it was made."""

    def __init__(self, machine: Machine) -> None:
        self.place = machine.here
        self.closed = False

    def link(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, alias=f"libvirt-natns {self.place}")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(netns, "inode", made.inode)
    monkeypatch.setattr(netns, "entered", made.entered)
    monkeypatch.setattr(rtnetlink, "Session", lambda: Opened(made))
    monkeypatch.setattr(route_socket, "IPRoute", lambda: Opened(made))
    return made


KINDS: dict[str, Callable[[Sockets, str | None], Any]] = {
    "reader": Sockets.reader,
    "writer": Sockets.writer,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_that_was_replaced_is_entered_anew(kind: str, machine: Machine) -> None:
    sockets, opened = Sockets(), KINDS[kind]
    former = opened(sockets, "nat-a")
    other = opened(sockets, "nat-b")
    machine.named["nat-a"] = 3
    sockets.doubt()
    assert opened(sockets, "nat-a").place == 3
    assert former.closed
    assert opened(sockets, "nat-b") is other


@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_that_was_deleted_is_missing(kind: str, machine: Machine) -> None:
    sockets, opened = Sockets(), KINDS[kind]
    opened(sockets, "nat-a")
    del machine.named["nat-a"]
    sockets.doubt()
    with pytest.raises(KernelError, match="nat-a is missing"):
        opened(sockets, "nat-a")


@pytest.mark.parametrize("place", ["nat-a", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_that_stays_is_opened_once_and_looked_at_once_a_lock(
    kind: str, place: str | None, machine: Machine
) -> None:
    sockets, opened = Sockets(), KINDS[kind]
    first = opened(sockets, place)
    machine.looked.clear()
    for _ in range(2):
        sockets.doubt()
        assert opened(sockets, place) is first
        assert opened(sockets, place) is first
    assert machine.looked == ([place] * 2 if place else [])


def test_the_owner_of_a_namespace_is_that_of_today(machine: Machine) -> None:
    kernel = Kernel()
    with kernel.work():
        with kernel.looking():
            assert kernel.namespace_owner("nat-a") == "1"
            machine.named["nat-a"] = 3
            assert kernel.namespace_owner("nat-a") == "1"
        kernel.distrust()
        with kernel.looking():
            assert kernel.namespace_owner("nat-a") == "3"


def test_both_sockets_of_a_name_lead_to_one_namespace(machine: Machine) -> None:
    """Also where the namespace is replaced between the two, and no lock was taken."""
    sockets = Sockets()
    reader = sockets.reader("nat-a")
    machine.named["nat-a"] = 3
    assert sockets.writer("nat-a").place == 3
    assert reader.closed  # type: ignore[attr-defined]
    assert sockets.reader("nat-a").place == 3  # type: ignore[attr-defined]


def test_a_namespace_made_anew_is_not_taken_for_the_former(machine: Machine) -> None:
    sockets = Sockets()
    sockets.writer("nat-a")
    sockets.close("nat-a")
    machine.named["nat-a"] = 3
    sockets.doubt()
    assert sockets.writer("nat-a").place == 3
