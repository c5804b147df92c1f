# SPDX-License-Identifier: LGPL-2.1-or-later
"""The netplan lines of a page, in force as netplan makes them: systemd-networkd cannot run here."""

import re
from contextlib import ExitStack
from pathlib import Path
from textwrap import dedent
from typing import Any

import yaml  # type: ignore[import-untyped]
from lab_base import run


def lines_of(page: Path, section: str) -> dict[str, Any]:
    """The netplan lines of a section of the page."""
    text = page.read_text().partition(f"\n## {section}\n")[2]
    found = re.search(r"^ *```\n(.*?)```", text, re.S | re.M)
    assert found
    loaded: dict[str, Any] = yaml.safe_load(dedent(found[1]))
    return loaded


def in_force(stack: ExitStack, netplan: dict[str, Any]) -> None:
    """Have these lines in force; the bridges go with the stack."""
    for link, settings in netplan["network"]["bridges"].items():
        run("ip", "link", "add", link, "type", "bridge", "stp_state", "0")
        stack.callback(run, "ip", "link", "del", link)
        for port in settings.get("interfaces", []):
            run("ip", "link", "set", port, "master", link)
    for kind in ("ethernets", "bridges"):
        for link, settings in netplan["network"][kind].items():
            run("ip", "link", "set", link, "up")
            for address in settings.get("addresses", []):
                run("ip", "address", "add", address, "dev", link)
            for route in settings.get("routes", []):
                via = ("via", route["via"]) if "via" in route else ()
                onlink = ("onlink",) if route.get("on-link") else ()
                scope = ("scope", route["scope"]) if "scope" in route else ()
                run("ip", "route", "add", route["to"], *via, "dev", link, *onlink, *scope)
