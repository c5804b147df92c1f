# SPDX-License-Identifier: LGPL-2.1-or-later
"""Rules of libvirt for a bridge that libvirt has forgotten.

When a network's `started` hook fails, libvirt counts the network as inactive.  It does not
remove the network's rules, not even at the next start.

Limits: rules that only legacy iptables shows stay; they name a bridge that is
gone, and are doubled when it comes back.
"""

import json
from collections.abc import Iterator
from typing import Any

from libvirt_natns.firewall import nft

CHAINS = "LIBVIRT_"
TABLE = "libvirt_network"
"""libvirt's chains in iptables' tables, and since 10.4 its own nft table."""


def forget(bridge: str) -> None:
    """Delete all rules of libvirt that match a bridge by its name.

    Without the program nft, no such rules are seen.  Raises FirewallError.
    """
    if nft.works():
        script = "".join(deletions(nft.ruleset_json(), bridge))
        if script:
            nft.load(None, script)


def deletions(listing: str, bridge: str) -> Iterator[str]:
    """Yield the commands that delete these rules, from nft's JSON listing of everything."""
    for item in json.loads(listing)["nftables"]:
        rule = item.get("rule")
        if rule and _is_libvirts(rule) and any(_names(match, bridge) for match in rule["expr"]):
            yield (
                f"delete rule {rule['family']} {rule['table']} {rule['chain']}"
                f" handle {rule['handle']}\n"
            )


def _is_libvirts(rule: dict[str, Any]) -> bool:
    chain: str = rule["chain"]
    return chain.startswith(CHAINS) or bool(rule["table"] == TABLE)


def _names(expression: dict[str, Any], bridge: str) -> bool:
    match = expression.get("match", {})
    left = match.get("left", {})
    key = left.get("meta", {}).get("key") if isinstance(left, dict) else None
    return key in ("iifname", "oifname") and bool(match.get("right") == bridge)
