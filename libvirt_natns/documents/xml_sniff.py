# SPDX-License-Identifier: LGPL-2.1-or-later
"""A first look at the XML of a network or guest: is it ours at all?

The look validates and refuses nothing: a document that passes is parsed in full
later.  It must work where the rest cannot (a broken configuration, a missing
library), and cost a guest's start hardly anything.  So it uses the standard
library's barest part.

libvirt accepts documents that expat does not (names of XML 1.0's fifth edition,
prefixes that are bound to no XML namespace): ``xml_tags`` reads these documents.
"""

NAMESPACE = "urn:libvirt-natns:1"
HEXADECIMAL = frozenset("0123456789abcdef")
LEVELS = 4
"""Depth, in elements, of all elements that are looked for; deeper ones are skipped."""


class Glance:
    """Facts from a network's or a guest's XML; "" for a value that is missing there.

    ``forwards``: it has a ``<forward>``; ``disabled``: its metadata says
    enabled="no".  ``addressed``: it has an ``<ip>`` with an address, ``addressed6``:
    with an IPv6 address.  ``mac`` is the bridge's.  ``annotated``: its metadata has a
    ``<natns:nat>``.  ``owner`` is the uuid of the guest that a network's port belongs
    to.  A guest's NICs name ``networks`` and ``bridges``; ``nics`` is their number.
    ``whole``: the document was read to its end.
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
        "nics",
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
        self.nics = 0
        self.networks: list[str] = []
        self.bridges: list[str] = []

    @property
    def untouched(self) -> bool:
        """True if the network or guest is not ours, with or without faults in its XML."""
        return self.forwards or self.disabled

    @property
    def forwards6(self) -> bool:
        """True if libvirt has the host forward IPv6 for the network."""
        return self.forwards and self.addressed6

    def ours(self, scope: str) -> bool:
        """True if a network is to be handled in this scope.

        The answer comes ahead of any judgement on the content.  A network without address
        or ``<natns:nat>`` is not ours; a document that cannot be read may be ours.
        """
        if self.untouched or self.annotated:
            return not self.untouched
        return scope != "annotated" and (self.addressed or not self.whole)


def at_network(data: bytes) -> Glance:
    """Look at a ``<network>``: alone, in a hook's ``<hookData>``, or in libvirt's status file."""
    return _look(data, "network")


def at_domain(data: bytes) -> Glance:
    """Look at a ``<domain>``, without a look for a bridge, a MAC address or an owner."""
    return _look(data, "domain")


def _look(data: bytes, root: str) -> Glance:
    # xml.parsers.expat is this module, but takes three times as long to load.
    import pyexpat

    # libvirt's text is UTF-8, even where its declaration names another encoding.
    parser = pyexpat.ParserCreate("utf-8", " ")
    reader = GlanceReader(root)
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.text
    parser.StartDoctypeDeclHandler = _refuse_doctype
    try:
        parser.Parse(data, True)
        reader.found.whole = reader.met
    except (pyexpat.ExpatError, ValueError):
        from libvirt_natns.documents import xml_tags

        reader = GlanceReader(root)
        whole = xml_tags.read(data, reader.start, reader.end, reader.text)
        reader.found.whole = whole and reader.met
        if not reader.found.whole:
            # The metadata may stand behind the place where reading ended.
            reader.found.annotated |= NAMESPACE.encode() in data
    found = reader.found
    # The uuids become names of files.
    found.uuid, found.owner = _uuid(found.uuid), _uuid(found.owner)
    return found


def _refuse_doctype(*_: object) -> None:
    raise ValueError("entities could be anything")


def _uuid(text: str) -> str:
    """Return the uuid as libvirt writes it; "" for a text that is no uuid."""
    digits = "".join(text.split()).replace("-", "").lower()
    if len(digits) != 32 or not HEXADECIMAL.issuperset(digits):
        return ""
    parts = ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32))
    return "-".join(digits[begin:end] for begin, end in parts)


class GlanceReader:
    """Collects a Glance from a parser's events.

    ``path`` leads to the current element, or to its ancestor ``LEVELS`` deep.  Of
    several elements where one is allowed, the first counts, as it does for ``libvirt_xml``.
    """

    def __init__(self, root: str) -> None:
        self.found = Glance()
        self._root = root
        self._path: list[str] = []
        self._depth = 0
        self._objects = 0
        # The field that takes text now, in an element of that level and all below, and
        # the fields that have begun.
        self._field = ""
        self._level = 0
        self._begun: set[str] = set()

    @property
    def met(self) -> bool:
        """True if there is a network, or domain, at all."""
        return self._objects > 0

    def start(self, name: str, attributes: dict[str, str]) -> None:
        """Take note of an element; its name is "NAMESPACE NAME" in an XML namespace."""
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
        elif inside == ["devices", "interface"]:
            self.found.nics += 1
        else:
            self._in_metadata(inside, attributes)

    def _in_metadata(self, inside: list[str], attributes: dict[str, str]) -> None:
        if inside == ["metadata", f"{NAMESPACE} nat"]:
            self.found.annotated = True
            self.found.disabled |= attributes.get("enabled") == "no"

    def _inside(self) -> list[str]:
        """Return the path below the network or domain itself, of which the first counts."""
        path = self._path
        root = 1 if path[0] in ("hookData", "networkstatus") else 0
        if path[root : root + 1] != [self._root]:
            return []
        self._objects += len(path) == root + 1
        return path[root + 1 :] if self._objects == 1 else []
