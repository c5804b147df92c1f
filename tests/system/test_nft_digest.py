# SPDX-License-Identifier: LGPL-2.1-or-later
"""The digest of a namespace's tables: each alteration changes it, and nothing else does."""

from collections.abc import Iterator
from socket import AF_INET, SOCK_DGRAM, socket

import pytest
from lab import run

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import limits, nft, nft_digest, nftables
from libvirt_natns.kernel import netns

NAMESPACE = "digest"
LOADED = f"""
table inet natns {{
    set known {{ type ipv4_addr; size 256; flags dynamic,timeout; timeout 5m; }}
    set allowed {{ type ipv4_addr; flags interval; elements = {{ 10.0.0.0/24, 192.0.2.1 }} }}
    map ports {{
        type inet_proto . inet_service : ipv4_addr . inet_service
        elements = {{ tcp . 80 : 10.0.0.5 . 80, tcp . 81 : 10.0.0.5 . 81 }}
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        ip saddr @allowed accept comment "allowed"
        tcp dport {{ 22, 23 }} accept
        ip saddr 10.0.0.9 limit rate 10/second accept
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        add @known {{ ip daddr }}
    }}
    chain own {{ drop; }}
}}
table {limits.ARP_TABLE} {{ chain out {{ type filter hook output priority filter; accept; }}; }}
"""


@pytest.fixture
def namespace() -> Iterator[str]:
    run("ip", "netns", "add", NAMESPACE)
    try:
        run("ip", "-n", NAMESPACE, "link", "set", "lo", "up")
        yield NAMESPACE
    finally:
        run("ip", "netns", "delete", NAMESPACE)


def handle(line: str) -> str:
    """Return the handle of the rule that has ``line``."""
    done = run("ip", "netns", "exec", NAMESPACE, "nft", "-a", "list", "table", "inet", "natns")
    (found,) = (each for each in done.stdout.splitlines() if line in each)
    return found.rpartition(" ")[2]


def test_an_empty_namespace_has_no_digest(namespace: str) -> None:
    assert nftables.digest(namespace) == ""
    nft.load(namespace, f"table {limits.ARP_TABLE} {{ }}\ntable ip natns {{ }}\n")
    assert nftables.digest(namespace) == ""


@pytest.mark.parametrize(
    "alteration",
    [
        "add rule inet natns forward accept",
        "insert rule inet natns own accept",
        "flush chain inet natns own",
        'replace rule inet natns forward handle {"allowed"} ip saddr @allowed accept',
        "replace rule inet natns forward handle {tcp dport} tcp dport {{ 22, 24 }} accept",
        "replace rule inet natns forward handle {10.0.0.9} ip saddr 10.0.0.9 "
        "limit rate 11/second accept",
        "add element inet natns allowed {{ 192.0.2.2 }}",
        "delete element inet natns allowed {{ 10.0.0.0/24 }}",
        "delete element inet natns ports {{ tcp . 80 }}",
        "delete element inet natns ports {{ tcp . 80 }}; "
        "add element inet natns ports {{ tcp . 80 : 10.0.0.6 . 80 }}",
        "chain inet natns forward {{ policy accept; }}",
        "add chain inet natns more",
        "add chain inet natns more {{ type filter hook forward priority -1; }}",
        "add set inet natns more {{ type ipv4_addr; }}",
        "add table inet natns {{ flags dormant; }}",
        "delete table " + limits.ARP_TABLE,
        "add rule arp natns out drop",
        "delete table inet natns",
    ],
)
def test_an_alteration_changes_the_digest(namespace: str, alteration: str) -> None:
    nft.load(namespace, LOADED)
    before = nftables.digest(namespace)
    assert before
    what = alteration.partition("handle {")[2].partition("}")[0]
    if what:
        alteration = alteration.replace("handle {" + what + "}", f"handle {handle(what)}")
    nft.load(namespace, alteration.replace("{{", "{").replace("}}", "}") + "\n")
    assert nftables.digest(namespace) != before


def test_packets_counts_and_reloads_leave_the_digest(namespace: str) -> None:
    nft.load(namespace, LOADED)
    before = nftables.digest(namespace)
    with netns.entered(namespace), socket(AF_INET, SOCK_DGRAM) as sender:
        sender.sendto(b"?", ("127.0.0.1", 9))
    assert (
        "127.0.0.1"
        in run(
            *("ip", "netns", "exec", namespace, "nft", "list", "set", "inet", "natns", "known")
        ).stdout
    )
    assert nftables.digest(namespace) == before
    # A table of others, and the same rules once more: other handles, another order.
    nft.load(namespace, "table ip natns { chain x { accept; }; }\n")
    swapped = LOADED.replace("10.0.0.0/24, 192.0.2.1", "192.0.2.1, 10.0.0.0/24")
    assert swapped != LOADED
    nft.load(namespace, nftables.MAKE_ROOM + nftables.MAKE_ROOM_ARP + swapped)
    assert nftables.digest(namespace) == before


def test_a_map_that_grew_has_the_digest_of_one_that_was_loaded_whole(namespace: str) -> None:
    """The kernel lists elements in the order of its hash, which follows the size."""
    members = [f"tcp . {port} : 10.0.0.5 . {port}" for port in range(1000, 3000)]
    adding = "add element inet natns ports {{ {} }}\n"
    nft.load(namespace, LOADED)
    for start in range(0, len(members), 100):
        nft.load(namespace, adding.format(", ".join(members[start : start + 100])))
    grown = nftables.digest(namespace)
    room = nftables.MAKE_ROOM + nftables.MAKE_ROOM_ARP
    nft.load(namespace, room + LOADED + adding.format(", ".join(reversed(members))))
    assert nftables.digest(namespace) == grown


def test_a_kernel_that_does_not_tell(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(nft_digest, "dump", refuse)
    with pytest.raises(FirewallError, match="the kernel does not hand out the rules"):
        nftables.digest(namespace)
