# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router namespace: the NIC's home while the router is up."""

from dataclasses import dataclass
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations import namespaces
from libvirt_natns.operations.firewall_operations import fingerprint_file
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import journal, nic_lease, nic_link, router_files
from libvirt_natns.upstream.router.target import Target


@dataclass(frozen=True, slots=True)
class RouterNamespace(Operation):
    """The namespace of a router; its journal tells that an untagged namespace is ours."""

    encloses = True

    target: Target

    def describe(self) -> str:
        return f"namespace {self.target.namespace}"

    def differs(self, kernel: Kernel) -> list[str]:
        name = self.target.namespace
        owner = kernel.namespace_owner(name)
        if owner == self._owner:
            return []
        return [f"namespace {name} " + ("is missing" if owner is None else "is not ours")]

    def ensure(self, context: ApplyContext) -> None:
        name, note = self.target.namespace, self._note
        self._refuse_foreign(context.kernel)
        # A DHCP client in a namespace without a name keeps the NIC there.
        nic_lease.end(self.target)
        ndppd.stop_in(name)
        # The file tells of the rules of the former namespace.
        router_files.remove(fingerprint_file(self.target.name, "router"))
        note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        note.touch()
        namespaces.make_anew(context, name, self._owner)
        router_files.remove(note)

    def _refuse_foreign(self, kernel: Kernel) -> None:
        """Refuse a namespace that another program has made in place of a router's.

        The preflight does so for a router that comes up; from then on the namespace is
        tagged.  A kill before the tag leaves a note.  Raises ConflictError.
        """
        name = self.target.namespace
        if kernel.namespace_owner(name) in (None, self._owner) or self._note.exists():
            return
        record = journal.load(self.target.name)
        if record is not None and record.is_whole:
            # The namespace of another router or network of ours may be in use.
            owner = kernel.namespace_owner(name)
            raise ConflictError(
                f"namespace {name} belongs to {owner or 'another program'}",
                "rename the upstream" if owner else f"delete it (ip netns delete {name})",
            )

    def take_back(self, kernel: Kernel) -> None:
        target = self.target
        if nic_link.exists(target.namespace, target.nic):
            # The kernel would move the NIC to the initial namespace, which need not be the host.
            raise ConflictError(
                f"{target.nic} is still in {target.namespace}",
                f"virt-natns router down {target.name}",
            )
        ndppd.stop_in(target.namespace)
        kernel.delete_namespace(target.namespace)
        router_files.remove(fingerprint_file(target.name, "router"))
        router_files.remove(self._note)

    @property
    def _note(self) -> Path:
        """The file that is there while a namespace is made and not yet tagged."""
        return names.router_file(self.target.name, "making")

    @property
    def _owner(self) -> str:
        return f"router {self.target.name}"
