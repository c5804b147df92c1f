# SPDX-License-Identifier: LGPL-2.1-or-later
"""Forwards, addresses and ports in words."""

from libvirt_natns.addresses import Address, bracketed, is_placeholder
from libvirt_natns.model.publication import Forward, StaticNat
from libvirt_natns.spans import span_text


def listening(address: Address) -> str:
    """Return the address on which a forward listens, or "*" for all of the host's."""
    if is_placeholder(address):
        return "(no lease)"
    return str(address) if int(address) else "*"


def in_words(claim: Forward | StaticNat) -> str:
    """Return a forward or static NAT, in words."""
    if isinstance(claim, StaticNat):
        allowed = ", ".join(
            f"{each.proto} {span_text(each.first, each.last)}" for each in claim.ports
        )
        return f"address {claim.address} -> {claim.target}" + (f" ({allowed})" if allowed else "")
    sources = f" from {', '.join(map(str, claim.sources))}" if claim.sources else ""
    listen = at_port(claim.address, span_text(claim.first, claim.last))
    target = at_port(claim.target, span_text(claim.to, claim.to_last))
    return f"{claim.proto} {listen} -> {target}{sources}"


def at_port(address: Address, port: str) -> str:
    """Return an address with ports, as in a URL: "192.0.2.1:80", "[2001:db8::1]:80", "*:80"."""
    return f"{bracketed(listening(address))}:{port}"
