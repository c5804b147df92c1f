# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forwards as they are typed, and the metadata that adding and removing them makes."""

import pytest

from libvirt_natns.cli import forward_edit
from libvirt_natns.cli.forward_edit import ListenLookup, Options
from libvirt_natns.cli.forward_spec import Spec, parse_new, parse_old
from libvirt_natns.documents import domain_edit, libvirt_xml
from libvirt_natns.documents.xml_values import MutableElement
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError

HEAD = '<natns:nat xmlns:natns="urn:libvirt-natns:1">'
FOREIGN = '<my:note xmlns:my="urn:mine"><my:nat a="1"/></my:note>'
CHOSEN = {("", "tcp", 22): 20000, ("guestAddress=10.0.0.7", "tcp", 22): 20001}
AROUND = ListenLookup(
    lambda which: {"192.168.0.101" if which.network == "b" else "192.168.0.100", "2001:db8::100"},
    lambda which, proto, to: CHOSEN.get((str(which), proto, to)),
)


def domain(content: str | None) -> bytes:
    nat = "" if content is None else f"{HEAD}{content}</natns:nat>"
    return f"<domain><name>web</name><metadata>{FOREIGN}{nat}</metadata></domain>".encode()


def forward(ranges: str, attributes: str = "") -> str:
    return f"<natns:portForward{attributes}>{ranges}</natns:portForward>"


def plain(content: str) -> str:
    return content.replace("natns:", "")


def added(content: str | None, spec: str, options: Options | None = None) -> domain_edit.Edited:
    wanted = parse_new(spec)
    edited = domain_edit.edit_nat(
        domain(content), lambda nat: forward_edit.add(nat, wanted, options or Options())
    )
    libvirt_xml.parse_domain(edited.document)
    return edited


def removed(content: str, spec: str) -> str | None:
    found: list[bool] = []
    edited = domain_edit.edit_nat(
        domain(content),
        lambda nat: found.append(forward_edit.remove(nat, parse_old(spec), AROUND)),
    )
    if found == [False]:
        raise LookupError(spec)
    libvirt_xml.parse_domain(edited.document)
    assert FOREIGN.encode() in edited.document
    return edited.element


# -- what is typed -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("22", Spec("tcp", None, (22, 22), None)),
        ("2222:22", Spec("tcp", None, (2222, 2222), (22, 22))),
        ("127.0.0.1:53/udp", Spec("udp", "127.0.0.1", (53, 53), None)),
        ("10.0.0.1:1-3:4-6/sctp", Spec("sctp", "10.0.0.1", (1, 3), (4, 6))),
        ("1-3:80/tcp", Spec("tcp", None, (1, 3), (80, 80))),
        ("auto:22", Spec("tcp", None, None, (22, 22))),
        ("[2001:DB8:0::1]:8080:80", Spec("tcp", "2001:db8::1", (8080, 8080), (80, 80))),
        ("[2001:db8::1]:auto:22/udp", Spec("udp", "2001:db8::1", None, (22, 22))),
    ],
)
def test_what_can_be_typed(text: str, spec: Spec) -> None:
    assert parse_new(text) == spec


@pytest.mark.parametrize(
    "text",
    [
        "", "ssh", "0", "65536", "3-1", "1:2:3", "1-2:1-3", "22:1-3", "auto", "auto:1-2", "22/icmp",
        "256.0.0.1:22", "*:22", "-1", "22:0", "22/", " 22", "10.0.0.1", "٢",
        "2001:db8::1:22", "[2001:db8::1]", "[10.0.0.1]:22", "[1::2::3]:22", "[fe80::1%a]:22",
    ],
)  # fmt: skip
def test_what_cannot(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse_new(text)


def test_what_is_removed_has_no_target() -> None:
    assert parse_old("*:22") == Spec("tcp", "*", (22, 22), None)
    assert parse_old("auto:22") == Spec("tcp", None, None, (22, 22))
    with pytest.raises(ValueError, match="listening address and port"):
        parse_old("2222:22")


# -- adding --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "ranges"),
    [
        ("2222:22", '<range start="2222" to="22"/>'),
        ("22:22", '<range start="22"/>'),
        ("8000-8010", '<range start="8000" end="8010"/>'),
        ("8000-8010:9000-9010", '<range start="8000" end="8010" to="9000"/>'),
        ("8000-8010:80", '<range start="8000" end="8010" to="80" toEnd="80"/>'),
        ("auto:22", '<range start="auto" to="22"/>'),
    ],
)
def test_added_ranges(spec: str, ranges: str) -> None:
    expected = f'<nat><portForward proto="tcp">{ranges}</portForward></nat>'
    assert added(None, spec).element == expected


def test_added_attributes() -> None:
    options = Options("a", None, "10.0.0.0/8,192.168.0.0/24", "10.0.0.9")
    element = added(None, "192.168.0.100:53/udp", options).element
    assert element == (
        '<nat><portForward proto="udp" address="192.168.0.100" network="a" guestAddress="10.0.0.9"'
        ' source="10.0.0.0/8,192.168.0.0/24"><range start="53"/></portForward></nat>'
    )


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    with pytest.raises(ValueError, match="needs brackets"):
        parse_new("2001:db8::1:8080")
    assert str(parse_old("[2001:db8::1]:8080")) == "tcp [2001:db8::1]:8080"


def test_added_in_ipv6() -> None:
    options = Options(source="2001:db8::/32", guest_address="fd00::5")
    assert added(None, "[2001:db8::1]:80", options).element == (
        '<nat><portForward proto="tcp" address="2001:db8::1" guestAddress="fd00::5"'
        ' source="2001:db8::/32"><range start="80"/></portForward></nat>'
    )
    with pytest.raises(DocumentError, match="addresses of one family"):
        added(None, "192.168.0.9:80", options)


def test_adding_keeps_everything_else() -> None:
    before = "<!-- mine -->" + forward('<natns:range start="1"/>') + '<natns:address network="b"/>'
    edited = added(before, "2222:22")
    assert FOREIGN.encode() in edited.document
    new = '<portForward proto="tcp"><range start="2222" to="22"/></portForward>'
    assert edited.element == f"<nat>{plain(before)}{new}</nat>"


def test_what_is_there_is_not_added_again() -> None:
    with pytest.raises(ConflictError, match="already"):
        added(forward('<natns:range start="2222" to="22"/>'), "2222:22")


@pytest.mark.parametrize(
    ("content", "spec", "options", "part"),
    [
        (forward("<natns:range start='8080' to='80'/>"), "8080:81", Options(), "tcp 8080"),
        (forward("<natns:range start='8000' end='8010'/>"), "8010-8020", Options(),
         "tcp 8000-8010"),
        (forward("<natns:range start='53'/>", " proto='udp'"), "53:54/udp", Options(), "udp 53"),
        (forward("<natns:range start='80'/>", " network='b'"), "80:81", Options(network="b"),
         "tcp 80"),
        (forward("<natns:range start='80'/>", " mac='52:54:00:00:00:0a'"), "80:81",
         Options(mac="52:54:00:00:00:0A"), "tcp 80"),
        (forward("<natns:range start='80'/>", " source='10.0.0.0/8'"), "80:81",
         Options(source="10.0.0.0/8"), "tcp 80"),
        (forward("<natns:range start='80'/>", " source='10.0.0.0/8'"), "80", Options(), "tcp 80"),
        (forward("<natns:range start='auto' to='22'/>"), "auto:22",
         Options(source="10.0.0.0/8"), "tcp auto:22"),
    ],
)  # fmt: skip
def test_ports_of_another_forward(content: str, spec: str, options: Options, part: str) -> None:
    with pytest.raises(NatnsError) as refused:
        added(content, spec, options)
    assert str(refused.value) == (
        f"{parse_new(spec)} is forwarded already, as a part of {part}:"
        " choose another port, or remove that forward first"
    )


@pytest.mark.parametrize(
    ("content", "spec", "options"),
    [
        (forward("<natns:range start='80'/>"), "80/udp", Options()),
        (forward("<natns:range start='80'/>", " address='192.168.0.150'"), "80:81", Options()),
        (forward("<natns:range start='80'/>", " network='b'"), "80:81", Options(network="a")),
        (forward("<natns:range start='80'/>", " source='10.0.0.0/8'"), "80:81",
         Options(source="2001:db8::/64")),
        (forward("<natns:range start='8000' end='8010'/>"
                 "<natns:range start='8005' exclude='yes'/>"), "8005:80", Options()),
        (forward("<natns:range start='auto' to='22'/>"), "auto:23", Options()),
    ],
)  # fmt: skip
def test_ports_in_another_place(content: str, spec: str, options: Options) -> None:
    """The metadata is right: ``added`` parses it."""
    assert added(content, spec, options).element


# -- removing ------------------------------------------------------------------------


def test_the_last_one_takes_the_element_along() -> None:
    assert removed(forward('<natns:range start="2222" to="22"/>'), "2222") is None


def test_one_of_several_ranges() -> None:
    two = forward('<natns:range start="1"/><natns:range start="5" end="6"/>')
    assert removed(two, "5-6") == '<nat><portForward><range start="1"/></portForward></nat>'


def test_what_excluded_ports_leave() -> None:
    ranges = '<natns:range start="1" end="9"/><natns:range start="5" exclude="yes"/>'
    rest = removed(forward(ranges), "1-4")
    gone = '<range start="1" end="4" exclude="yes"/>'
    assert rest == f"<nat><portForward>{plain(ranges)}{gone}</portForward></nat>"
    assert removed(forward(ranges), "1-9") is None
    assert (
        removed(forward(ranges + '<natns:range start="1" end="4" exclude="yes"/>'), "6-9") is None
    )
    with pytest.raises(LookupError):
        removed(forward(ranges), "5")


def test_chosen_port() -> None:
    auto = forward('<natns:range start="auto" to="22"/>')
    assert removed(auto, "20000") is None
    assert removed(auto, "auto:22") is None
    for other in ("20001", "20000/udp", "auto:23", "192.168.0.101:20000"):
        with pytest.raises(LookupError):
            removed(auto, other)


def test_chosen_ports_of_several_targets() -> None:
    """Each forward has its own."""
    auto = '<natns:range start="auto" to="22"/>'
    one, other = forward(auto), forward(auto, ' guestAddress="10.0.0.7"')
    assert removed(one + other, "20000") == f"<nat>{plain(other)}</nat>"
    assert removed(one + other, "20001") == f"<nat>{plain(one)}</nat>"


def test_the_address_tells_networks_apart() -> None:
    one = forward('<natns:range start="1"/>')
    both = one + forward('<natns:range start="1"/>', ' network="b"')
    with pytest.raises(NatnsError, match="2 times"):
        removed(both, "1")
    assert removed(both, "192.168.0.101:1") == f"<nat>{plain(one)}</nat>"
    with pytest.raises(LookupError):
        removed(both, "192.168.0.102:1")


def test_the_address_tells_families_apart() -> None:
    four = forward('<natns:range start="1"/>', ' guestAddress="10.0.0.5"')
    six = forward('<natns:range start="1"/>', ' guestAddress="fd00::5"')
    there = forward('<natns:range start="1"/>', ' address="2001:DB8::9" source="::/0"')
    all_three = four + six + there
    assert removed(all_three, "192.168.0.100:1") == f"<nat>{plain(six + there)}</nat>"
    assert removed(all_three, "[2001:db8::100]:1") == f"<nat>{plain(four + there)}</nat>"
    assert removed(all_three, "[2001:db8::9]:1") == f"<nat>{plain(four + six)}</nat>"
    with pytest.raises(NatnsError, match="3 times"):
        removed(all_three, "1")


def test_only_that_protocol() -> None:
    udp = forward('<natns:range start="1"/>', ' proto="udp"')
    both = udp + forward('<natns:range start="1"/>')
    assert removed(both, "1") == f"<nat>{plain(udp)}</nat>"


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        ('end="22"', "<natns:range> has start=None"),
        ('start="abc"', "<natns:range> has start='abc'"),
        ('start="80" end="x"', "<natns:range> has end='x'"),
        ('start="80" to="22" end=""', "<natns:range> has end=''"),
        ('start="auto"', "<natns:range> has to=None"),
        ('start="auto" to="-1"', "<natns:range> has to='-1'"),
        ('start="9" exclude="yes" end="x"', "<natns:range> has end='x'"),
    ],
)
def test_metadata_that_nobody_has_checked(ports: str, said: str) -> None:
    """One line, whatever is to be removed."""
    nat = forward(f"<natns:range {ports}/>") + forward('<natns:range start="80"/>')
    for spec in ("80", "auto:22"):
        with pytest.raises(DocumentError, match=said) as caught:
            removed(nat, spec)
        assert "\n" not in str(caught.value)
        if "auto" not in ports:
            break


def test_another_prefix_and_a_default_namespace() -> None:
    for prefix, colon in (("x", ":x"), ("", "")):
        p = f"{prefix}:" if prefix else ""
        nat = (
            f'<{p}nat xmlns{colon}="urn:libvirt-natns:1"><{p}portForward><{p}range start="1"/>'
            f'<{p}range start="2"/></{p}portForward></{p}nat>'
        )
        data = f"<domain><name>w</name><metadata>{nat}</metadata></domain>".encode()
        edited = domain_edit.edit_nat(data, lambda found: _drop(found, "2"))
        assert edited.element == '<nat><portForward><range start="1"/></portForward></nat>'
        assert domain_edit.nat_text(edited.document) == edited.element


def _drop(nat: MutableElement, spec: str) -> None:
    assert forward_edit.remove(nat, parse_old(spec), AROUND)
