# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command validate: files with networks, domains and configurations, before they are used.

The content tells the kind of a file.  A network is judged by the configuration among the files,
else by the machine's, with the words that refuse its start.  The command needs neither root nor
libvirt, and changes nothing.

Limits: the command looks at no kernel, record or pool.  A missing bridge, a used port or an empty
pool refuses the start of a network that is valid here.  dnsmasq reads the options of a network
with ``<natns:ip>``, if dnsmasq is installed.
"""

import argparse
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from libvirt_natns.cli.libvirt_view import BRIDGE
from libvirt_natns.cli.unhandled import UNTOUCHED
from libvirt_natns.documents import config, libvirt_xml, xml_tree
from libvirt_natns.engine import start_checks
from libvirt_natns.errors import ConfigError, NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.upstream import segments, selection
from libvirt_natns.values import quoted

FileKind = Literal["network", "domain", "configuration"]
ROOTS = ("network", "domain")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def run(options: argparse.Namespace) -> int:
    """Print a line for each file; 1 if a file is wrong or cannot be read."""
    contents = {file: _content(file) for file in options.files}
    settings = _settings(contents.values())
    wrong = 0
    for file, content in contents.items():
        try:
            print(f"{file}: {_verdict(content, settings)}")
        except NatnsError as error:
            print(f"{file}: {error}")
            wrong = 1
    return wrong


def _content(file: str) -> bytes | NatnsError:
    """Return the content of a file, or why it cannot be read."""
    try:
        return Path(file).read_bytes()
    except OSError as error:
        return NatnsError("cannot be read", error.strerror or str(error))


def _settings(contents: Iterable[bytes | NatnsError]) -> Config | None:
    """Return the configuration among the files, else the machine's.

    None for a configuration that is wrong, or that cannot be read.
    """
    given = [
        each for each in contents if isinstance(each, bytes) and _kind(each) == "configuration"
    ]
    with suppress(ConfigError):
        return config.parse_octets(given[0], "") if given else config.load()
    return None


def _kind(content: bytes) -> FileKind | None:
    """Return the kind of a file; None for XML of another kind.

    An element stands in no configuration ahead of a key or a table.
    """
    text = content.removeprefix(BYTE_ORDER_MARK).lstrip()
    if not text.startswith(b"<"):
        return "configuration"
    with suppress(NatnsError):
        tag = xml_tree.parse(content, ROOTS).tag
        return "network" if tag == "network" else "domain"
    return None


def _verdict(content: bytes | NatnsError, settings: Config | None) -> str:
    """Return that a file is valid.  Raises NatnsError."""
    if isinstance(content, NatnsError):
        raise content
    kind = _kind(content)
    if kind == "configuration":
        return _configuration(content)
    try:
        return _domain(content) if kind == "domain" else _network(content, settings)
    except NatnsError as error:
        raise NatnsError(f"wrong {kind or 'document'}: {error.fact}", error.remedy) from error


def _network(content: bytes, settings: Config | None) -> str:
    # Another document than a network's is refused here as well.
    xml_tree.parse(content, ROOTS)
    network = libvirt_xml.parse_network(content, bridge=BRIDGE)
    valid = f"network {quoted(network.name)}: valid"
    if settings is None:
        return f"{valid}, without a look at its upstream: the configuration cannot be used"
    verdict = selection.verdict(network, settings)
    if verdict.network is None:
        return f"{valid}, and {UNTOUCHED}: {verdict.reason}"
    upstream = selection.upstream_of(network, settings)
    segment = segments.as_configured(network, upstream)
    start_checks.check_document(network, segment, settings.firewall)
    return f"{valid}, and gets a router to upstream {upstream.name}"


def _domain(content: bytes) -> str:
    domain = libvirt_xml.parse_domain(content)
    valid = f"domain {quoted(domain.name)}: valid"
    if domain.nat is None:
        return f"{valid}, without <natns:nat>"
    counts = {"portForward": len(domain.nat.forwards), "address": len(domain.nat.addresses)}
    parts = [f"{number} <natns:{name}>" for name, number in counts.items() if number]
    return f"{valid}, with {' and '.join(parts) or '<natns:nat>'}"


def _configuration(content: bytes) -> str:
    settings = config.parse_octets(content, "wrong configuration")
    return f"configuration: valid, with scope {settings.scope} and upstream {settings.upstream}"
