# SPDX-License-Identifier: LGPL-2.1-or-later
"""Comparing and loading a namespace's rule set, by a fingerprint of the loaded rules."""

from pathlib import Path

from libvirt_natns import names
from libvirt_natns.engine.apply.context import ApplyContext
from libvirt_natns.engine.operations.daemons import Firewall
from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import backends
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.kernel.session import Kernel

LOADS = 3
"""Loads of a rule set that another program changes at the same time."""

NOTHING = "nothing"
"""The word of a fingerprint for a kernel that holds no rules."""


def fingerprint_file(owner: str) -> Path:
    """Return the file with the fingerprint of a network's loaded rules."""
    return names.network_directory(owner) / "firewall"


def _fingerprint(operation: Firewall) -> str:
    """Return the backend, a digest of the plan's rules, and a digest of the kernel's listing.

    No two versions of nft word a listing alike.  So only the listing that is taken right
    after loading tells later whether the rules were altered.
    """
    backend = backends.named(operation.backend)
    listing = backend.listing(operation.namespace)
    # Another program may have deleted a table since the load.
    whole = listing and not backends.missing_tables(backend.render(operation.rules), listing)
    shown = backends.fingerprint(listing) if whole else NOTHING
    return f"{_wanted(operation)} {shown}"


def _wanted(operation: Firewall) -> str:
    rules = backends.named(operation.backend).render(operation.rules)
    return f"{operation.backend} {backends.fingerprint(rules)}"


def _dated_fingerprint(operation: Firewall) -> str:
    """Return the fingerprint, followed by the rules' generation if that did not change."""
    backend = backends.named(operation.backend)
    before = backend.generation(operation.namespace)
    fingerprint = _fingerprint(operation)
    sure = before and before == backend.generation(operation.namespace)
    return f"{fingerprint} {before}" if sure else fingerprint


def _recorded_fingerprint(owner: str) -> str:
    try:
        return fingerprint_file(owner).read_text()
    except FileNotFoundError:
        return ""


def firewall_differs(kernel: Kernel, operation: Firewall) -> list[str]:
    """Return a line if the rules in force are not the plan's."""
    if _is_loaded(operation):
        return []
    return [f"firewall of {operation.namespace} is missing or was altered"]


def _is_loaded(operation: Firewall) -> bool:
    """True if the plan's rules are in force and unaltered."""
    *fingerprint, recorded = [*_recorded_fingerprint(operation.owner).split(), ""][:4]
    if " ".join(fingerprint[:2]) != _wanted(operation):
        return False
    # Listing the rules takes as long as all other comparisons together.
    generation = backends.named(operation.backend).generation(operation.namespace)
    unchanged = recorded != "" and recorded == generation
    if NOTHING in fingerprint:
        return False
    return unchanged or " ".join(fingerprint) == _fingerprint(operation)


def ensure_firewall(context: ApplyContext, operation: Firewall) -> None:
    """Load the rules and record their fingerprint.  Raises FirewallError."""
    earlier = _recorded_fingerprint(operation.owner).partition(" ")[0]
    file = fingerprint_file(operation.owner)
    make_directory(file.parent)
    # The backend's name alone differs from any fingerprint, and tells which rules there are.
    file.write_text(earlier or operation.backend)
    _load(operation)
    if earlier not in ("", operation.backend):
        # The configured backend has changed: the former one's rules go after the load.
        backends.named(earlier).clear(operation.namespace)
    file.write_text(_dated_fingerprint(operation))


def _load(operation: Firewall) -> None:
    """Load the rules while no other program changes them.

    The listing that is recorded next counts as ours.  Raises FirewallError.
    """
    backend = backends.named(operation.backend)
    for _ in range(LOADS):
        before = backend.generation(operation.namespace)
        backend.apply(operation.namespace, operation.rules)
        after = backend.generation(operation.namespace)
        # A load counts as a single change.
        if not before or (int(after or 0) - int(before)) % 2**32 == 1:
            return
    raise FirewallError(
        f"somebody changes the rules of {operation.namespace} while they are loaded",
        "find out who (nft monitor)",
    )
