# SPDX-License-Identifier: LGPL-2.1-or-later
"""A first look at a network's XML: is it ours at all?

Far from a validation, and never refusing: what passes here is parsed in full
later.  It must work where the rest cannot (a broken configuration, a missing
library), and costs a guest's start hardly anything, so the standard library's
barest part must do.

libvirt accepts documents that expat does not (names of XML 1.0's fifth edition,
prefixes that are bound to no namespace): ``xml_tags`` reads these.
"""

NAMESPACE = "urn:libvirt-natns:1"
HEXADECIMAL = frozenset("0123456789abcdef")
LEVELS = 4
"""Depth, in elements, of all that is looked for; an element below is passed over."""


class Glance:
    """What a network's or a guest's XML says at first sight; "" for what it does not say.

    ``forwards``: it has a ``<forward>``; ``disabled``: its metadata says
    enabled="no".  ``addressed``: it has an ``<ip>`` with an address, ``addressed6``:
    with one of IPv6.  ``mac`` is the bridge's.  ``annotated``: its metadata has a
    ``<natns:nat>``.  ``owner`` is the uuid of the guest that a network's port belongs
    to.  ``networks`` and ``bridges`` are those that a guest's NICs name.  ``whole``: the
    document was read to its end.
    """

    __slots__ = (
        "addressed",
        "addressed6",
        "annotated",
        "bridge",
        "bridges",
        "disabled",
        "forwards",
        "mac",
        "name",
        "networks",
        "owner",
        "uuid",
        "whole",
    )

    def __init__(self) -> None:
        self.uuid = ""
        self.name = ""
        self.bridge = ""
        self.mac = ""
        self.owner = ""
        self.forwards = False
        self.disabled = False
        self.addressed = False
        self.addressed6 = False
        self.annotated = False
        self.whole = False
        self.networks: list[str] = []
        self.bridges: list[str] = []

    @property
    def untouched(self) -> bool:
        """Whether it is none of our business, whatever else is right or wrong."""
        return self.forwards or self.disabled

    @property
    def forwards6(self) -> bool:
        """Whether libvirt has the host forward IPv6 for it."""
        return self.forwards and self.addressed6

    def ours(self, scope: str) -> bool:
        """Return whether a network is to be handled in this scope.

        Decided ahead of any judgement on the content.  A network without address or
        ``<natns:nat>`` is none of ours; a document that cannot be read may be.
        """
        if self.untouched or self.annotated:
            return not self.untouched
        return scope != "annotated" and (self.addressed or not self.whole)


def at_network(data: bytes) -> Glance:
    """Look at a ``<network>``: alone, in a hook's ``<hookData>``, or in libvirt's status file."""
    return _look(data, "network")


def at_domain(data: bytes) -> Glance:
    """Look at a ``<domain>``; its bridge, MAC and owner are not looked for."""
    return _look(data, "domain")


def _look(data: bytes, root: str) -> Glance:
    # What xml.parsers.expat stands for, which takes three times as long to load.
    import pyexpat

    # libvirt's text is UTF-8, whatever a declaration in it says.
    parser = pyexpat.ParserCreate("utf-8", " ")
    reader = Reader(root)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(data, True)
        reader.found.whole = reader.met
    except (pyexpat.ExpatError, ValueError):
        from libvirt_natns.documents import xml_tags

        reader = Reader(root)
        whole = xml_tags.read(data, reader.start, reader.end, reader.text)
        reader.found.whole = whole and reader.met
        if not reader.found.whole:
            # It may stand behind the place where reading ended.
            reader.found.annotated |= NAMESPACE.encode() in data
    found = reader.found
    # They become files' names.
    found.uuid, found.owner = _uuid(found.uuid), _uuid(found.owner)
    return found


def _refuse_doctype(*_: object) -> None:
    raise ValueError("entities could be anything")


def _uuid(text: str) -> str:
    """The uuid as libvirt writes it; "" for what is none."""
    digits = "".join(text.split()).replace("-", "").lower()
    if len(digits) != 32 or not HEXADECIMAL.issuperset(digits):
        return ""
    parts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    return "-".join(digits[begin:end] for begin, end in parts)


class Reader:
    """Collects a Glance from a parser's events.

    ``path`` leads to the current element, or to its ancestor ``LEVELS`` deep.  Of
    elements that stand there once, the first one counts, as it does for ``libvirt_xml``.
    """

    def __init__(self, root: str) -> None:
        self.found = Glance()
        self._root = root
        self._path: list[str] = []
        self._depth = 0
        self._objects = 0
        # The field whose text is being read, in an element of that level and all below,
        # and the fields that have begun.
        self._field = ""
        self._level = 0
        self._begun: set[str] = set()

    @property
    def met(self) -> bool:
        """Return whether there is a network, or domain, at all."""
        return self._objects > 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Take note of an element; one of a namespace is called "NAMESPACE NAME"."""
        self._depth += 1
        if self._depth > LEVELS:
            return
        self._path.append(name)
        inside = self._inside()
        if inside and self._root == "network":
            self._in_network(inside, attributes)
        elif inside:
            self._in_domain(inside, attributes)
        self._begin(inside)

    def end(self, *_: str) -> None:
        """Take note of an element's end."""
        if self._depth <= LEVELS:
            del self._path[-1:]
            if len(self._path) < self._level:
                self._field = ""
        self._depth -= 1

    def text(self, characters: str) -> None:
        """Take note of text in the current element."""
        if self._field:
            setattr(self.found, self._field, getattr(self.found, self._field) + characters)

    def _begin(self, inside: list[str]) -> None:
        field = inside[0] if inside in (["uuid"], ["name"]) else ""
        if self._path == ["hookData", "networkport", "owner", "uuid"]:
            field = "owner"
        if field and field not in self._begun:
            self._begun.add(field)
            self._field, self._level = field, self._depth

    def _in_network(self, inside: list[str], attributes: dict[str, str]) -> None:
        found = self.found
        if inside == ["forward"]:
            found.forwards = True
        elif inside == ["ip"]:
            found.addressed |= "address" in attributes
            six = attributes.get("family") == "ipv6" or ":" in attributes.get("address", "")
            found.addressed6 |= six
        elif inside == ["bridge"] and "bridge" not in self._begun:
            self._begun.add("bridge")
            found.bridge = attributes.get("name", "")
        elif inside == ["mac"]:
            found.mac = found.mac or attributes.get("address", "").lower()
        else:
            self._in_metadata(inside, attributes)

    def _in_domain(self, inside: list[str], attributes: dict[str, str]) -> None:
        if inside == ["devices", "interface", "source"]:
            for named, key in ((self.found.networks, "network"), (self.found.bridges, "bridge")):
                if key in attributes:
                    named.append(attributes[key])
        else:
            self._in_metadata(inside, attributes)

    def _in_metadata(self, inside: list[str], attributes: dict[str, str]) -> None:
        if inside == ["metadata", f"{NAMESPACE} nat"]:
            self.found.annotated = True
            self.found.disabled |= attributes.get("enabled") == "no"

    def _inside(self) -> list[str]:
        """The path below the network or domain itself, of which the first one counts."""
        path = self._path
        root = 1 if path[0] in ("hookData", "networkstatus") else 0
        if path[root : root + 1] != [self._root]:
            return []
        self._objects += len(path) == root + 1
        return path[root + 1 :] if self._objects == 1 else []
