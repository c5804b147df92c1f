# SPDX-License-Identifier: LGPL-2.1-or-later
"""A container of libvirt's: the hook lxc publishes its ports as the hook qemu does a guest's."""

from pathlib import Path

import pytest
from lab import (
    CommandError,
    FastGuest,
    Provider,
    isolated,
    natns,
    run,
    start_network,
    virsh,
    write_config,
)

REAL_INTERPRETER = True
pytestmark = pytest.mark.usefixtures("installed")

MAC = "52:54:00:00:00:05"
CONTAINER = f"""<domain type='lxc'><name>box</name>
  <metadata><natns:nat xmlns:natns="urn:libvirt-natns:1">
    <natns:portForward><natns:range start="2222" to="80"/></natns:portForward>
  </natns:nat></metadata>
  <memory unit='MiB'>64</memory>
  <os><type>exe</type><init>/bin/sleep</init><initarg>300</initarg></os>
  <devices>
    <interface type='network'><mac address='{MAC}'/><source network='a'/></interface>
    <console type='pty'/>
  </devices>
</domain>"""


def lxc(*arguments: str) -> None:
    run("virsh", "-q", "-c", "lxc:///system", *arguments)


def test_container(provider: Provider, tmp_path: Path) -> None:
    write_config(provider.config(firewall="nftables"))
    start_network(isolated("a", "virbr10"))
    client = provider.neighbour("client", "192.168.0.77/24")
    file = tmp_path / "box.xml"
    file.write_text(CONTAINER)
    lxc("create", str(file))
    try:
        assert "box    a        tcp    192.168.0.100:2222" in natns("forward", "list").stdout
        # What speaks for it: sleep(1) has no web server.
        with FastGuest("virbr10", MAC) as guest:
            assert guest.dhcp()["ip"] == "10.0.0.100"
            guest.serve("http", 80)
            page = client.run("curl", "-s", "-m", "5", "http://192.168.0.100:2222/").stdout
            assert page.startswith("192.168.0.77:")
            lxc("destroy", "box")
            with pytest.raises(CommandError):
                client.run("curl", "-s", "-m", "2", "http://192.168.0.100:2222/")
    finally:
        run("virsh", "-q", "-c", "lxc:///system", "destroy", "box", check=False)
    virsh("net-destroy", "a")
