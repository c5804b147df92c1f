# SPDX-License-Identifier: LGPL-2.1-or-later
"""The router namespace: the NIC's home while the router is up."""

from dataclasses import dataclass

from libvirt_natns.daemons import ndppd
from libvirt_natns.errors import ConflictError
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.operations import namespaces
from libvirt_natns.operations.firewall_operations import fingerprint_file
from libvirt_natns.operations.operation import ApplyContext, Operation
from libvirt_natns.upstream.router import nic_lease, nic_link, router_files
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
        return [] if owner == self._owner else [f"namespace {name} is missing"]

    def ensure(self, context: ApplyContext) -> None:
        name = self.target.namespace
        # A DHCP client in a namespace without a name keeps the NIC there.
        nic_lease.end(self.target)
        # The preflight has refused a namespace of another program.
        ndppd.stop_in(name)
        # The file tells of the rules of the former namespace.
        router_files.remove(fingerprint_file(self.target.name, "router"))
        namespaces.make_anew(context, name, self._owner)

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

    @property
    def _owner(self) -> str:
        return f"router {self.target.name}"
