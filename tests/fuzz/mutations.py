# SPDX-License-Identifier: LGPL-2.1-or-later
"""Mutations of documents: in their structure, in their values, in their octets.

All choices come from a ``random.Random``, so a seed names a case.  Hypothesis hands
in a ``Random`` of its own and shrinks the choices.
"""

import re
from collections.abc import Callable, Sequence
from random import Random

ELEMENT = re.compile(rb"<([A-Za-z_][\w:.-]*)(?:[^<>\"']|\"[^\"]*\"|'[^']*')*?(/?)>")
VALUE = re.compile(rb"=\s*(\"[^\"]*\"|'[^']*')")
ATTRIBUTE = re.compile(rb"\s([A-Za-z_][\w:.-]*)\s*=")
TEXT = re.compile(rb">([^<>]+)<")
LINE = re.compile(rb"[^\n]*\n?")

ODD: Sequence[bytes] = (
    b"",
    b" ",
    b"0",
    b"-1",
    b"1",
    b"68",
    b"65535",
    b"65536",
    b"99999999999999999999",
    b"9" * 5000,
    b"0x" + b"f" * 5000,
    "٣".encode(),
    "²".encode(),
    b"a" * 64,
    b"a" * 300,
    b"a" * 1100,
    "é".encode(),
    "\u202ex\u2066".encode(),
    "\u2028bogus".encode(),
    "\u0085bogus".encode(),
    "\ufeff".encode(),
    "\U0010ffff".encode(),
    b"&#10;bogus",
    b"&#13;bogus",
    b"&#9;",
    b"&#x9b;31m",
    b"&#x2028;bogus",
    b"&#1;",
    b"&#xd800;",
    b"&lt;x/&gt;",
    b"&quot;; drop; &quot;",
    b"a&quot; accept #",
    b"a;b{c}",
    b"a b",
    b"a,b",
    b"a#b",
    b"a/b",
    b"a*",
    b"a+",
    b"+a",
    b"=a",
    b"a~0",
    b"!a",
    b"-j",
    b"--help",
    b"..",
    b"../../etc/passwd",
    b"%d",
    b"%s",
    b"$(reboot)",
    b"`reboot`",
    b"yes",
    b"no",
    b"auto",
    b"ignore",
    b"lo",
    b"upstream",
    b"all",
    b"tcp",
    b"sctp",
    b"ipv4",
    b"ipv6",
    b"nat",
    b"none",
    b"open",
    b"10.0.0.1",
    b"10.0.0.0",
    b"10.0.0.255",
    b"10.0.0.5",
    b"10.00.0.1",
    b"0.0.0.0",
    b"127.0.0.1",
    b"169.254.0.1",
    b"224.0.0.1",
    b"255.255.255.255",
    b"255.255.0.255",
    b"192.168.0.150",
    b"10.0.0.1/24",
    b"10.0.0.0/24,10.0.0.1",
    b"10.0.0.1-10.0.0.9",
    b"::",
    b"::1",
    b"::ffff:10.0.0.1",
    b"fe80::1",
    b"fe80::1%eth0",
    b"fd00::1",
    b"fd00::/64",
    b"ff02::1",
    b"2001:db8::1",
    b"52:54:00:00:00:05",
    b"5:4:0:0:0:5",
    b"ff:ff:ff:ff:ff:ff",
    b"52:54:00:00:00:05,10.0.0.7",
    b"c0ffee00-0000-4000-8000-000000000001",
    b"urn:libvirt-natns:1",
)
"""Values that some reader of them could take for something else."""

PIECES: Sequence[bytes] = (
    b"<",
    b">",
    b"/>",
    b"<a>",
    b"</a>",
    b"<!--",
    b"-->",
    b"<![CDATA[",
    b"]]>",
    b"<?pi x?>",
    b"<!DOCTYPE a>",
    b'<!DOCTYPE a [<!ENTITY b "b">]>',
    b"&b;",
    b"&amp;",
    b'<?xml version="1.0" encoding="utf-16"?>',
    b'<?xml version="1.0" encoding="foo"?>',
    b'<?xml version="1.1"?>',
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x00",
    b"\x85",
    b"\r\n",
    b"<name>other</name>",
    b"<uuid>c0ffee00-0000-4000-8000-000000000002</uuid>",
    b"<forward mode='nat'/>",
    b"<forward/>",
    b"<network>",
    b"</network>",
    b"<domain>",
    b"</metadata>",
    b"<natns:nat xmlns:natns='urn:libvirt-natns:1'/>",
    b"<natns:nat xmlns:natns='urn:libvirt-natns:1' enabled='no'/>",
    b"<natns:portForward><natns:range start='1'/></natns:portForward>",
    b"<x:y/>",
    "<x:preț/>".encode(),
    b"<mtu size='9000'/>",
    b"<route address='10.9.0.0' prefix='24' gateway='10.0.0.9'/>",
    b"<route family='ipv6' address='fd09::' prefix='64' gateway='fd00::9'/>",
    b"<dns><forwarder domain='x' addr='10.9.9.9'/></dns>",
    b"<dns><txt name='x' value='a, b'/></dns>",
    b"<dns><srv service='a' protocol='tcp' target='x' port='1'/></dns>",
    b"<dns><host ip='10.0.0.9'><hostname>x</hostname></host></dns>",
    b"<ip address='10.2.0.1' prefix='24'/>",
    b"<ip family='ipv6' address='fd02::1' prefix='64'/>",
)

Mutation = Callable[[Random, bytes], bytes]


def _span(random: Random, data: bytes, pattern: re.Pattern[bytes], group: int) -> tuple[int, int]:
    """A place in ``data`` that ``pattern`` matches, looked for from a random octet on."""
    start = random.randrange(len(data) + 1)
    found = pattern.search(data, start) or pattern.search(data)
    return found.span(group) if found else (start, start)


def _replace(data: bytes, span: tuple[int, int], text: bytes) -> bytes:
    return data[: span[0]] + text + data[span[1] :]


def value(random: Random, data: bytes) -> bytes:
    """Put an odd value in the place of an attribute's."""
    begin, end = _span(random, data, VALUE, 1)
    quote = data[begin : begin + 1] if end > begin else b'"'
    return _replace(data, (begin, end), quote + random.choice(ODD) + quote)


def extend_value(random: Random, data: bytes) -> bytes:
    """Put something odd into an attribute's value."""
    begin, end = _span(random, data, VALUE, 1)
    place = random.randint(min(begin + 1, end), max(end - 1, begin))
    return _replace(data, (place, place), random.choice(ODD))


def attribute(random: Random, data: bytes) -> bytes:
    """Rename an attribute, by the name of another one."""
    other = _span(random, data, ATTRIBUTE, 1)
    return _replace(data, _span(random, data, ATTRIBUTE, 1), data[slice(*other)])


def text(random: Random, data: bytes) -> bytes:
    """Put something odd in the place of text."""
    return _replace(data, _span(random, data, TEXT, 1), random.choice(ODD))


def element(random: Random, data: bytes) -> bytes:
    """Remove, double or move an element, as far as its tags tell."""
    found = ELEMENT.search(data, random.randrange(len(data) + 1))
    if found is None:
        return data
    begin, end = found.span()
    if not found[2]:
        closing = data.find(b"</" + found[1] + b">", end)
        end = end if closing < 0 else closing + len(found[1]) + 3
    whole = data[begin:end]
    rest = _replace(data, (begin, end), b"")
    how = random.randrange(3)
    if how == 0:
        return rest
    base = data if how == 1 else rest
    place = _span(random, base, ELEMENT, 0)[random.randrange(2)]
    return _replace(base, (place, place), whole)


def piece(random: Random, data: bytes) -> bytes:
    """Insert a piece of markup, mostly between elements."""
    place = _span(random, data, ELEMENT, 0)[1]
    if random.randrange(4) == 0:
        place = random.randrange(len(data) + 1)
    return _replace(data, (place, place), random.choice(PIECES))


def octets(random: Random, data: bytes) -> bytes:
    """Change some octets, or remove or double a run of them."""
    begin = random.randrange(len(data) + 1)
    end = min(len(data), begin + random.randint(1, 16))
    how = random.randrange(4)
    if how == 0:
        return _replace(data, (begin, end), b"")
    if how == 1:
        return _replace(data, (begin, begin), data[begin:end])
    if how == 2:
        return _replace(data, (begin, begin + 1), bytes([random.randrange(256)]))
    return data[:begin]


def line(random: Random, data: bytes) -> bytes:
    """Remove or double a line, or put an odd value behind its sign of equality."""
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    how = random.randrange(3)
    if how == 0:
        del lines[place]
    elif how == 1:
        lines.insert(random.randrange(len(lines) + 1), lines[place])
    else:
        key, sign, _ = lines[place].partition(b"=")
        lines[place] = key + sign + random.choice(ODD)
    return b"\n".join(lines)


XML: Sequence[Mutation] = (
    *(value, value, value, extend_value, attribute, text),
    *(element, element, element, piece, piece, octets),
)
LINES: Sequence[Mutation] = (line, line, line, octets, value, extend_value)


def mutated(random: Random, seeds: Sequence[bytes], mutations: Sequence[Mutation]) -> bytes:
    """One of the seeds after a few mutations."""
    data = random.choice(seeds)
    for _ in range(random.choice((0, 1, 1, 1, 2, 2, 3, 5, 8))):
        data = random.choice(mutations)(random, data)
    return data
