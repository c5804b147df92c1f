# SPDX-License-Identifier: LGPL-2.1-or-later
"""Operations on namespaces and their sysctls."""

from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations.firewall_operations import fingerprint_file
from libvirt_natns.operations.operation import ApplyContext, Operation

TIME_OUTS = tuple(
    f"net/netfilter/nf_conntrack_{protocol}_timeout{state}"
    for protocol, states in (
        ("generic", ("",)),
        ("icmp", ("",)),
        ("icmpv6", ("",)),
        ("gre", ("", "_stream")),
        ("udp", ("", "_stream")),
        (
            "tcp",
            (
                "_syn_sent",
                "_syn_recv",
                "_established",
                "_fin_wait",
                "_close_wait",
                "_last_ack",
                "_time_wait",
                "_close",
                "_max_retrans",
                "_unacknowledged",
            ),
        ),
        (
            "sctp",
            (
                "_closed",
                "_cookie_wait",
                "_cookie_echoed",
                "_established",
                "_shutdown_sent",
                "_shutdown_recd",
                "_shutdown_ack_sent",
                "_heartbeat_sent",
            ),
        ),
    )
    for state in states
)
"""The sysctls of conntrack's time-outs."""


@dataclass(frozen=True, slots=True)
class Namespace(Operation):
    """A network namespace; ``owner`` is the uuid of the network it belongs to."""

    encloses = True

    name: str
    owner: str

    def describe(self) -> str:
        return f"namespace {self.name}"

    def differs(self, kernel: Kernel) -> list[str]:
        owner = kernel.namespace_owner(self.name)
        if owner == self.owner:
            return []
        if owner is None:
            return [f"namespace {self.name} is missing"]
        return [f"namespace {self.name} belongs to {owner or 'another program'}"]

    def ensure(self, context: ApplyContext) -> None:
        kernel, undo = context.kernel, context.undo
        owner = namespace_owner(kernel, self)
        if owner not in (None, self.owner):
            raise ConflictError(
                f"namespace {self.name} belongs to {owner or 'another program'}",
                # The namespace of another network of ours may be in use.
                "rename one of the two networks"
                if owner
                else f"delete it (ip netns delete {self.name}) or rename the network",
            )
        note = _start_note(self.owner)
        undo.add(note.unlink, True)
        undo.add(self.take_back, kernel)
        make_directory(note.parent)
        note.touch()
        # The file tells of the rules of the former namespace.
        fingerprint_file(self.owner).unlink(missing_ok=True)
        make_anew(context, self.name, self.owner)
        note.unlink()

    def take_back(self, kernel: Kernel) -> None:
        kernel.delete_namespace(self.name)


@dataclass(frozen=True, slots=True)
class Sysctl(Operation):
    """A value below /proc/sys/net; ``namespace`` None is the host's own."""

    namespace: str | None
    key: str
    value: str

    def describe(self) -> str:
        return f"sysctl {self.key} = {self.value} in {self.namespace or 'the host'}"

    def differs(self, kernel: Kernel) -> list[str]:
        value = kernel.at(self.namespace).sysctls.get(self.key)
        if value in (None, self.value):
            return []
        return [
            f"sysctl {self.key} is {value} instead of {self.value}"
            f" in {self.namespace or 'the host'}"
        ]

    def ensure(self, context: ApplyContext) -> None:
        context.kernel.at(self.namespace).sysctls.set(self.key, self.value)


@dataclass(frozen=True, slots=True)
class Settings(Operation):
    """Values below /proc/sys/net of a namespace, in the order in which they are set."""

    namespace: str
    values: tuple[tuple[str, str], ...]

    def describe(self) -> str:
        return "\n".join(
            f"sysctl {key} = {value} in {self.namespace}" for key, value in self.values
        )

    def differs(self, kernel: Kernel) -> list[str]:
        present = kernel.at(self.namespace).sysctls.values([key for key, _ in self.values])
        return [
            f"sysctl {key} is {present[key]} instead of {value} in {self.namespace}"
            for key, value in self.values
            if present.get(key, value) != value
        ]

    def ensure(self, context: ApplyContext) -> None:
        # The kernel resets some when another one changes, so all are set.
        context.kernel.at(self.namespace).sysctls.set_all(self.values)


@dataclass(frozen=True, slots=True)
class HostTimeOuts(Operation):
    """Time-outs of conntrack in a namespace, as they are in the host.

    A namespace begins with the kernel's own values, and not with those that an
    administrator has set.
    """

    namespace: str

    def describe(self) -> str:
        return f"conntrack time-outs in {self.namespace} as in the host"

    def differs(self, kernel: Kernel) -> list[str]:
        present = kernel.at(self.namespace).sysctls.values(TIME_OUTS)
        return [
            f"sysctl {key} is {present[key]} in {self.namespace}, and {value} in the host"
            for key, value in kernel.host.sysctls.values(TIME_OUTS).items()
            if present.get(key, value) != value
        ]

    def ensure(self, context: ApplyContext) -> None:
        sysctls = context.kernel.at(self.namespace).sysctls
        wanted = context.kernel.host.sysctls.values(TIME_OUTS)
        present = sysctls.values(wanted)
        sysctls.set_all((key, value) for key, value in wanted.items() if present.get(key) != value)


def make_anew(context: ApplyContext, name: str, owner: str) -> None:
    """Make a namespace, in place of a former one of ours.

    The former namespace is untagged, or it is an empty file.  A kill leaves that file
    between its making and its mounting.
    """
    context.kernel.delete_namespace(name)
    context.kernel.create_namespace(name, owner)
    context.fresh.add(name)
    context.starting = True


def namespace_owner(kernel: Kernel, operation: Namespace) -> str | None:
    """Return the uuid of a namespace's network, "" for a foreign namespace, None for none.

    A start that was killed before it could tag its namespace left a note.
    """
    owner = kernel.namespace_owner(operation.name)
    return operation.owner if owner == "" and _start_note(operation.owner).exists() else owner


def _start_note(owner: str) -> Path:
    return names.network_directory(owner) / "namespace"
