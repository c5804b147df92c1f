# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration file: what is read, what is refused and how."""

import time
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from libvirt_natns.addresses import AddressRange
from libvirt_natns.documents import config
from libvirt_natns.errors import ConfigError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.publication import PortSet
from libvirt_natns.model.segment import BridgeSegment
from libvirt_natns.model.upstream import HOST_UPSTREAM, BridgeUpstream, DhcpUpstream

BRIDGE = {
    "kind": '"bridge"',
    "bridge": '"br0"',
    "subnet": '"192.168.0.0/24"',
    "gateway": '"192.168.0.1"',
    "pool": '["192.168.0.100-192.168.0.199"]',
}


def table(upstream: str = "provider", /, **keys: str | None) -> str:
    """A table of an upstream: BRIDGE with other values, None for without."""
    lines = [f"{key} = {value}" for key, value in (BRIDGE | keys).items() if value is not None]
    return "\n".join([f"[upstreams.{upstream}]", *lines, ""])


def upstream(**keys: str | None) -> BridgeUpstream:
    found = config.parse(table(**keys), "config.toml").upstreams["provider"]
    assert isinstance(found, BridgeUpstream)
    return found


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "config.toml")
    message = str(caught.value)
    assert message.startswith("config.toml: ")
    assert message.isprintable()
    return message.removeprefix("config.toml: ")


# What is read


def test_no_file(tmp_path: Path) -> None:
    assert config.load(tmp_path / "config.toml") == Config()
    assert config.load(tmp_path / "no" / "such" / "directory") == Config()


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.touch()
    assert config.load(path) == Config()


def test_defaults() -> None:
    default = Config()
    assert (default.scope, default.firewall, default.upstream) == ("isolated", "auto", "host")
    assert default.upstreams == {"host": HOST_UPSTREAM}


def test_everything() -> None:
    found = config.parse(
        'scope = "annotated"\nfirewall = "iptables"\nupstream = "provider"\n'
        + table(
            dns='["192.168.0.1", "2001:db8::53"]',
            probe="1",
            link_local='"forward"',
            max_flows="4096",
            helpers='["tftp", "ftp"]',
            subnet6='"2001:db8:77::/64"',
            gateway6='"2001:db8:77::1"',
            pool6='["2001:db8:77::100-2001:db8:77::1ff"]',
            prefixes6='["2001:db8:100::/56"]',
        ),
        "config.toml",
    )
    assert (found.scope, found.firewall, found.upstream) == ("annotated", "iptables", "provider")
    assert found.upstreams["host"] == HOST_UPSTREAM
    provider = found.upstreams["provider"]
    assert isinstance(provider, BridgeUpstream)
    assert (provider.name, provider.kind, provider.bridge) == ("provider", "bridge", "br0")
    assert provider.subnet == IPv4Network("192.168.0.0/24")
    assert provider.gateway == IPv4Address("192.168.0.1")
    assert provider.dns == (IPv4Address("192.168.0.1"), IPv6Address("2001:db8::53"))
    assert provider.probe == 1.0
    assert (provider.link_local, provider.max_flows) == ("forward", 4096)
    assert provider.helpers == ("tftp", "ftp")
    assert provider.subnet6 == IPv6Network("2001:db8:77::/64")
    assert provider.gateway6 == IPv6Address("2001:db8:77::1")
    ends = (IPv6Address("2001:db8:77::100"), IPv6Address("2001:db8:77::1ff"))
    assert provider.pool6 == (AddressRange(*ends),)
    assert provider.prefixes6 == (IPv6Network("2001:db8:100::/56"),)


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ('["192.168.0.100 - 192.168.0.199"]', ["192.168.0.100-192.168.0.199"]),
        ('["192.168.0.5"]', ["192.168.0.5"]),
        ('["192.168.0.16/28"]', ["192.168.0.16-192.168.0.31"]),
        ('["192.168.0.9", "192.168.0.0/30"]', ["192.168.0.9", "192.168.0.0-192.168.0.3"]),
        ('["192.168.0.10-192.168.0.19", "192.168.0.20"]', None),
    ],
)
def test_pool(pool: str, expected: list[str] | None) -> None:
    found = [str(each) for each in upstream(pool=pool).pool]
    assert found == (expected or ["192.168.0.10-192.168.0.19", "192.168.0.20"])


def test_pool_by_dhcp() -> None:
    found = upstream(pool='"dhcp"', subnet=None, gateway=None)
    assert (found.pool, found.subnet) == ((), None)
    assert isinstance(found, DhcpUpstream)
    assert (found.dhcp, found.dhcp_timeout) == ("required", 10.0)
    assert not isinstance(upstream(), DhcpUpstream)


def test_pool_by_dhcp_in_the_background() -> None:
    found = upstream(pool='"dhcp"', dhcp='"background"')
    assert isinstance(found, DhcpUpstream)
    assert (found.dhcp, found.dhcp_timeout) == ("background", 1.0)
    found = upstream(pool='"dhcp"', dhcp='"background"', dhcp_timeout="0")
    assert isinstance(found, DhcpUpstream)
    assert found.dhcp_timeout == 0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"dhcp": '"never"'}, '.dhcp: is \'never\': expected "required" or "background"'),
        ({"dhcp_timeout": "31"}, ".dhcp_timeout: is 31: expected seconds from 0 to 30"),
        ({"dhcp_timeout": "true"}, ".dhcp_timeout: is True: expected seconds from 0 to 30"),
    ],
)
def test_refused_with_dhcp(keys: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        upstream(pool='"dhcp"', **keys)
    assert expected in str(caught.value)


def test_link_local_gateway() -> None:
    found = upstream(subnet6='"2001:db8::/64"', gateway6='"fe80::1"')
    assert found.gateway6 == IPv6Address("fe80::1")


def test_huge_pools_take_no_time() -> None:
    start = time.monotonic()
    big = upstream(subnet='"10.0.0.0/8"', gateway='"10.0.0.1"', pool='["10.0.0.0/8"]')
    upstream(subnet6='"2001:db8::/32"', pool6='["2001:db8::/33"]')
    assert time.monotonic() - start < 0.5
    assert str(big.pool[0]) == "10.0.0.0-10.255.255.255"


def test_host_upstream_can_be_changed() -> None:
    text = '[upstreams.host]\nsubnet = "100.64.0.0/24"\ndns = ["9.9.9.9"]\n'
    host = config.parse(text, "x").upstreams["host"]
    assert (host.kind, host.subnet) == ("host", IPv4Network("100.64.0.0/24"))
    assert config.parse(table("host"), "x").upstreams["host"].kind == "bridge"


def test_router() -> None:
    text = '[upstreams.wan]\nkind = "router"\nnic = "ens3"\n'
    wan = config.parse(text, "x").routers["wan"]
    assert (wan.kind, wan.nic) == ("router", "ens3")
    assert str(wan.host_subnet) == "192.168.158.0/24"
    assert wan.host_ports == (PortSet("tcp", 22, 22),)
    assert wan.host_address6 is None
    assert wan.client_id == ""
    assert wan.host_addresses is None


def test_router_and_its_host() -> None:
    text = (
        '[upstreams.wan]\nkind = "router"\nnic = "ens3"\nhost_subnet = "10.9.8.0/29"\n'
        'host_ports = ["tcp/22", "udp/60000-61000"]\nhost_address6 = "2001:db8::2"\n'
        'client_id = "ff:00:AA:01"\nhost_addresses = ["198.51.100.10"]\n'
    )
    wan = config.parse(text, "x").routers["wan"]
    assert str(wan.host_subnet) == "10.9.8.0/29"
    assert wan.host_ports == (PortSet("tcp", 22, 22), PortSet("udp", 60000, 61000))
    assert str(wan.host_address6) == "2001:db8::2"
    assert wan.client_id == "ff00aa01"
    assert wan.host_addresses == (IPv4Address("198.51.100.10"),)
    for wrong in (text.replace("ff:00:AA:01", "ff"), text.replace("ff:00:AA:01", "host")):
        with pytest.raises(ConfigError, match=r"client_id: is .*expected octets such as"):
            config.parse(wrong, "x")
    for ports in ("22", "tcp/0", "tcp/9-8", "icmp/1", "tcp/70000"):
        wrong = text.replace("tcp/22", ports)
        with pytest.raises(ConfigError, match=r"host_ports\[0\]: is .*expected a protocol with"):
            config.parse(wrong, "x")


def test_two_upstreams_on_one_bridge() -> None:
    other = table("other", pool='["192.168.0.200-192.168.0.209"]')
    assert set(config.parse(table() + other, "x").upstreams) == {"host", "provider", "other"}


def test_equal_pools_on_different_bridges() -> None:
    config.parse(table() + table("other", bridge='"br1"'), "x")


# What is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('scop = "isolated"', "scop: unknown key: expected scope (did you mean that?)"),
        (
            "x = 1",
            "x: unknown key: expected auto_ports, default_route, firewall, scope, upstream or"
            " upstreams",
        ),
        ('auto_ports = "9-8"', "auto_ports: is '9-8': expected a range of ports"),
        ('auto_ports = "0-8"', "auto_ports: is '0-8': expected a range of ports"),
        ("auto_ports = 20000", "auto_ports: is 20000: expected a range of ports"),
        ('scope = "all"', 'scope: is \'all\': expected "isolated" or "annotated"'),
        ("scope = true", 'scope: is True: expected "isolated" or "annotated"'),
        ('firewall = "nft"', 'firewall: is \'nft\': expected "auto", "nftables" or "iptables"'),
        ('upstream = "wan"', "upstream: is 'wan': expected \"host\", or a table [upstreams.NAME]"),
        ('upstream = ["host"]', "upstream: is ['host']: expected \"host\""),
        ("upstreams = 1", "upstreams: is 1: expected a table [upstreams.NAME]"),
        ("upstreams.a = 1", "upstreams.a: is 1: expected a table [upstreams.a]"),
        ('[upstreams."a b"]', "upstreams.'a b': wrong name: expected 1 to 64 of"),
        ('[upstreams."a\\u001b"]', r"upstreams.'a\x1b': wrong name"),
        (f"[upstreams.{'a' * 65}]", "wrong name"),
        ("[upstreams.a]", 'upstreams.a.kind: missing: expected "bridge", "host" or "router"'),
        ('[upstreams.a]\nkind = "nat"', "upstreams.a.kind: is 'nat': expected \"bridge\""),
        ('[upstreams.a]\nkind = "router"', "upstreams.a.nic: missing: expected the NIC"),
        (
            '[upstreams.host]\nbridge = "br0"',
            'upstreams.host.bridge: unknown key of an upstream of kind "host": expected dns,',
        ),
        (
            '[upstreams.a]\nkind = "bridge"\nbridge = "br0"\npool = ["192.168.0.5"]',
            "upstreams.a.subnet: missing: expected the upstream's subnet",
        ),
        (
            '[upstreams.a]\nkind = "router"\nnic = "ens3"\npool = ["192.168.0.5"]',
            'upstreams.a.pool: unknown key of an upstream of kind "router"',
        ),
        ("scope =", "not valid TOML: Invalid value (at end of document)"),
        ("a = 1\na = 2", "not valid TOML: Cannot overwrite a value (at"),
        (
            "\n\tscope = isolated\n",
            "(at line 2, column 10): 'scope = isolated': a text needs quotes: scope = \"isolated\"",
        ),
        (f"a = {'[' * 5000}", "not valid TOML: too deeply nested"),
        (f"a = {'9' * 5000}", "not valid TOML: a number is too long"),
        (f"scope = 0x{'f' * 5000}", "scope: is an integer of 20000 bits: expected"),
        (f"upstream = [0x{'f' * 5000}]", "upstream: is [an integer of 20000 bits]: expected"),
        ("upstream = 0o" + "7" * 9000, "upstream: is an integer of 27000 bits: expected"),
    ],
)
def test_refused(text: str, expected: str) -> None:
    assert expected in refusal(text)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("bridge", None, "missing: expected the bridge to the upstream network"),
        ("bridge", '"a/b"', "is 'a/b': expected an interface name"),
        ("bridge", '"a b"', "is 'a b': expected an interface name"),
        ("bridge", '"br0\\n"', r"is 'br0\n': expected an interface name"),
        ("bridge", '".."', "is '..': expected an interface name"),
        ("bridge", '"sixteen-letters-"', "is 'sixteen-letters-': expected an interface name"),
        ("bridge", "0", "is 0: expected an interface name"),
        ("bridge", '"br+"', "is 'br+': expected an interface name"),
        ("brigde", '"br0"', 'unknown key of an upstream of kind "bridge": expected bridge (did'),
        ("nic", '"ens3"', 'unknown key of an upstream of kind "bridge": expected attach, bridge'),
        ("attach", '"MACVLAN"', """is 'MACVLAN': expected "bridge" or "macvlan\""""),
        ("attach", "true", "is True: expected"),
        ("attach", '["macvlan"]', "is ['macvlan']: expected"),
        ("subnet", '"192.168.0.1/24"', "is '192.168.0.1/24': expected 192.168.0.0/24, the whole"),
        ("subnet", '"2001:db8::/64"', "is '2001:db8::/64': expected an IPv4 subnet"),
        ("subnet", '["192.168.0.0/24"]', "is ['192.168.0.0/24']: expected an IPv4 subnet"),
        ("gateway", '"224.0.0.1"', "is '224.0.0.1': expected an IPv4 address"),
        ("gateway", '"255.255.255.255"', "is '255.255.255.255': expected an IPv4 address"),
        ("gateway", '"127.0.0.1"', "is '127.0.0.1': expected an IPv4 address"),
        ("gateway", '"0.0.0.0"', "is '0.0.0.0': expected an IPv4 address"),
        ("gateway", '"192.168.0.0"', "is '192.168.0.0': expected a host address"),
        ("gateway", '"192.168.0.255"', "is '192.168.0.255': expected a host address"),
        ("gateway", "1", "is 1: expected an IPv4 address"),
        ("gateway", '"::1"', "is '::1': expected an IPv4 address"),
        ("pool", None, "missing: expected the addresses to use"),
        ("pool", "[]", "has no usable address: expected at least one"),
        ("pool", '"DHCP"', "is 'DHCP': expected an array, each a range"),
        ("pool", '["192.168.0.1"]', "has no usable address: expected at least one"),
        ("pool", '["192.168.0.0-192.168.0.1", "192.168.0.255"]', "has no usable address"),
        ("pool", '["192.168.0.9-192.168.0.8"]', "[0]: is '192.168.0.9-192.168.0.8': expected a"),
        ("pool", '["192.168.0.9", "x"]', "[1]: is 'x': expected a range such as"),
        ("pool", "[7]", "[0]: is 7: expected a range such as"),
        ("pool", '["192.168.0.17/28"]', "[0]: is '192.168.0.17/28': expected a range"),
        ("pool", '["192.168.0.9-9"]', "[0]: is '192.168.0.9-9': expected a range"),
        ("pool", '["192.168.1.9"]', "[0]: is '192.168.1.9-192.168.1.9': expected addresses in"),
        ("pool", '["192.168.0.9-192.168.1.9"]', "expected addresses in 192.168.0.0/24"),
        ("pool", '["192.168.0.8/30", "192.168.0.9"]', "has 192.168.0.9-192.168.0.9 twice"),
        ("pool", '["192.168.0.5-192.168.0.20", "192.168.0.20-192.168.0.30"]', "twice: expected"),
        ("dns", '"192.168.0.1"', "is '192.168.0.1': expected an array, each the address"),
        ("dns", '["127.0.0.53"]', "[0]: is '127.0.0.53': expected the address of a resolver"),
        ("dns", '["0.0.0.0"]', "[0]: is '0.0.0.0': expected the address"),
        ("dns", '["fe80::1%eth0\\nx"]', r"[0]: is 'fe80::1%eth0\nx': expected the address"),
        ("dns", '["dns.example"]', "[0]: is 'dns.example': expected the address"),
        ("dhcp", '"background"', 'needs DHCP: expected pool = "dhcp"'),
        ("dhcp_timeout", "5", 'needs DHCP: expected pool = "dhcp"'),
        ("probe", "-0.1", "is -0.1: expected seconds from 0 to 5"),
        ("probe", "5.5", "is 5.5: expected seconds"),
        ("probe", "nan", "is nan: expected seconds"),
        ("probe", "true", "is True: expected seconds"),
        ("probe", '"1"', "is '1': expected seconds"),
        ("link_local", '"drop"', 'is \'drop\': expected "reject" or "forward"'),
        ("helpers", '["sip"]', '[0]: is \'sip\': expected "ftp" or "tftp"'),
        ("helpers", '"ftp"', "is 'ftp': expected an array"),
        ("max_flows", "63", "is 63: expected a number from 64 to 1048576"),
        ("max_flows", "1048577", "is 1048577: expected a number"),
        ("max_flows", "true", "is True: expected a number"),
        ("max_flows", '"4096"', "is '4096': expected a number"),
        ("subnet6", '"2001:db8::1/64"', "is '2001:db8::1/64': expected 2001:db8::/64, the whole"),
        ("subnet6", '"10.0.0.0/8"', "is '10.0.0.0/8': expected an IPv6 subnet"),
        ("gateway6", '"fe80::1%eth0"', "is 'fe80::1%eth0': expected an IPv6 address"),
        ("gateway6", '"ff02::1"', "is 'ff02::1': expected an IPv6 address"),
        ("pool6", '["2001:db8::9-2001:db8::1"]', "[0]: is '2001:db8::9-2001:db8::1': expected"),
        ("prefixes6", '["2001:db8::/65"]', "[0]: is '2001:db8::/65': expected an IPv6 prefix"),
        ("prefixes6", '["2001:db8::/48", "2001:db8::/56"]', "2001:db8::/56 overlap: expected"),
    ],
)
def test_refused_in_an_upstream(key: str, value: str | None, expected: str) -> None:
    message = refusal(table(**{key: value}))
    assert message.startswith(f"upstreams.provider.{key}")
    assert expected in message


def test_attach() -> None:
    assert upstream().attach == "bridge"
    assert BridgeSegment.of(upstream()).in_words == "bridge br0"
    found = upstream(attach='"macvlan"', bridge='"eth1"')
    assert found.attach == "macvlan"
    assert BridgeSegment.of(found).in_words == "interface eth1"
    for text in (
        '[upstreams.host]\nattach = "macvlan"\n',
        '[upstreams.wan]\nkind = "router"\nnic = "ens3"\nattach = "macvlan"\n',
    ):
        assert "attach: unknown key of an upstream of kind" in refusal(text)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"pool6": '["2001:db8::5"]'}, "subnet6: missing: expected the subnet that pool6 is part"),
        ({"subnet": None, "gateway": None}, "subnet: missing: expected the upstream's subnet"),
        (
            {"subnet": '"192.168.0.8/31"', "gateway": '"192.168.0.8"', "pool": '["192.168.0.8"]'},
            "pool: has no usable address: expected at least one address",
        ),
        (
            {"subnet": None, "gateway": '"192.168.0.8"', "pool": '["192.168.0.8"]'},
            "pool: has no usable address: expected at least one address",
        ),
        (
            {"subnet": None, "pool": '["192.168.0.8/30", "192.168.0.9"]'},
            "pool: has 192.168.0.9-192.168.0.9 twice: expected ranges that do not overlap",
        ),
        (
            {"subnet6": '"2001:db8::/64"', "pool6": '["2001:db9::1"]'},
            "pool6[0]: is '2001:db9::1-2001:db9::1': expected addresses in 2001:db8::/64",
        ),
        (
            {"subnet6": '"2001:db8::/64"', "pool6": '["2001:db8::1", "2001:db8::/120"]'},
            "pool6: has 2001:db8::1-2001:db8::1 twice: expected ranges that do not overlap",
        ),
    ],
)
def test_refused_combinations(keys: dict[str, str | None], expected: str) -> None:
    assert refusal(table(**keys)).startswith(f"upstreams.provider.{expected}")


@pytest.mark.parametrize(
    "keys",
    [
        # A provider's router outside of the subnet, single addresses, and links of two stations.
        {"gateway": '"51.0.113.254"'},
        {"gateway": '"51.0.113.254"', "subnet": '"192.168.0.9/32"', "pool": '["192.168.0.9"]'},
        {"gateway": '"51.0.113.254"', "subnet": None, "pool": '["192.168.0.9", "198.51.100.7"]'},
        {"gateway": '"169.254.0.1"', "subnet": None, "pool": '["192.168.0.8/30"]'},
        {"subnet": '"192.168.0.8/31"', "gateway": '"192.168.0.8"', "pool": '["192.168.0.9"]'},
        {"subnet6": '"2001:db8::/64"', "gateway6": '"2001:db9::1"', "pool6": '["2001:db8::9"]'},
        {"subnet6": '"2001:db8::9/128"', "gateway6": '"fe80::1"', "pool6": '["2001:db8::9"]'},
        {"subnet6": '"2001:db8::8/127"', "gateway6": '"2001:db8::8"', "pool6": '["2001:db8::9"]'},
        {"gateway6": '"fe80::1"', "pool6": '["2001:db8::9", "2001:db9::9"]'},
    ],
)
def test_routers_of_providers(keys: dict[str, str | None]) -> None:
    found = upstream(**keys)
    assert str(found.gateway) in str(keys.get("gateway", found.gateway))
    assert str(found.gateway6) in str(keys.get("gateway6", found.gateway6))


@pytest.mark.parametrize(("key", "value"), [("subnet", "10.0.0.0/31"), ("subnet6", "fd00::/127")])
def test_a_transit_bridge_needs_room(key: str, value: str) -> None:
    longest = 30 if key == "subnet" else 126
    expected = f"{key}: is '{value}': expected a prefix length up to {longest}"
    for kind in ('host"', 'router"\nnic = "ens3"'):
        name = kind.partition('"')[0]
        text = f'[upstreams.{name}]\nkind = "{kind}\n{key} = "{value}"\n'
        assert expected in refusal(text)


def test_one_pool_twice() -> None:
    message = refusal(table() + table("other", pool='["192.168.0.199-192.168.0.210"]'))
    assert message == (
        "upstreams.other.pool: shares 192.168.0.199-192.168.0.210 with upstreams.provider.pool:"
        " expected other addresses, as both upstreams are on br0"
    )


def test_messages_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('scope = "all"')
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert str(caught.value) == (f'{path}: scope: is \'all\': expected "isolated" or "annotated"')


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory: make it a readable file"):
        config.load(tmp_path)


def test_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b"# \xe9\n")
    with pytest.raises(ConfigError, match="not UTF-8 at byte 2: save it as UTF-8"):
        config.load(path)


def test_auto_ports() -> None:
    assert config.parse("", "here").auto_ports == (20000, 29999)
    assert config.parse('auto_ports = "1024-65535"', "here").auto_ports == (1024, 65535)
