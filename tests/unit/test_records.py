# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records behave like the standard library's data classes."""

import copy
import dataclasses
import pickle
from types import ModuleType
from typing import Any

import pytest

from libvirt_natns import records


def classes(made_by: ModuleType | Any) -> tuple[type[Any], type[Any]]:  # noqa: ANN401
    @made_by.dataclass(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 2

        @property
        def sum(self) -> int:
            return self.x + self.y

    @made_by.dataclass(slots=True)
    class Path:
        points: list[Point] = made_by.field(default_factory=list)
        name: str = ""

        def __post_init__(self) -> None:
            self.name = self.name.strip()

    return Point, Path


@records.dataclass(frozen=True, slots=True)
class Name:
    text: str
    others: tuple[str, ...] = ()


@pytest.mark.parametrize("made_by", [records, dataclasses])
def test_as_the_standard_library_has_it(made_by: ModuleType) -> None:
    point, path = classes(made_by)
    assert point(1) == point(1, 2) == point(x=1) == point(y=2, x=1) != point(2, 1)
    assert point(1).sum == 3
    assert hash(point(1)) == hash(point(1, 2))
    assert len({point(1), point(1, 2), point(2)}) == 2
    assert repr(point(1)).endswith("Point(x=1, y=2)")
    assert point(1) != (1, 2)
    assert made_by.replace(point(1), y=5) == point(1, 5)
    assert path().points is not path().points
    assert path(name=" a ").name == "a"
    assert made_by.asdict(path([point(1)], "a")) == {"points": [{"x": 1, "y": 2}], "name": "a"}
    with pytest.raises(AttributeError):
        point(1).x = 2
    with pytest.raises(AttributeError):
        del point(1).x
    with pytest.raises(AttributeError):
        path().other = 1
    with pytest.raises(TypeError):
        hash(path())
    for wrong in ({}, {"x": 1, "z": 2}):
        with pytest.raises(TypeError):
            point(**wrong)
    with pytest.raises(TypeError):
        point(1, 2, 3)
    with pytest.raises(TypeError):
        point(1, x=1)
    with pytest.raises(TypeError):
        made_by.replace(point(1), z=1)
    changed = path()
    changed.name = "b"
    assert changed == path(name="b")


def inheriting(made_by: ModuleType | Any) -> tuple[type[Any], type[Any]]:  # noqa: ANN401
    @made_by.dataclass(frozen=True, slots=True, kw_only=True)
    class Bridge:
        name: str | None = None
        mtu: int = 1500
        up: bool = True

        @property
        def said(self) -> str:
            return f"{self.name}: {self.mtu}"

    @made_by.dataclass(frozen=True, slots=True, kw_only=True)
    class Named(Bridge):
        name: str
        ports: tuple[str, ...] = ()
        mtu: int = 9000

    return Bridge, Named


@pytest.mark.parametrize("made_by", [records, dataclasses])
def test_fields_are_inherited(made_by: ModuleType) -> None:
    bridge, made = inheriting(made_by)
    named = made(name="br0", ports=("eth0",))
    assert named.said == "br0: 9000"
    assert made(name="br0", up=True, mtu=1) == made_by.replace(named, ports=(), mtu=1)
    assert not made_by.replace(named, up=False).up
    assert made_by.asdict(named) == {
        "name": "br0",
        "mtu": 9000,
        "up": True,
        "ports": ("eth0",),
    }
    assert bridge() == bridge(mtu=1500) != made(name="br0")
    assert bridge(name="br0", mtu=9000) != made(name="br0")
    with pytest.raises(TypeError):
        made()
    with pytest.raises(AttributeError):
        named.mtu = 1
    assert copy.copy(named) == named


def test_copies() -> None:
    name = Name("a", ("b",))
    assert copy.deepcopy(name) == pickle.loads(pickle.dumps(name)) == copy.copy(name) == name


def test_fields_are_told() -> None:
    assert records.fields(Name) == records.fields(Name("a")) == ("text", "others")
