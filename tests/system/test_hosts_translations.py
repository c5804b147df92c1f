# SPDX-License-Identifier: LGPL-2.1-or-later
"""Ports that rules of others lead elsewhere already, which a guest must not take."""

from collections.abc import Iterator

import pytest
from lab import Provider, isolated, natns, remove_config, run, write_config
from lab_domains import create, destroy, domain, networks, nic, ports, refusal

MAC = "52:54:00:00:00:05"
HOST = "192.168.0.2"
EMPTY = "nft delete chain ip nat PREROUTING"
"""iptables-nft leaves the chain, empty."""


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, installed: None) -> Iterator[str]:
    write_config(f'firewall = "{request.param}"\n')
    yield str(request.param)
    remove_config()


# As the CNI plugin portmap has it, for k3s among others.
CLUSTER = """iptables{0} -t nat -N CNI-HOSTPORT-DNAT
iptables{0} -t nat -N CNI-DN-1
iptables{0} -t nat -A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
iptables{0} -t nat -A CNI-HOSTPORT-DNAT -p tcp -m comment --comment 'a pod' -m multiport \
--dports 80,443 -j CNI-DN-1
iptables{0} -t nat -A CNI-DN-1 -p tcp --dport 443 -j DNAT --to-destination 10.42.0.5:443
"""
NO_CLUSTER = """iptables{0} -t nat -D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
iptables{0} -t nat -F CNI-HOSTPORT-DNAT; iptables{0} -t nat -F CNI-DN-1
iptables{0} -t nat -X CNI-HOSTPORT-DNAT; iptables{0} -t nat -X CNI-DN-1
"""
# As kube-proxy has it with nftables.
KUBE = """table ip kube {
  map m { type inet_proto . inet_service : verdict; elements = { tcp . 443 : goto pod }; }
  chain pod { dnat to 10.42.0.5; }
  chain pre {
    type nat hook prerouting priority -100;
    fib daddr type local meta l4proto . th dport vmap @m
  }
}
"""
TAKEN_BY = {
    "nft": (f"nft -f - <<'E'\n{KUBE}E\n", "nft delete table ip kube", "nftables: ip kube pod"),
    "iptables-nft": (
        CLUSTER.format(""),
        f"{NO_CLUSTER.format('')}\n{EMPTY}",
        "nftables: ip nat CNI-DN-1",
    ),
    "iptables-legacy": (
        CLUSTER.format("-legacy"),
        NO_CLUSTER.format("-legacy"),
        "iptables: nat CNI-DN-1",
    ),
}


@pytest.mark.parametrize("kind", TAKEN_BY)
def test_a_port_that_others_translate_is_refused(kind: str, backend: str) -> None:
    take, give_back, place = TAKEN_BY[kind]
    with Provider() as provider, networks(isolated("a", "virbr10")):
        run("sh", "-ec", take)
        try:
            said = refusal(domain("web", nic("a", MAC), publishes=ports("start='443'")))
            assert said.startswith(
                "guest web: a rule of another program leads tcp port 443 of the host elsewhere ("
            )
            assert place in said
            several = ports("start='440' end='450'", more=f"address='{HOST}'")
            assert "tcp port 443 of the host" in refusal(
                domain("web", nic("a", MAC), publishes=several)
            )
            # Another port, and another protocol, are free.
            free = ports("start='444' to='22'") + ports("start='443' to='22'", more="proto='udp'")
            create(domain("web", nic("a", MAC), publishes=free))
            destroy("web")
        finally:
            run("sh", "-ec", give_back)
            natns("sync")
        assert provider
        create(domain("web", nic("a", MAC), publishes=ports("start='443'")))
        destroy("web")


def test_a_port_is_chosen_that_is_free(installed: None) -> None:
    """start="auto" passes ports over, as it does ports that programs listen on."""
    take, give_back, _ = TAKEN_BY["nft"]
    take = take.replace("443", "20000-20009").replace("verdict;", "verdict; flags interval;")
    with Provider() as provider, networks(isolated("a", "virbr10")):
        run("sh", "-ec", take)
        try:
            create(domain("web", nic("a", MAC), publishes=ports("start='auto' to='22'")))
            assert "20010" in natns("forward", "list", "web").stdout
            destroy("web")
        finally:
            run("sh", "-ec", give_back)
    assert provider
