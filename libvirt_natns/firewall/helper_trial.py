# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tells whether the kernel has the helpers of conntrack that a network asks for.

A helper has two modules.  ``nf_conntrack_NAME`` reads announcements; the kernel loads it for a
rule that names the helper.  ``nf_nat_NAME`` translates announcements; no rule loads it, and without
it announcements leave untranslated.

Limit: a module that is built into the kernel may leave no trace.  So a missing ``nf_nat_NAME``
shows only where modprobe knows the modules of this kernel.
"""

import os
import subprocess
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import backends
from libvirt_natns.firewall.helpers import following
from libvirt_natns.kernel import processes
from libvirt_natns.kernel.netns import in_scratch_namespace
from libvirt_natns.model.upstream import Helper

LOADED = Path("/sys/module")
MODULES = Path("/lib/modules")

LOAD_LIMIT = 5.0
"""Seconds that modprobe may take."""

worked: set[tuple[str, Helper]] = set()
"""Backends and helpers that this process has found to work."""


def check(helpers: Collection[Helper], backend: str, asking: str, remedy: str) -> None:
    """Refuse helpers that the kernel lacks.

    ``asking`` says in words who asks, and ``remedy`` the place of the request.
    Raises FirewallError with the first helper that is missing.
    """
    for helper in sorted(set(helpers)):
        fault = _fault(helper, backend)
        if fault:
            raise FirewallError(
                f"{asking}: the kernel has no helper {helper}, as {fault}",
                f"install a kernel with nf_conntrack_{helper} and nf_nat_{helper}, or {remedy}",
            )


def present(helpers: Collection[Helper], backend: str) -> tuple[Helper, ...]:
    """Return the helpers that the kernel has."""
    return tuple(helper for helper in helpers if not _fault(helper, backend))


def _fault(helper: Helper, backend: str) -> str:
    """Return what the kernel lacks for a helper, in words; "" for nothing."""
    if (backend, helper) in worked:
        return ""
    translator = f"nf_nat_{helper}"
    if not _load(translator):
        return f"module {translator} is missing"
    rules = tuple(following("inner", [helper]))
    try:
        in_scratch_namespace(lambda: backends.named(backend).apply(None, rules))
    except FirewallError as error:
        return f"module nf_conntrack_{helper} is missing ({error})"
    worked.add((backend, helper))
    return ""


def _load(module: str) -> bool:
    """Load a module; False where it is missing for sure."""
    modprobe = processes.program("modprobe")
    known = (MODULES / os.uname().release / "modules.dep").exists()
    if modprobe is None or not known or (LOADED / module).exists():
        return True
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [modprobe, "-q", module], stdin=subprocess.DEVNULL, capture_output=True,
            timeout=LOAD_LIMIT, check=False,
        )  # fmt: skip
        return done.returncode == 0
    return True
