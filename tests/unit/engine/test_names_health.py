# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which servers a network's dnsmasq asks, and why guests have no names."""

from dataclasses import replace
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from libvirt_natns import names
from libvirt_natns.daemons import dns_relay, dnsmasq_config, dnsmasq_files, resolv_conf
from libvirt_natns.engine import names_health
from libvirt_natns.engine.engine import Engine
from libvirt_natns.kernel.boot_clock import boot_id
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import HOST_UPSTREAM, BridgeUpstream
from libvirt_natns.state.networks import NetworkRecord
from libvirt_natns.state.store import Store

UUID = "6f2b9c1e-0000-4000-8000-0000000000e1"
LAB = BridgeUpstream(name="lab", bridge="br0", subnet=IPv4Network("192.168.0.0/24"))
PROVIDER = replace(LAB, name="provider", gateway=IPv4Address("192.168.0.1"))


@pytest.fixture
def resolv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The host's resolv.conf, and no other file with servers."""
    file = tmp_path / "resolv.conf"
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(dns_relay, "RESOLV_CONF", file)
    of_file = partial(resolv_conf.host_resolvers, (file,))
    monkeypatch.setattr(resolv_conf, "host_resolvers", of_file)
    return file


def reason(resolv: Path, configuration: str, upstream: str = "provider") -> str:
    """Why a network with that dnsmasq configuration has no names."""
    dnsmasq = dnsmasq_files.paths(UUID).configuration
    dnsmasq.parent.mkdir(parents=True, exist_ok=True)
    dnsmasq.write_text(configuration)
    store = Store(resolv.parent)
    record = NetworkRecord(
        UUID, "a", "nat-a", "virbr10", upstream, "bridge", (), True, "up", boot_id(), 0.0, b""
    )
    store.networks.put(record)
    store.transit.choose_subnet("host", [IPv4Network("198.19.252.0/22")], None)
    config = Config(upstreams={"provider": PROVIDER, "lab": LAB, "host": HOST_UPSTREAM})
    found = names_health.findings(Engine(config, store, Kernel()))
    store.close()
    return found.get(UUID, "")


def test_servers_of_a_configuration() -> None:
    text = "strict-order\nserver=/corp.test/192.0.2.1\nserver = 192.0.2.2\nresolv-file=/x\n"
    assert dnsmasq_config.default_servers(text) == ["192.0.2.2"]
    assert dnsmasq_config.resolv_file(text) == "/x"
    assert dnsmasq_config.resolv_file("") is None


def test_a_network_that_asks_no_relay(resolv: Path) -> None:
    assert "set 'dns' in [upstreams.provider]" in reason(resolv, "no-resolv\n")
    assert reason(resolv, "no-resolv\nserver=192.0.2.1\n") == ""
    resolv.write_text("nameserver 127.0.0.53\nnameserver fe80::1%eth0\n")
    assert "names no server that network a can ask" in reason(resolv, "no-resolv\n")
    assert "names no server" in reason(resolv, f"resolv-file={resolv}\n")
    resolv.write_text("nameserver 192.0.2.1\n")
    assert reason(resolv, f"resolv-file={resolv}\n") == ""
    resolv.write_text("nameserver 127.0.0.1\n")
    dns_relay.paths("natns-host").complaint.parent.mkdir(parents=True)
    dns_relay.complain("natns-host", "open its port")
    assert "set 'dns'" in reason(resolv, "no-resolv\n"), "a bridge has no relay"
    assert reason(resolv, "no-resolv\n", "host").endswith("does not serve: open its port")
    resolv.write_text("nameserver 192.0.2.1\n")
    # A server is there, so the network's XML says that none is asked.
    assert reason(resolv, "no-resolv\n") == ""


def test_a_lab_without_a_gateway_has_no_names_by_intent(resolv: Path) -> None:
    assert reason(resolv, "no-resolv\n", "lab") == ""


def test_a_network_on_the_relay(resolv: Path) -> None:
    asks = "no-resolv\nserver=198.19.252.1#305\n"
    assert f"{resolv} names no server" in reason(resolv, asks, "host")
    resolv.write_text("nameserver 192.0.2.1\n")
    assert reason(resolv, asks, "host") == ""


def test_a_relay_with_a_complaint_is_noted(resolv: Path) -> None:
    assert names_health.notes() == []
    dns_relay.paths("natns-host").complaint.parent.mkdir(parents=True)
    dns_relay.complain("natns-host", "Address already in use")
    (note,) = names_health.notes()
    assert "natns-host does not serve" in note and note.endswith("Address already in use")
