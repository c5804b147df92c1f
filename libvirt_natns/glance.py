# SPDX-License-Identifier: LGPL-2.1-or-later
"""A first look at a network's XML: is it ours at all?

Far from a validation, and never refusing: what passes here is parsed in full
later.  It must work where the rest cannot (a broken configuration, a missing
library), and costs a guest's start hardly anything, so the standard library's
barest part must do.
"""

NAMESPACE = "urn:libvirt-natns:1"
HEXADECIMAL = frozenset("0123456789abcdef-")


class Glance:
    """What a network's or a guest's XML says at first sight; "" for what it does not say.

    ``forwards``: it has a ``<forward>``; ``disabled``: its metadata says
    enabled="no".  ``mac`` is the bridge's.  ``annotated``: its metadata has a
    ``<natns:nat>``.  ``owner`` is the uuid of the guest that a network's port
    belongs to.
    """

    __slots__ = (
        "annotated",
        "bridge",
        "disabled",
        "forwards",
        "mac",
        "name",
        "owner",
        "uuid",
    )

    def __init__(self) -> None:
        self.uuid = ""
        self.name = ""
        self.bridge = ""
        self.mac = ""
        self.owner = ""
        self.forwards = False
        self.disabled = False
        self.annotated = False

    @property
    def untouched(self) -> bool:
        """Whether it is none of our business, whatever else is right or wrong."""
        return self.forwards or self.disabled


def at_network(data: bytes) -> Glance:
    """Look at a ``<network>``: alone, in a hook's ``<hookData>``, or in libvirt's status file."""
    return _look(data, "network")


def at_domain(data: bytes) -> Glance:
    """Look at a ``<domain>``; its bridge, MAC and owner are not looked for."""
    return _look(data, "domain")


def _look(data: bytes, root: str) -> Glance:
    # What xml.parsers.expat stands for, which takes three times as long to load.
    import pyexpat

    parser = pyexpat.ParserCreate(namespace_separator=" ")
    reader = _Reader(root)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    try:
        parser.Parse(data, True)
    except (pyexpat.ExpatError, ValueError):
        return Glance()
    found = reader.found
    # They become files' names.
    found.uuid, found.owner = _uuid(found.uuid), _uuid(found.owner)
    return found


def _uuid(text: str) -> str:
    stripped = text.strip()
    return stripped if HEXADECIMAL.issuperset(stripped) else ""


class _Reader:
    """Collects a Glance from expat's events; ``path`` leads to the current element."""

    def __init__(self, root: str) -> None:
        self.found = Glance()
        self.root = root
        self.path: list[str] = []

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.path.append(name)
        inside = self._inside()
        if inside == ["forward"]:
            self.found.forwards = True
        elif inside == ["metadata", f"{NAMESPACE} nat"]:
            self.found.annotated = True
            self.found.disabled |= attributes.get("enabled") == "no"
        elif inside == ["bridge"]:
            self.found.bridge = attributes.get("name", "")
        elif inside == ["mac"]:
            self.found.mac = attributes.get("address", "").lower()

    def end(self, name: str) -> None:
        self.path.pop()

    def text(self, characters: str) -> None:
        inside = self._inside()
        if inside == ["uuid"]:
            self.found.uuid += characters
        elif inside == ["name"]:
            self.found.name += characters
        elif self.path[1:] == ["networkport", "owner", "uuid"]:
            self.found.owner += characters

    def _inside(self) -> list[str]:
        """The path below the network or domain itself."""
        root = 1 if self.path[:1] in (["hookData"], ["networkstatus"]) else 0
        return self.path[root + 1 :] if self.path[root : root + 1] == [self.root] else []
