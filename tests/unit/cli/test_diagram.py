# SPDX-License-Identifier: LGPL-2.1-or-later
"""Pictures: each format by golden files, and by the rules of its language.

``python3 tests/unit/cli/test_diagram.py`` writes the golden files anew: look at the difference.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from lxml import etree

from libvirt_natns.cli.diagram import picture_mermaid, picture_text
from libvirt_natns.cli.diagram.drawing import renderer
from libvirt_natns.cli.diagram.picture import (
    NONE,
    DrawnForward,
    DrawnGuest,
    DrawnNetwork,
    DrawnUpstream,
    Picture,
    cells,
    drawable,
)
from libvirt_natns.cli.diagram.picture_facts import Station, forward, stations
from libvirt_natns.cli.diagram.svg_parts import fitted, text_width
from libvirt_natns.cli.forward_list import ForwardRow
from libvirt_natns.model.network import Domain, Nic
from libvirt_natns.state.networks import NetworkRecord

GOLDEN = Path(__file__).parent / "pictures"
FORMATS = {"text": "txt", "svg": "svg", "dot": "dot", "mermaid": "mmd"}
SVG = "{http://www.w3.org/2000/svg}"

PROVIDER = DrawnUpstream("provider", "br0", (), ("192.168.0.0/24", "gateway 192.168.0.1"))
HOST = DrawnUpstream(
    "host", "natns-host", ("routed by the host",), ("198.19.252.0/22", "gateway 198.19.252.1")
)
WAN = DrawnUpstream("wan", "?", ("routed by natns-router-wan with ens3",), ("2001:db8:100::/56",))

LONG = "a-network-with-a-name-of-forty-characters"
ODD = 'it\'s <b>100%</b> "odd" & \\n $$x$$ *y* ünïcödé; end style:x#1; {a|b} `c` %%{init: {}}%%'
WIDE = "日本語ネットワーク"


def network(
    name: str, guests: int = 0, forwards: int = 0, upstream: str = "provider", health: str = "ok"
) -> DrawnNetwork:
    return DrawnNetwork(
        name=name,
        bridge="virbr10",
        namespace=f"nat-{name}",
        upstream=upstream,
        gateways=("10.0.0.1/24",),
        addresses=("192.168.0.100",),
        health=health,
        guests=tuple(DrawnGuest(f"vm-{n}", (f"10.0.0.{n}",)) for n in range(1, guests + 1)),
        forwards=tuple(
            DrawnForward("tcp", f"192.168.0.100:{n}", f"vm-{n}:22") for n in range(1, forwards + 1)
        ),
    )


USUAL = Picture(
    (
        network("lab", guests=2, forwards=1),
        network("shop", guests=1, forwards=3, health="damaged (2)"),
        network("laptop", upstream="host"),
    ),
    (PROVIDER, HOST),
)
UNUSUAL = Picture(
    (
        network(LONG, guests=60, forwards=40),
        DrawnNetwork(
            ODD,
            "virbr11",
            "nat-+odd-12345678",
            "wan",
            ("10.0.0.1/24", "fd00:10::1/64"),
            (),
            "stopped by nftables: inet filter forward (policy drop)",
            (
                DrawnGuest(ODD),
                DrawnGuest(WIDE, ("10.0.0.5", "fd00:10::5", "2001:db8:100:42:5054:ff:fe00:5")),
            ),
            (
                DrawnForward("udp", "*:8000-8010", f"{ODD}:8000-8010"),
                DrawnForward("tcp", "[2001:db8:77::150]:80", f"{WIDE}:80", waiting=True),
                DrawnForward("address", "203.0.113.9", WIDE),
            ),
        ),
    ),
    (PROVIDER, WAN),
)
MANY = Picture(tuple(network(f"lab-{n}", n % 9, n % 5) for n in range(30)), (PROVIDER,))
PICTURES = {"usual": USUAL, "unusual": UNUSUAL, "none": Picture()}
CASES = [(name, form) for name in PICTURES for form in FORMATS]


def golden(name: str, form: str) -> Path:
    return GOLDEN / f"{name}.{FORMATS[form]}"


@pytest.mark.parametrize(("name", "form"), CASES)
def test_golden(name: str, form: str) -> None:
    assert renderer(form)(PICTURES[name]) == golden(name, form).read_text()


def test_each_golden_file_belongs_to_a_picture() -> None:
    assert {file.name for file in GOLDEN.iterdir()} == {golden(*case).name for case in CASES}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("picture", [USUAL, UNUSUAL, MANY], ids=["usual", "unusual", "many"])
def test_a_picture_depends_on_nothing_else(picture: Picture, form: str) -> None:
    turned = Picture(tuple(reversed(picture.networks)), tuple(reversed(picture.upstreams)))
    assert renderer(form)(turned) == renderer(form)(picture)
    if form != "text":
        assert renderer(form)(picture).isascii()


# -- text --------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("number", range(1, 9))
def test_text_fits_a_terminal(number: int, width: int) -> None:
    for names in (["a"] * number, [WIDE] * number, [LONG, *"b" * (number - 1)], [ODD] * number):
        picture = Picture(tuple(network(name, 3, 1) for name in names), (PROVIDER, WAN))
        lines = picture_text.draw(picture, width).splitlines()
        assert max(map(cells, lines)) <= width
        # A box has four corners, and each of its lines ends at its edge.
        assert sum(line.count("| nat-") for line in lines) == number


def test_four_boxes_stand_in_a_row() -> None:
    """A bridge's name ends the line of four boxes of ordinary networks, in column 80 at most."""
    shown = picture_text.draw(Picture(tuple(map(network, "abcd")), (PROVIDER,)))
    assert shown.count(" br0\n") == 1
    assert max(map(len, shown.splitlines())) <= 80


def test_text_tells_how_many_more_there_are() -> None:
    shown = picture_text.draw(UNUSUAL)
    assert "and 56 more" in shown
    assert "and 36 more" in shown


# -- svg ---------------------------------------------------------------------


def svg(picture: Picture) -> etree._Element:
    text = renderer("svg")(picture)
    # In a page of any kind, on any machine: nothing is loaded, and nothing runs.
    assert not re.search(r"url\(|@import|href|<script|<image|<foreignObject|\bon\w+=", text)
    return etree.fromstring(text.encode())


def numbers(element: etree._Element, *names: str) -> list[float]:
    return [float(element.get(name, "0")) for name in names]


@pytest.mark.parametrize("picture", [USUAL, UNUSUAL, MANY, Picture()])
def test_svg_has_all_texts_inside(picture: Picture) -> None:
    root = svg(picture)
    width, height = numbers(root, "width", "height")
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    for text in root.iter(f"{SVG}text"):
        kind = str(text.get("class")).removeprefix("t-")
        (x, y), long = numbers(text, "x", "y"), text_width(text.text or "", kind)
        left = x - long * {"end": 1, "middle": 0.5}.get(text.get("text-anchor", ""), 0)
        assert left >= 0, text.text
        assert left + long <= width, text.text
        assert 0 < y < height
    for box in root.iter(f"{SVG}rect"):
        x, y, wide, high = numbers(box, "x", "y", "width", "height")
        assert (x + wide, y + high) <= (width, height)


@pytest.mark.parametrize("picture", [USUAL, UNUSUAL, MANY])
def test_svg_boxes_do_not_overlap(picture: Picture) -> None:
    boxes = [numbers(box, "x", "y", "width", "height") for box in svg(picture).iter(f"{SVG}rect")]
    page, *cards = boxes
    assert page[:2] == [0, 0]
    for number, (x, y, wide, high) in enumerate(cards):
        for left, top, across, down in cards[:number]:
            beside = x >= left + across or left >= x + wide
            assert beside or y >= top + down or top >= y + high


def test_svg_has_a_long_text_as_a_tool_tip() -> None:
    tips = {tip.text for tip in svg(UNUSUAL).iter(f"{SVG}title")}
    assert f"{ODD}:8000-8010" in tips


def test_svg_has_colours_for_a_dark_page() -> None:
    style = str(svg(USUAL).findtext(f"{SVG}style"))
    light, dark = style.split("@media(prefers-color-scheme:dark)")
    classes = {word for element in svg(USUAL).iter() for word in element.get("class", "").split()}
    assert len(classes) > 12
    for word in classes:
        assert f".{word}{{" in light
        assert f".{word}{{" in dark


def test_a_text_is_cut_in_its_middle() -> None:
    assert fitted("abcdefghij", text_width("abcdefghij", "value"), "value") == "abcdefghij"
    assert fitted("abcdefghij", text_width("abcdefg", "value"), "value") == "abc\u2026hij"
    assert text_width(fitted(WIDE * 3, 100, "value"), "value") <= 100


# -- dot and mermaid ---------------------------------------------------------


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz")
@pytest.mark.parametrize("picture", [USUAL, UNUSUAL, MANY, Picture()])
def test_graphviz_draws_dot(picture: Picture) -> None:
    done = subprocess.run(
        ["dot", "-Tsvg"],
        input=renderer("dot")(picture).encode(),
        capture_output=True,
        check=True,
    )
    assert done.stderr == b""
    root = etree.fromstring(done.stdout)
    drawn = {"".join(text.itertext()).replace("\xa0", " ") for text in root.iter(f"{SVG}text")}
    wanted = {network.name for network in picture.networks} or {NONE}
    wanted |= {guest.name for network in picture.networks for guest in network.guests}
    wanted |= {text for network in picture.networks for text in network.forward_texts}
    assert wanted <= drawn


def test_mermaid_escapes_all_that_acts_in_a_label() -> None:
    assert picture_mermaid.escaped('say "hi"; #1 <b>') == "say #34;hi#34;#59; #35;1 #60;b#62;"
    assert picture_mermaid.escaped("%%{init}%%") == "#37;#37;#123;init#125;#37;#37;"
    assert picture_mermaid.escaped("style:x classDef end http://a") == (
        "#115;tyle:x #99;lassDef #101;nd #104;ttp://a"
    )
    # A backslash and a dollar sign are kept apart from what follows, by a space without width.
    assert picture_mermaid.escaped(r"\n$$") == "#92;#8203;n#36;#8203;#36;#8203;"


@pytest.mark.parametrize("picture", [USUAL, UNUSUAL, MANY, Picture()])
def test_mermaid_lines_have_the_form_of_a_flowchart(picture: Picture) -> None:
    label = r'"(?:[\w .,:/()-]|#\d+;|<br/>)+"'
    node = rf"[nubg]\d+(?:\[{label}\]|\(\[{label}\]\)|\{{\{{{label}\}}\}})(?::::fault)?"
    line = re.compile(rf"  (?:[nub]\d+ --- )?{node}|  none\[{label}\]|  classDef fault [\w:#,-]+")
    first, *lines = picture_mermaid.draw(picture).splitlines()
    assert first == "flowchart LR"
    assert [each for each in lines if not line.fullmatch(each)] == []


# -- facts -------------------------------------------------------------------

RECORD = NetworkRecord(
    "uuid", "lab", "nat-lab", "virbr10", "host", "host", (), True, "up", "boot", 0.0, b""
)


def row(guest: str | None, target: str, first: int | None = 80) -> ForwardRow:
    return ForwardRow(
        guest=guest,
        guest_uuid=None,
        network="lab",
        proto="tcp" if first else "address",
        address="192.168.0.100",
        first=first,
        last=first,
        target=target,
        target_first=first,
        target_last=first,
        sources=(),
        allowed=(),
        state="published",
    )


def test_guests_are_domains_and_leases() -> None:
    domains = [
        Domain("u1", "web", (Nic("52:54:00:00:00:05", "lab"), Nic("52:54:00:00:00:06", "else"))),
        Domain("u2", "db", (Nic("52:54:00:00:00:07", bridge="virbr10"),)),
    ]
    leases = [
        {"mac-address": "52:54:00:00:00:05", "ip-address": "10.0.0.5", "hostname": "localhost"},
        {"mac-address": "52:54:00:00:00:05", "ip-address": "fd00::5"},
        {"mac-address": "52:54:00:00:00:08", "ip-address": "10.0.0.8", "hostname": "box"},
        {"mac-address": "52:54:00:00:00:09", "ip-address": "10.0.0.9"},
    ]
    found = stations(RECORD, domains, leases)
    assert [(each.name, each.addresses) for each in found.values()] == [
        ("web", ["10.0.0.5", "fd00::5"]),
        ("db", []),
        ("box", ["10.0.0.8"]),
        ("52:54:00:00:00:09", ["10.0.0.9"]),
    ]


def test_a_forward_names_its_guest() -> None:
    known = {"a": Station("web", ["10.0.0.5"]), "b": Station("db")}
    assert forward(row("web", "10.0.0.5"), known).target == "web:80"
    # An address without DHCP, which no lease tells.
    assert forward(row("db", "10.0.0.7"), known).target == "db:80"
    assert known["b"].addresses == ["10.0.0.7"]
    # A forward of the network itself, to a guest and to an unknown address.
    assert forward(row(None, "10.0.0.5"), known).target == "web:80"
    assert forward(row(None, "10.0.0.9"), known).target == "10.0.0.9:80"
    assert forward(row(None, "fd00::9"), known).target == "[fd00::9]:80"
    static = forward(row("web", "10.0.0.5", None), known)
    assert (static.proto, static.listen, static.target) == ("address", "192.168.0.100", "web")
    assert sorted(each.name for each in known.values()) == ["10.0.0.9", "db", "fd00::9", "web"]


def test_a_control_character_shows_as_its_escape() -> None:
    assert drawable("a\x1b[1m\u202eb") == r"a\x1b[1m\u202eb"
    assert drawable(WIDE) == WIDE


if __name__ == "__main__":
    for case in CASES:
        golden(*case).write_text(renderer(case[1])(PICTURES[case[0]]))
