# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel's events: reads all that waits, and finds the networks concerned.

A false alarm costs a look at the network, and no more.  So an event that may be damage
counts as damage.
"""

from collections.abc import Callable, Iterable

from libvirt_natns import names
from libvirt_natns.engine.observer import HOST
from libvirt_natns.kernel import netlink, outward_links
from libvirt_natns.kernel.sysctl import Sysctls
from libvirt_natns.service import netlink_messages as messages
from libvirt_natns.service.followed_networks import FollowedNetworks
from libvirt_natns.service.inotify import DirectoryMonitor
from libvirt_natns.service.netlink_messages import LinkState
from libvirt_natns.service.netlink_monitor import Channel, HostMonitor, NamespaceMonitor, Overflow
from libvirt_natns.service.own_changes import OwnChanges

NAMESPACE_PREFIX = "nat-"
TRANSIT_PREFIX = "natns-"


class KernelEvents:
    """Reads the monitors of namespaces, of the host, and of the directory of namespaces.

    ``newcomer`` is called with each new namespace that looks like ours but is not followed.
    """

    def __init__(
        self,
        monitor: NamespaceMonitor,
        followed: FollowedNetworks,
        own: OwnChanges,
        newcomer: Callable[[str], None],
    ) -> None:
        self._inside = monitor
        self._outside = HostMonitor()
        self._directory = DirectoryMonitor(names.NETNS_DIRECTORY)
        self._followed = followed
        self._own = own
        self._newcomer = newcomer
        self._links: dict[int, LinkState] = {}
        self._led_over: set[int] = set()
        self._readers: tuple[tuple[Channel, Callable[[Channel], None]], ...] = (
            (self._inside.routing, self._read_inside),
            (self._inside.rules, self._read_inside),
            (self._outside.routing, self._read_links),
            (self._outside.rules, self._read_rules),
        )
        self._outside.list_links()

    def descriptors(self) -> list[int]:
        """Return the descriptors that are readable when events wait."""
        return [*(channel.fileno() for channel, _ in self._readers), self._directory.fileno()]

    def close(self) -> None:
        """Close all monitors."""
        for monitor in (self._inside, self._outside, self._directory):
            monitor.close()

    def read_all(self) -> None:
        """Read all events that wait."""
        for channel, read in self._readers:
            try:
                read(channel)
            except Overflow:
                # The lost messages may concern any network.
                self._links.clear()
                self._led_over.clear()
                self._outside.list_links()
                for uuid in (HOST, *self._followed):
                    self._own.heard(uuid)
        for name, come in self._directory.changes():
            self._on_name(name, come)

    # -- namespaces --------------------------------------------------------

    def _read_inside(self, channel: Channel) -> None:
        nsids = {
            nsid
            for nsid, datagram in channel.received()
            if not all(
                messages.kernels_own(kind, body) for kind, _, _, body in netlink.messages(datagram)
            )
        }
        for nsid in nsids:
            self._own.heard(self._followed.by_nsid(nsid))

    def _on_name(self, namespace: str, come: bool) -> None:
        """Note that a namespace's file has come or gone; the namespace itself may live on."""
        uuid = self._followed.by_namespace(namespace)
        if uuid is not None:
            self._own.heard(uuid)
        elif come and namespace.startswith(NAMESPACE_PREFIX):
            self._newcomer(namespace)

    # -- the host ----------------------------------------------------------

    def _read_rules(self, channel: Channel) -> None:
        for _, datagram in channel.received():
            if any(
                messages.alters_rules(kind, body) for kind, _, _, body in netlink.messages(datagram)
            ):
                self._own.heard(HOST)

    def _read_links(self, channel: Channel) -> None:
        for _, datagram in channel.received():
            for kind, _, _, body in netlink.messages(datagram):
                if kind in (netlink.RTM_NEWLINK, netlink.RTM_DELLINK):
                    self._on_link(kind, body)
                elif kind in (netlink.RTM_NEWADDR, netlink.RTM_DELADDR):
                    if not messages.kernels_own(kind, body):
                        self._on_address(kind, body)
                elif messages.alters_routing(kind, body):
                    self._led_over.clear()
                    self._own.heard_of_host()
                elif self._leads_elsewhere(messages.led_over(kind, body)):
                    self._own.heard_of_host()

    def _leads_elsewhere(self, indexes: Iterable[int]) -> bool:
        """True if a route leads over a link that does not forward yet, such as a new tunnel.

        Routes of a routing daemon come all day long, over links that have routes already.
        """
        fresh = [index for index in indexes if index not in self._led_over]
        self._led_over.update(fresh)
        links = [self._links[index].name for index in fresh if index in self._links]
        return any(not self._is_inward(link) and not _forwards(link) for link in links)

    def _on_link(self, kind: int, body: bytes) -> None:
        index = messages.link_index(body)
        before = self._links.get(index)
        after = messages.link_state(kind, body, before)
        if after is None:
            self._links.pop(index, None)
            self._led_over.discard(index)
        else:
            self._links[index] = after
        if before != after:
            for name in {link.name for link in (before, after) if link}:
                self._on_change_of(name)
            self._on_port(before, after)
            self._on_way_out(before, after)
            if before is not None and before.up and not (after and after.up):
                self._on_loss(before)

    def _on_change_of(self, link: str) -> None:
        if link.startswith(TRANSIT_PREFIX):
            self._own.heard_of_host()
        self._own.heard(self._followed.by_link(link))
        for uuid in self._followed.by_parent(link):
            self._own.heard(uuid)

    def _on_port(self, before: LinkState | None, after: LinkState | None) -> None:
        """Suspect the network of a bridge with a foreign port, even during a change of ours.

        The port may have a smaller MTU than the bridge says, where an administrator set that.
        """
        for port in (before, after):
            if port is None or port.name.startswith(outward_links.INWARD):
                continue
            bridge = self._links.get(port.master)
            uuid = self._followed.by_link(bridge.name) if bridge else None
            if uuid is not None:
                self._own.suspect(uuid)

    def _on_way_out(self, before: LinkState | None, after: LinkState | None) -> None:
        """Suspect HOST for a new way out, even during a change of ours.

        The host's rules in legacy iptables name each link that leads out, and may have
        been computed a moment ago.
        """
        if not self._followed.tables.has_host or _way_out(before) == _way_out(after):
            return
        changed = {link.name for link in (before, after) if link}
        if not all(self._is_inward(name) for name in changed):
            self._own.suspect(HOST)

    def _on_loss(self, link: LinkState) -> None:
        """Suspect HOST where its way out may have gone with a link.

        The kernel tells of no IPv4 route that goes with its link.
        """
        if not link.master and not self._is_inward(link.name):
            self._own.heard_of_host()

    def _is_inward(self, link: str) -> bool:
        """True for a network's own bridge and ports, guests' ports, and for new bridges."""
        ours = self._followed.by_link(link) is not None or link.startswith(outward_links.INWARD)
        return ours or outward_links.is_bridge(link)

    def _on_address(self, kind: int, body: bytes) -> None:
        link = self._links.get(messages.address_index(body))
        if link is None:
            return
        if link.name.startswith(TRANSIT_PREFIX):
            self._own.heard_of_host()
        elif kind == netlink.RTM_NEWADDR:
            self._own.heard(self._followed.by_link(link.name))


def _forwards(link: str) -> bool:
    """True if the host forwards IPv4 packets that come in by a link, or if the link is gone."""
    return Sysctls(None).get(f"net/ipv4/conf/{link}/forwarding") != "0"


def _way_out(link: LinkState | None) -> tuple[str, bool] | None:
    """Return the properties by which a link may lead out: its name, and whether it is a port."""
    return (link.name, bool(link.master)) if link else None
