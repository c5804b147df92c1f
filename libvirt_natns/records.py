# SPDX-License-Identifier: LGPL-2.1-or-later
"""Data classes that cost a hook nothing to define.

The standard library's ``dataclass`` writes source text for six methods of each class and compiles
it.  That takes half a millisecond for each class, and 10 ms more for imports.  A hook is a fresh
process that libvirt waits for.  These classes are made of closures instead, in a fiftieth of that
time, and are about as quick in use.

As there: fields by annotation, defaults, ``__post_init__``, ``==``, ``repr``,
``replace``, ``asdict``, copies and pickles; frozen ones have a hash.  A subclass inherits
fields, and may give one a narrower type.  Not so: no ordering, no ``ClassVar``; that
``kw_only`` is kept to, only mypy watches.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, NoReturn, TypeVar, cast, dataclass_transform

T = TypeVar("T")
FIELDS = "__record_fields__"
DEFAULTS = "__record_defaults__"


class _Factory:
    """Makes a new default of a field for each instance."""

    __slots__ = ("make",)

    def __init__(self, make: Callable[[], object]) -> None:
        self.make = make


def field(*, default_factory: Callable[[], T]) -> T:
    """Return a field with a new default for each instance."""
    return cast("T", _Factory(default_factory))


@dataclass_transform(field_specifiers=(field,))
def dataclass(
    *,
    frozen: bool = False,
    slots: bool = False,
    kw_only: bool = False,
) -> Callable[[type[T]], type[T]]:
    """Make a class one of records; each annotation is a field, besides the inherited fields."""

    def make(cls: type[T]) -> type[T]:
        own = tuple(cls.__annotations__)
        inherited: tuple[str, ...] = getattr(cls, FIELDS, ())
        names = tuple(dict.fromkeys((*inherited, *own)))
        content = dict(cls.__dict__)
        former: dict[str, object] = getattr(cls, DEFAULTS, {})
        defaults = {name: value for name, value in former.items() if name not in own}
        defaults |= {name: content.pop(name) for name in own if name in content}
        # A second slot of one name would hide the first from the base's methods.
        new = tuple(name for name in own if name not in inherited)
        made: Any = _with_slots(cls, new, content) if slots else cls
        setattr(made, DEFAULTS, defaults)
        _add_methods(made, names, frozen)
        if slots:
            _add_state(made, names)
        made.__init__ = _initializer(made, names, defaults, slots)
        return cast("type[T]", made)

    return make


def _with_slots(cls: type[T], names: tuple[str, ...], content: dict[str, Any]) -> type[T]:
    """Return the class without a dictionary in its instances."""
    for implied in ("__dict__", "__weakref__"):
        content.pop(implied, None)
    kind: Any = type(cls)
    made: type[T] = kind(cls.__name__, cls.__bases__, content | {"__slots__": names})
    made.__qualname__ = cls.__qualname__
    return made


def _initializer(
    cls: type, names: tuple[str, ...], defaults: dict[str, object], slots: bool
) -> Callable[..., None]:
    stores = _stores(cls, names, slots)
    count = len(names)
    check: Callable[[object], None] | None = getattr(cls, "__post_init__", None)

    def init(self: object, *values: object, **named: object) -> None:
        if named or len(values) != count:
            values = _complete(cls, names, defaults, values, named)
        for store, value in zip(stores, values, strict=False):
            store(self, value)
        if check:
            check(self)

    return init


def _stores(cls: type, names: tuple[str, ...], slots: bool) -> list[Callable[..., None]]:
    """Return setters of the fields that bypass a frozen record's ``__setattr__``."""
    return [getattr(cls, name).__set__ if slots else partial(_store, name=name) for name in names]


def _store(record: object, value: object, name: str) -> None:
    object.__setattr__(record, name, value)


def _complete(
    cls: type,
    names: tuple[str, ...],
    defaults: dict[str, object],
    values: tuple[object, ...],
    named: dict[str, object],
) -> tuple[object, ...]:
    """Return the values of all fields, in their order.  Raises TypeError as any call does."""
    given = dict(zip(names, values, strict=False))
    if len(values) > len(names) or not given.keys().isdisjoint(named):
        raise TypeError(f"{cls.__qualname__} got a field twice, or too many values")
    found = defaults | given | named
    if len(found) != len(names):
        odd = sorted(found.keys() ^ set(names))
        raise TypeError(f"{cls.__qualname__} got too few or unknown fields: {', '.join(odd)}")
    return tuple(
        [each.make() if each.__class__ is _Factory else each for each in map(found.get, names)]
    )


def _add_methods(cls: type, names: tuple[str, ...], frozen: bool) -> None:
    """Add the methods that a class does not define itself."""
    values = attrgetter(*names)

    def equal(self: object, other: object) -> bool:
        return values(self) == values(other) if other.__class__ is cls else NotImplemented

    def digest(self: object) -> int:
        return hash(values(self))

    def text(self: object) -> str:
        content = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"{cls.__qualname__}({content})"

    methods: dict[str, object] = {FIELDS: names, "__eq__": equal, "__repr__": text}
    methods["__hash__"] = digest if frozen else None
    if frozen:
        methods |= {"__setattr__": _refuse, "__delattr__": _refuse}
    for name, method in methods.items():
        if cls.__dict__.get(name) is None:
            setattr(cls, name, method)


def _add_state(cls: type, names: tuple[str, ...]) -> None:
    """Add the methods that copy and pickle need without a dictionary."""
    stores = _stores(cls, names, slots=True)

    def state(self: object) -> list[object]:
        return [getattr(self, name) for name in names]

    def restore(self: object, values: list[object]) -> None:
        for store, value in zip(stores, values, strict=True):
            store(self, value)

    setattr(cls, "__getstate__", state)  # noqa: B010
    setattr(cls, "__setstate__", restore)  # noqa: B010


def _refuse(record: object, name: str, *_: object) -> NoReturn:
    raise AttributeError(f"{type(record).__qualname__}.{name} cannot be changed")


def fields(record: object) -> tuple[str, ...]:
    """Return the names of the fields of a record, or of a class of records."""
    names: tuple[str, ...] = getattr(record, FIELDS)
    return names


def replace(record: T, **changes: object) -> T:
    """Return the same record, with other values for the named fields."""
    return type(record)(**{name: getattr(record, name) for name in fields(record)} | changes)


def asdict(record: object) -> dict[str, Any]:
    """Return a record as a dictionary, and so the records in it."""
    return {name: _plain(getattr(record, name)) for name in fields(record)}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if hasattr(value, FIELDS):
        return asdict(value)
    if isinstance(value, list | tuple):
        return type(value)(_plain(each) for each in value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return value


__all__ = ["asdict", "dataclass", "field", "fields", "replace"]
