# SPDX-License-Identifier: LGPL-2.1-or-later
"""The few rules that the host's own namespace needs, in both of the kernel's rule frameworks.

* Transit bridges (upstreams of kind "host"): routed and masqueraded, replies in,
  and flows to a published port of the host; nothing else.  A flow that
  begins there leaves by links that lead out of the host.  Bridges for guests and
  containers of others are closed to it, unless the host itself published a port there.
* Links that forward because of a transit bridge forward for that bridge alone.
* Published ports answer on the host's addresses, to all clients: clients outside, the host
  itself, and guests.  The host sees the namespace of a guest as the client.
  Port numbers stay as they are; the namespace knows the guest of each port.
* Frames of private bridges that pass through iptables: see ``host_rules``.  With the
  backend iptables, a table of ours in nft keeps off the NAT that others have there.
* A way past foreign chains: see ``host_accepts``.

Everything of ours is in the table ``inet natns`` or in chains called NATNS-*,
and is found again by these names.  Callers hold a lock, so that only one caller
compares and changes at a time.

Limits:

* A client of a published port is not answered if its address lies in the private subnet
  behind the port.
* A legacy table that this module was the first to use stays, empty: the kernel cannot drop a
  table.
* Foreign chains in nft are seen only where the program nft is.
* The check of our jump in a foreign chain holds for the moment: reloading that chain drops
  the jump.
* With legacy iptables, fragments of twins' packets are put together before they have a zone.
  Two fragments with the same addresses and identification can mix.
* With the backend iptables, NAT rules that iptables-nft gets later than our own come ahead of
  published ports.  Where the program nft is missing, such rules translate bridged frames, too.
* With the backend iptables, links that come later are closed to guests.  The next change of
  a network, or the service, notices such links.
"""

from collections.abc import Callable
from typing import Protocol

from libvirt_natns.firewall import host_iptables, host_nftables, missed_flows
from libvirt_natns.firewall.host_accepts import accepts
from libvirt_natns.firewall.host_policy import HostPolicy
from libvirt_natns.firewall.host_rules import dnats, rules, zone_rules
from libvirt_natns.firewall.rule import Rule

Announce = Callable[[], None]


def ensure(
    policy: HostPolicy, backend_name: str, announce: Announce = lambda: None
) -> tuple[str, ...]:
    """Bring the host's rules to ``policy``; where they are, nothing is written.

    Returns the differences, one line each; ``announce`` is called ahead of each
    change.  Atomic in each framework.  Flows that began before the rules end.  Raises
    FirewallError.
    """
    # Ours first: a foreign chain that lets something in relies on them.
    changed = tuple(
        line
        for framework in _frameworks(backend_name)
        for line in framework.ensure(
            framework_rules(policy, framework, backend_name), accepts(policy), announce
        )
    )
    if changed:
        missed_flows.end(None, dnats(policy.forwards))
    return changed


def differences(policy: HostPolicy, backend_name: str) -> tuple[str, ...]:
    """Return what ``ensure`` would fix, one line each; () when all is well."""
    return tuple(
        line
        for framework in _frameworks(backend_name)
        for line in framework.differences(
            framework_rules(policy, framework, backend_name), accepts(policy)
        )
    )


def remove() -> None:
    """Delete everything of ours in both frameworks; success where there is nothing."""
    host_nftables.remove()
    host_iptables.remove()


class Framework(Protocol):
    """A rule framework of the kernel (nftables, legacy iptables), as the host's rules need it.

    ``own`` are the host's own rules, empty where the other framework has them.
    Foreign chains of this framework must let ``accepts`` through.
    """

    @property
    def name(self) -> str:
        """Return the name of the backend that uses the framework."""

    def ensure(
        self, own: tuple[Rule, ...], accepts: tuple[Rule, ...], announce: Announce, /
    ) -> tuple[str, ...]:
        """Bring everything of ours to these rules and return the differences."""

    def differences(self, own: tuple[Rule, ...], accepts: tuple[Rule, ...], /) -> tuple[str, ...]:
        """Return what ``ensure`` would change."""


def _frameworks(backend_name: str) -> list[Framework]:
    both: list[Framework] = [host_nftables, host_iptables]
    return sorted(both, key=lambda framework: framework.name != backend_name)


def framework_rules(
    policy: HostPolicy, framework: Framework, backend_name: str
) -> tuple[Rule, ...]:
    """Return our own rules in one framework, beside the backend of networks."""
    if framework.name == backend_name:
        return rules(policy, backend_name)
    if framework.name == host_nftables.name:
        # NAT of iptables-nft comes ahead of legacy NAT where its chain is the younger chain.
        return tuple(rule for rule in zone_rules(policy) if rule.action == "keep")
    return ()
