# SPDX-License-Identifier: LGPL-2.1-or-later
"""The status of a router namespace, as text and for programs."""

from collections.abc import Iterator
from contextlib import suppress

from libvirt_natns.errors import NatnsError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.upstream.router import health, nic_link, nic_snapshot, recover
from libvirt_natns.upstream.router.journal import RouterRecord
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle
from libvirt_natns.upstream.router.nic_snapshot import Capture
from libvirt_natns.upstream.router.target import Target

MEANING = {
    "down": "down",
    "half-done": "half-done (killed at: {step}); virt-natns router up or down fixes it",
    "overdue": "not confirmed in time; virt-natns router up or down rolls it back",
    "unconfirmed": "up, rolled back in {left:.0f} s unless confirmed",
    "up": "up",
    "damaged": "damaged; virt-natns router up repairs it",
}


def describe(opened: RouterLifecycle, name: str) -> dict[str, object]:
    """Return the status of a router, for programs."""
    state, record, differences = health.of(opened, name)
    described: dict[str, object] = {
        "router": name,
        "state": state,
        "differences": differences,
        "confirmed": recover.is_confirmed(name),
    }
    if record is not None:
        described |= _details(opened, record)
    return described


def _details(opened: RouterLifecycle, record: RouterRecord) -> dict[str, object]:
    target, before = record.target, record.before
    left = None if record.deadline is None else max(0.0, record.deadline - boot_clock.now())
    return {
        "step": record.step,
        "seconds_left": left,
        "nic": target.nic,
        "mac": before.mac,
        "namespace": target.namespace,
        "addresses": _router_addresses(target, before),
        "host": {
            "link": target.link,
            "address": str(target.host),
            "addresses4": list(target.addresses4),
            "addresses6": list(target.addresses6),
            "ports": [f"{p}/{a}" if a == b else f"{p}/{a}-{b}" for p, a, b in target.ports],
        },
        "transit": target.transit,
        "transit6": target.transit6 or None,
        "subnet6": target.subnet6 or None,
        "networks": opened.users_of(record),
        "dropped": dropped(target.namespace, target.nic),
    }


def _router_addresses(target: Target, before: Capture) -> list[str]:
    with suppress(NatnsError):
        before = nic_snapshot.capture(target.namespace, target.nic)
    return [f"{a.ip}/{a.prefix}" for a in (*before.ipv4, *before.ipv6)]


def dropped(namespace: str, name: str) -> dict[str, int]:
    """Return the frames that the NIC has dropped or could not send, by direction."""
    with suppress(NatnsError, OSError):
        return nic_link.drops(namespace, name)
    return {}


def text(router: dict[str, object]) -> str:
    """Return a described router as lines."""
    left = router.get("seconds_left") or 0.0
    said = MEANING[str(router["state"])].format(step=router.get("step"), left=left)
    lines = [f"router {router['router']}: {said}"]
    if "nic" in router:
        lines += _detail_lines(router)
    differences = router["differences"]
    assert isinstance(differences, list)
    lines += [f"  ! {what}" for what in differences]
    return "\n".join(lines)


def _detail_lines(router: dict[str, object]) -> Iterator[str]:
    host, networks = router["host"], router["networks"]
    addresses, drops = router["addresses"], router["dropped"]
    assert isinstance(host, dict) and isinstance(networks, list)
    assert isinstance(addresses, list) and isinstance(drops, dict)
    yield f"  NIC       {router['nic']}, {router['mac']}, in {router['namespace']}"
    yield f"  router    {', '.join(addresses) or 'no address'}"
    own = ", ".join([host["address"], *host["addresses4"], *host["addresses6"]])
    yield f"  host      {own} on {host['link']}; gets {', '.join(host['ports']) or 'no port'}"
    bridged = " and ".join(
        str(bridge) for bridge in (router["transit"], router["transit6"]) if bridge
    )
    yield f"  networks  {', '.join(networks) or 'none'}, on {bridged}"
    counted = ", ".join(f"{what} {number}" for what, number in drops.items())
    yield f"  dropped   {counted or 'unknown'}"
