# SPDX-License-Identifier: LGPL-2.1-or-later
"""Legacy iptables tells of no change: rules that were altered heal all the same."""

from healing import PATIENCE, Parts, heals, network, open_files
from lab import Provider, remove_config, run, wait_for, write_config

COMMANDS = ("-F FORWARD", "-A INPUT -j ACCEPT", "-t nat -F POSTROUTING")


def test_rules_of_legacy_iptables_heal(installed: None, provider: Provider) -> None:
    write_config(provider.config(firewall="iptables", more="probe = 0"))
    try:
        with Parts() as parts:
            before = open_files()
            with network("a", "virbr10") as net:
                parts.follow(net)
                for command in COMMANDS:
                    heals(parts, f"ip netns exec {{ns}} iptables-legacy {command}", net)
            wait_for(lambda: not parts.watch.follows(net.uuid), timeout=PATIENCE)
            wait_for(lambda: open_files() <= before + 20, timeout=PATIENCE)
    finally:
        remove_config()


def test_rules_of_the_host_name_the_links_that_lead_out_now(
    installed: None, provider: Provider
) -> None:
    write_config(provider.config(firewall="iptables", more="probe = 0"))
    metadata = (
        '<natns:nat xmlns:natns="urn:libvirt-natns:1"><natns:upstream name="host"/></natns:nat>'
    )
    try:
        with Parts() as parts, network("a", "virbr10", metadata) as net:
            parts.follow(net)
            wait_for(lambda: not parts.wrong(), timeout=PATIENCE)
            # A port of a network whose start goes on, or of a guest's, has no bridge yet.
            add_link("natup-other", "natin-other")
            assert not parts.wrong()
            add_link("tunnel", "vnet77")
            wait_for(lambda: names_tunnel() and not parts.wrong(), timeout=PATIENCE)
            run("ip", "link", "delete", "tunnel")
            wait_for(lambda: not names_tunnel() and not parts.wrong(), timeout=PATIENCE)
    finally:
        for port in ("natup-other", "tunnel"):
            run("ip", "link", "delete", port, check=False)
        remove_config()


def add_link(name: str, peer: str) -> None:
    run("ip", "link", "add", name, "type", "veth", "peer", "name", peer)


def names_tunnel() -> bool:
    return "-o tunnel" in run("iptables-legacy", "-t", "mangle", "-S", "NATNS-GUARD").stdout
