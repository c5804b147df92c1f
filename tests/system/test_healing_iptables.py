# SPDX-License-Identifier: LGPL-2.1-or-later
"""Legacy iptables tells of no change: rules that were altered heal all the same."""

from healing import PATIENCE, Parts, heals, network, open_files
from lab import Provider, remove_config, wait_for, write_config

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
            wait_for(lambda: net.uuid not in parts.watch._followed, timeout=PATIENCE)
            wait_for(lambda: open_files() <= before + 20, timeout=PATIENCE)
            assert parts.watch._host_tables < 0 or not parts.watch._followed
    finally:
        remove_config()
