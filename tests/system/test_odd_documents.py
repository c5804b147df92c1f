# SPDX-License-Identifier: LGPL-2.1-or-later
"""Odd documents: started as libvirt alone starts them, or refused in `start` in one line.

Each network of the table starts on a libvirt without hooks.  With the hooks, with
and without the service, it starts as well, or is refused before libvirt has made
anything.  ``nothing_left`` compares the host after each of them.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from xml.sax.saxutils import quoteattr

import lab
import pytest
from lab import (
    FastGuest,
    Provider,
    Service,
    define_network,
    remove_config,
    run,
    start_network,
    virsh,
    write_config,
)
from lab_sides import in_process

DNSMASQ = 'xmlns:dnsmasq="http://libvirt.org/schemas/network/dnsmasq/1.0"'
LONG = "a" * 64
UMLAUT = "\u00e9"

IP = (
    "<ip address='10.0.0.1' netmask='255.255.255.0'>"
    "<dhcp><range start='10.0.0.100' end='10.0.0.200'/></dhcp></ip>"
)
IP6 = "<ip family='ipv6' address='fd00:db8:ac10:fd01::1' prefix='64'/>"
NAT_ATTRIBUTES = "xmlns:natns='urn:libvirt-natns:1'"


@dataclass(frozen=True)
class Odd:
    """A network; ``refusal`` is in what `start` says about it, "" where it starts."""

    inside: str
    refusal: str = ""
    name: str = "odd"
    bridge: str = "virbr10"

    @property
    def xml(self) -> str:
        return (
            f"<network><name>{self.name}</name>"
            f"<bridge name={quoteattr(self.bridge)} stp='on' delay='0'/>{self.inside}</network>"
        )


def own(more: str = "", ip: str = "address='10.0.0.1' prefix='24'") -> str:
    """A network of <natns:ip>."""
    served = "<natns:dhcp><natns:range start='10.0.0.100' end='10.0.0.200'/></natns:dhcp>"
    return (
        f"<metadata><natns:nat {NAT_ATTRIBUTES}><natns:ip {ip}>"
        f"{'' if 'ipv6' in ip else served}</natns:ip></natns:nat></metadata>{more}"
    )


def option(*values: str) -> str:
    lines = "".join(f"<dnsmasq:option value={quoteattr(value)}/>" for value in values)
    return f"<dnsmasq:options {DNSMASQ}>{lines}</dnsmasq:options>"


def route(address: str, prefix: int, gateway: str, more: str = "") -> str:
    family = "ipv6" if ":" in address else "ipv4"
    where = f"family='{family}' address='{address}' prefix='{prefix}'"
    return f"<route {where} gateway='{gateway}' {more}/>"


def dns(inside: str) -> str:
    return f"<dns>{inside}</dns>"


BRIDGES: dict[str, Odd] = {
    **{f"bridge {name}": Odd(IP, bridge=name) for name in ("br~0", "=x", "+br", "a@b")},
    **{f"bridge {name}, ours": Odd(own(), bridge=name) for name in ("br~0", "=x", "+br")},
    "bridge br+": Odd(IP, "has name='br+': expected an interface name", bridge="br+"),
    "bridge lab+, ours": Odd(own(), "not ending in +", bridge="lab+"),
}

ROUTES: dict[str, Odd] = {
    "route by the network itself": Odd(IP + route("10.9.0.0", 24, "10.0.0.1")),
    "route6 by the network itself": Odd(
        IP6 + route("fd00:db8:ac10:fd00::", 64, "fd00:db8:ac10:fd01::1")
    ),
    "route by a broadcast address": Odd(
        IP + route("10.9.0.0", 24, "10.0.0.255"), "is the broadcast address of 10.0.0.0/24"
    ),
    "route to link-local": Odd(
        IP6 + route("fe80::", 64, "fd00:db8:ac10:fd01::9"), "can lead to link-local addresses"
    ),
    "route within the subnet": Odd(IP + route("10.0.0.128", 25, "10.0.0.9")),
    "route to the subnet": Odd(IP + route("10.0.0.0", 24, "10.0.0.9")),
    "route to an address": Odd(IP + route("10.9.0.7", 32, "10.0.0.9")),
    "default route": Odd(IP + route("0.0.0.0", 0, "10.0.0.9"), "overlaps"),
    "two routes to one subnet": Odd(
        IP + route("10.9.0.0", 24, "10.0.0.9") + route("10.9.0.0", 24, "10.0.0.8", "metric='7'")
    ),
}

ADDRESSES: dict[str, Odd] = {
    "address 0.0.0.0": Odd("<ip address='0.0.0.0' prefix='24'/>", "no host can have"),
    "mapped address": Odd(
        "<ip family='ipv6' address='::ffff:10.0.0.1' prefix='120'/>", "no host can have"
    ),
    "mapped address, ours": Odd(
        own(ip="family='ipv6' address='::ffff:10.0.0.1' prefix='120'"), "expected an IPv4 or IPv6"
    ),
    "mapped forwarder, ours": Odd(own(dns("<forwarder addr='::ffff:192.168.0.1'/>"))),
    "mtu 68": Odd("<mtu size='68'/>" + IP),
    "mtu 65535": Odd("<mtu size='65535'/>" + IP),
}

SRV = "<srv service='a' protocol='tcp' domain='x' target='{}' port='1'/>"
FOREVER = "does not become a daemon with"
NAMES: dict[str, Odd] = {
    "domain with a long label, ours": Odd(own(f"<domain name='{LONG}.x'/>"), "refuses 'domain="),
    "domain with an umlaut, ours": Odd(own(f"<domain name='{UMLAUT}.x'/>"), "refuses 'domain="),
    "txt of two lines": Odd(dns("<txt name='x' value='a\u2028enable-tftp'/>") + IP),
    "srv with CR": Odd(dns(SRV.format("y&#13;z")) + IP),
    "srv with CR, ours": Odd(own(dns(SRV.format("y&#13;z"))), "expected a name without spaces"),
    "srv with a long label, ours": Odd(own(dns(SRV.format(LONG))), "bad SRV target"),
    "forwarder with CR": Odd(dns("<forwarder domain='x&#13;y' addr='192.168.0.1'/>") + IP),
    "network's name": Odd(IP, name="l\u00e4b \u4e2d; $d"),
}

OPTIONS: dict[str, Odd] = {
    "option with U+2028": Odd(IP + option("txt-record=a,b\u2028bogus")),
    "option with U+0085": Odd(IP + option("txt-record=a,b\u0085bogus")),
    "option with CR": Odd(IP + option("txt-record=a,b\rbogus")),
    "option of two lines": Odd(IP + option("txt-record=a,b\nlog-queries")),
    "option with quotes": Odd(IP + option('txt-record=a,"b, c"')),
    "option with quotes, ours": Odd(own(option('txt-record=a,"b, c"'))),
    "bogus option, ours": Odd(own(option("bogus")), "dnsmasq refuses 'bogus': bad option"),
    "open quote, ours": Odd(own(option('a,"b')), "dnsmasq refuses"),
    "unknown user, ours": Odd(own(option("user=nobodyhere")), "unknown user or group"),
    "tftp without root, ours": Odd(
        own(option("enable-tftp", "tftp-root=/nonexistent")), "inaccessible"
    ),
    "excluding options, ours": Odd(own(option("bind-interfaces")), "cannot set"),
    "no daemon, ours": Odd(own(option("no-daemon")), FOREVER),
    "foreground, ours": Odd(own(option("keep-in-foreground")), FOREVER),
    "pid file, ours": Odd(own(option("pid-file=/run/elsewhere.pid"))),
}

ODD = BRIDGES | ROUTES | ADDRESSES | NAMES | OPTIONS


@pytest.fixture(scope="module")
def natively(libvirtd: lab.Libvirtd) -> dict[str, bool]:
    """Which of them start without hooks."""
    started = {}
    for title, odd in ODD.items():
        define_network(odd.xml)
        started[title] = virsh("net-start", odd.name, check=False).returncode == 0
        virsh("net-destroy", odd.name, check=False)
        virsh("net-undefine", odd.name)
    return started


@pytest.fixture(scope="module", params=["hooks", "service"])
def world(natively: dict[str, bool], request: pytest.FixtureRequest) -> Iterator[Provider]:
    """The provider network, with the hooks alone or with the service as well."""
    lab.install_natns()
    with Provider() as provider, ExitStack() as parts:
        write_config(provider.config(more="probe = 0"))
        if request.param == "service":
            parts.enter_context(Service())
        yield provider
        remove_config()
    lab.clear()
    lab.uninstall_natns()


def test_libvirt_alone_starts_them(natively: dict[str, bool]) -> None:
    assert all(natively.values()), natively


@pytest.mark.parametrize("title", [title for title, odd in ODD.items() if not odd.refusal])
def test_odd_documents_that_start(
    world: Provider, title: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ODD[title]
    start_network(odd.xml)
    # The namespace is up with all that is in it, dnsmasq included.
    checked = in_process(capsys)("check")
    assert (checked.status, checked.out, checked.err) == (0, "", "")
    pids = run("pgrep", "-fc", "conf-file=/run/libvirt-natns/networks/", check=False)
    assert int(pids.stdout) > 0
    virsh("net-destroy", odd.name)


def test_odd_documents_that_are_refused(world: Provider) -> None:
    """`start` says why, in one line, and nothing is left of any of them."""
    for odd in ODD.values():
        if odd.refusal:
            define_network(odd.xml)
            assert_refused(odd, virsh("net-start", odd.name, check=False))
            virsh("net-undefine", odd.name)


def assert_refused(odd: Odd, started: lab.Result) -> None:
    """`start` says why, in one line, and libvirt has made nothing."""
    assert started.returncode != 0, odd
    said = re.search(r" start begin -\).*?libvirt-natns: ([^\n]*)\n", started.stderr, re.S)
    assert said, started.stderr
    assert odd.refusal in said[1]
    assert said[1].isprintable()
    assert run("ip", "link", "show", odd.bridge, check=False).returncode != 0


def test_route_by_the_network_itself_is_on_the_link(world: Provider) -> None:
    """As the kernel reads the same route of IPv4."""
    start_network(ROUTES["route6 by the network itself"].xml)
    shown = run("ip", "-6", "route", "show", "fd00:db8:ac10:fd00::/64", namespace="nat-odd")
    assert "dev virbr10" in shown.stdout
    assert "via" not in shown.stdout


def test_first_route_of_the_least_metric_counts(world: Provider) -> None:
    start_network(ROUTES["two routes to one subnet"].xml)
    shown = run("ip", "route", "show", "10.9.0.0/24", namespace="nat-odd").stdout
    assert "via 10.0.0.9" in shown
    assert "10.0.0.8" not in shown


def test_a_character_that_ends_no_line_stays_in_its_line(world: Provider) -> None:
    """As dnsmasq and libvirt read their files: only LF ends a line."""
    more = "txt-record=odd.lab,one\u2028enable-tftp"
    start_network(Odd(IP + option(more, "txt-record=cr.lab,one\rtwo")).xml)
    with FastGuest("virbr10") as guest:
        guest.dhcp()
        told = guest.run("dig", "+short", "odd.lab", "TXT", "@10.0.0.1")
    # dig shows octets that do not print in decimal.
    assert told.stdout.strip() == '"one\\226\\128\\168enable-tftp"'
