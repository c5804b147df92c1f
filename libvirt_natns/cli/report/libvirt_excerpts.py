# SPDX-License-Identifier: LGPL-2.1-or-later
"""Answers of libvirt for a bug report, printed by a process of its own, for libvirt may hang."""

from collections.abc import Callable, Iterable

from libvirt_natns.daemons import libvirt
from libvirt_natns.documents import xml_excerpt, xml_sniff
from libvirt_natns.documents.libvirt_xml import parse_any_network
from libvirt_natns.errors import NatnsError

Excerpt = Callable[[bytes], str]

MOST = 40
"""Networks, and guests, that are printed."""


def print_networks() -> None:
    """Print the version of libvirt, and its networks."""
    try:
        print("libvirt", ".".join(map(str, libvirt.version())))
        active = libvirt.active_networks()
        names = {xml_sniff.at_network(xml).name for xml in active.values()}
        documents = libvirt.networks()
    except NatnsError as error:
        print(f"failed: {error}")
        return
    for name, xml in list(documents.items())[:MOST]:
        print(f"\n{name}: {'active' if name in names else 'inactive'}")
        _print(xml, xml_excerpt.of_network)
    _more(documents)


def print_guests() -> None:
    """Print the guests that run, with the parts that concern networks."""
    try:
        active = libvirt.active_domains()
    except NatnsError as error:
        print(f"failed: {error}")
        return
    for uri in sorted(active.silent):
        print(f"{uri} does not answer")
    for xml in list(active.domains.values())[:MOST]:
        _print(xml, xml_excerpt.of_domain)
    _more(active.domains)


def print_names() -> None:
    """Print the names of active networks without ``<forward>``, each after a "="."""
    for xml in libvirt.active_networks().values():
        try:
            network = parse_any_network(xml)
        except NatnsError:
            continue
        if network.forward_mode is None:
            print(f"={network.name}")


def _print(xml: bytes, excerpt: Excerpt) -> None:
    try:
        text = excerpt(xml)
    except NatnsError as error:
        text = f"failed: {error}"
    if text:
        print(text)


def _more(listed: Iterable[object]) -> None:
    more = len(list(listed)) - MOST
    if more > 0:
        print(f"\n({more} more are left out)")
