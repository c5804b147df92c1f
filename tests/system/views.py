# SPDX-License-Identifier: LGPL-2.1-or-later
"""What system tests look at: the kernel as ip(8) shows it, and virsh's answers."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lab import CommandError, Snapshot, define_network, natns, run, snapshot, spawn, virsh, wait_for

CONNECTED = 400.0
"""Seconds within which parallel commands must all have ended."""


def _ip(namespace: str | None, *arguments: str) -> Any:  # noqa: ANN401
    where = ("-n", namespace) if namespace else ()
    return json.loads(run("ip", "-j", "-d", *where, *arguments).stdout or "[]")


def links(namespace: str | None = None) -> dict[str, dict[str, Any]]:
    """All links by name, as ``ip -j -d link`` shows them."""
    return {link["ifname"]: link for link in _ip(namespace, "link")}


MET = re.compile(r"(flags dynamic[^}]*?)\n\t*elements = \{[^}]*\}")
"""What packets put into a set, which is no rule."""


def rules_of(network: str) -> str:
    """The rules in the namespace of a network, without counters and what packets put into sets."""
    listed = run("nft", "-s", "list", "ruleset", namespace=f"nat-{network}").stdout
    return MET.sub(r"\1", listed)


def by_altname(altname: str) -> dict[str, Any]:
    """The host's link with an alternative name."""
    return dict(_ip(None, "link", "show", "dev", altname)[0])


def addresses(link: str, namespace: str | None = None, family: str = "inet") -> list[str]:
    """Addresses with prefix of a link, link-local ones left out."""
    shown = _ip(namespace, "address", "show", "dev", link)[0]
    return [
        f"{entry['local']}/{entry['prefixlen']}"
        for entry in shown["addr_info"]
        if entry["family"] == family and entry["scope"] != "link"
    ]


def routes(namespace: str | None = None) -> dict[str, str]:
    """Destinations of the main table, each with its gateway and link."""
    return {
        route["dst"]: " ".join(filter(None, (route.get("gateway"), route.get("dev"))))
        for route in _ip(namespace, "route")
    }


def namespaces() -> set[str]:
    """The namespaces of networks."""
    return {path.name for path in Path("/run/netns").glob("nat-*")}


def upstream_address(network: str, namespace: str | None = None) -> str:
    """A running network's address on the upstream, as its namespace has it."""
    found = addresses("upstream", namespace or f"nat-{network}")
    assert len(found) == 1, found
    return found[0].partition("/")[0]


def status(network: str) -> dict[str, Any]:
    """What ``virt-natns status --json`` says of one network."""
    (found,) = json.loads(natns("status", network, "--json").stdout)["networks"]
    return dict(found)


def settled() -> Snapshot:
    """The host's state once the kernel is done with the lab's new IPv6 addresses."""
    wait_for(lambda: not run("ip", "-6", "address", "show", "tentative").stdout)
    return snapshot()


def refusal(network: str) -> str:
    """Our line in virsh's error for a network that does not start."""
    result = virsh("net-start", network, check=False)
    assert result.returncode != 0, f"{network} was started"
    found = re.findall(r"libvirt-natns: (.*)", result.stderr)
    assert len(found) == 1, result.stderr
    assert "Traceback" not in result.stderr
    # libvirt says "internal error:" of any hook that refuses.
    assert "internal error (" not in result.stderr
    after = result.stderr.partition(found[0])[2].strip()
    assert not after, f"more than one line: {result.stderr}"
    return str(found[0])


def redefine(xml: str) -> None:
    """Define a network again, from other XML, under the uuid that it has."""
    name = xml.partition("<name>")[2].partition("</name>")[0]
    uuid = virsh("net-uuid", name).stdout.strip()
    define_network(xml.replace("</name>", f"</name>\n  <uuid>{uuid}</uuid>"))


def at_once(*commands: str) -> None:
    """Run virsh commands in parallel; raises CommandError for the first that failed.

    A command may be several, separated by ";": one virsh runs them in turn, and
    its exit status is the last one's.
    """
    processes = [spawn("virsh", "-q", command) for command in commands]
    results = [(process, *process.communicate(timeout=CONNECTED)) for process in processes]
    for command, (process, output, error) in zip(commands, results, strict=True):
        if process.returncode or error:
            raise CommandError(_result(command, process.returncode, output, error))


def _result(command: str, status: int, output: str, error: str) -> Any:  # noqa: ANN401
    from subprocess import CompletedProcess

    return CompletedProcess(["virsh", command], status, output, error)


def define_all(xmls: Iterable[str]) -> None:
    """Define many networks with one virsh."""
    files = []
    for number, xml in enumerate(xmls):
        file = Path(f"/run/tmp/many-{number}.xml")
        file.write_text(xml)
        files.append(file)
    try:
        virsh("; ".join(f"net-define {file}" for file in files))
    finally:
        for file in files:
            file.unlink()
