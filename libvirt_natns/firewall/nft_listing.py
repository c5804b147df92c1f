# SPDX-License-Identifier: LGPL-2.1-or-later
"""Texts of nft in words that all versions of nft agree on, so that they can be compared."""

import re

MET = re.compile(r"(flags dynamic[^}]*?)\n\t*elements = \{[^}]*\}")
"""Elements that packets put into a set: they are no rules."""
ELEMENTS = re.compile(r"elements = \{([^}]*)\}")
PROTOCOL = re.compile(r"\b(tcp|udp|sctp)\b")
TRANSPORT = re.compile(r"(meta l4proto )(tcp|udp|sctp)\b")
HELPED = re.compile(r'(type "\w+" protocol )(tcp|udp)\b')
SYN = re.compile(r"tcp flags & \(syn ?\| ?rst\) == syn\b")
"""As rules have it, and nft 1.1 lists it; nft 1.0 lists a mask of flags in short."""
NUMBERS = {"tcp": "6", "udp": "17", "sctp": "132"}


def canonical(text: str) -> str:
    """Return rules, of a script or listed with -p, in words that every nft agrees on.

    The kernel keeps elements in an order of its own, and nft wraps them.  nft names
    protocols where the machine has an /etc/protocols, and numbers them elsewhere.
    nft 1.0.6 knows no name for the priority of a dnat on output, 1.1 writes one.
    """
    text = SYN.sub("tcp flags syn / syn,rst", text)
    text = TRANSPORT.sub(lambda match: f"{match[1]}{NUMBERS[match[2]]}", text)
    text = HELPED.sub(lambda match: f"{match[1]}{NUMBERS[match[2]]}", text)
    return ELEMENTS.sub(_sorted_elements, MET.sub(r"\1", text)).replace(
        "hook output priority dstnat;", "hook output priority -100;"
    )


def _sorted_elements(elements: re.Match[str]) -> str:
    numbered = PROTOCOL.sub(lambda match: NUMBERS[match[0]], elements[1])
    return f"elements = {{ {', '.join(sorted(' '.join(numbered.split()).split(', ')))} }}"


def block(ruleset: str, table: str) -> str:
    """Return the lines of a table, "family name", in a listing of a whole ruleset; "" without."""
    lines = re.search(rf"^table {table} \{{\n.*?^\}}\n", ruleset, re.MULTILINE | re.DOTALL)
    return lines[0] if lines else ""
