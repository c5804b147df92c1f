# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lines of a dnsmasq that decide which NICs get a router, and DNS servers, by DHCP.

A guest with NICs in several networks shall have one default route.  dnsmasq knows a NIC by
its MAC address and gives it a tag.  The tag decides about the options 3 (routers) and 6
(DNS servers).

A tag in the hosts file (``set:``) would end dnsmasq 2.90: it frees the tag on SIGHUP, together
with memory that is not its own.  So most NICs have an entry with an address of another
network, for which dnsmasq itself sets a tag.  It reads these entries again on SIGHUP.

A NIC with another entry does not get this tag, and has a line in the configuration.  A change
then restarts dnsmasq.  The same holds for all NICs if a name selects an entry: dnsmasq 2.90
hangs if both kinds of entries meet.

Limit: router advertisements go to all guests of a link alike.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from libvirt_natns.daemons import dnsmasq_files
from libvirt_natns.model.network import Network

ELSEWHERE = "known-othernet"
"""dnsmasq's tag of a NIC that has no entry but that with an address of another network."""

OPTIONS = {
    "3": re.compile(r"dhcp-option(-force)?\s*=\s*(option:router|3)\s*(,|$)"),
    "6": re.compile(r"dhcp-option(-force)?\s*=\s*(option:dns-server|6)\s*(,|$)"),
}
"""The numbers of the options, with lines of a user that settle them for all NICs."""

OTHER_ENTRIES = re.compile(r"\s*(dhcp-host|dhcp-hostsfile|dhcp-hostsdir|read-ethers)\b|.*\bknown\b")
"""Lines of a user with entries for NICs, or about NICs with an entry."""


@dataclass(frozen=True, slots=True)
class RoutedNics:
    """The NICs that DHCP gives a default route and DNS servers.

    ``others``: NICs that nothing is known of get them.  ``exceptions`` are the MAC addresses
    of NICs for which the contrary holds.
    """

    others: bool = True
    exceptions: tuple[str, ...] = ()

    def lines(self, network: Network, users: Sequence[str], hosts: str) -> list[str]:
        """Return the lines of a network's configuration.

        ``users`` are the lines of the user, and ``hosts`` is the hosts file without tags.
        """
        if not _has_dhcp(network):
            return []
        tag = "natns-no-router" if self.others else "natns-router"
        tags = [tag] if _only_in_configuration(network, users) else [tag, ELSEWHERE]
        if self.others:
            conditions = [f"tag:{each}" for each in tags]
        else:
            conditions = [",".join(f"tag:!{each}" for each in tags)]
        options = [
            # Without a value, the option is not sent.
            f"dhcp-option={condition},{number}"
            for number, settled in OPTIONS.items()
            if not any(map(settled.match, users))
            for condition in conditions
        ]
        elsewhere = set(self._elsewhere(network, users, hosts))
        macs = (mac for mac in self.exceptions if mac not in elsewhere)
        return [*options, *(f"dhcp-mac=set:{tag},{mac}" for mac in macs)]

    def hosts(self, network: Network, users: Sequence[str], hosts: str) -> str:
        """Return the hosts file with entries for the exceptions, as far as it can have them."""
        # dnsmasq prefers the last entry of a NIC, which may be for IPv6.
        return dnsmasq_files.elsewhere(self._elsewhere(network, users, hosts)) + hosts

    def _elsewhere(self, network: Network, users: Sequence[str], hosts: str) -> Iterator[str]:
        """Yield the exceptions that get an entry with an address of another network."""
        if not _has_dhcp(network) or _only_in_configuration(network, users):
            return
        entered = set(dnsmasq_files.entered(hosts))
        yield from (mac for mac in self.exceptions if mac not in entered)


ALL_ROUTED = RoutedNics()


def _has_dhcp(network: Network) -> bool:
    return any(subnet.dhcp for subnet in network.subnets if subnet.network.version == 4)


def _only_in_configuration(network: Network, users: Sequence[str]) -> bool:
    """True if names select entries, or entries may stand where they are not seen."""
    hosts = (host for subnet in network.subnets for host in subnet.hosts)
    return any(host.mac is None and host.id is None for host in hosts) or any(
        map(OTHER_ENTRIES.match, users)
    )
