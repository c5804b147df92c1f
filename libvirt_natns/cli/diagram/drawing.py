# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command diagram: collect a picture once, and draw it in a format."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from typing import cast

from libvirt_natns.cli import access, service_control
from libvirt_natns.cli.diagram.picture import Picture
from libvirt_natns.cli.diagram.picture_facts import collect
from libvirt_natns.cli.service_control import ServiceHealth
from libvirt_natns.errors import ServiceError

Draw = Callable[[Picture], str]


def run(options: argparse.Namespace) -> int:
    """Print a picture of the networks that are up."""
    access.require_root()
    with access.engine(look_only=True) as engine:
        picture = collect(engine, access.active_guests, _service())
    print(renderer(options.format)(picture), end="")
    return 0


def _service() -> ServiceHealth | None:
    """Return the service's health; None for an answer without sense, which ``status`` reports."""
    with suppress(ServiceError):
        return service_control.ask()
    return None


def renderer(name: str) -> Draw:
    """Return the function that draws a picture; only the module of that format is loaded."""
    module = import_module(f"libvirt_natns.cli.diagram.picture_{name}")
    return cast("Draw", module.draw)
