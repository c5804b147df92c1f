# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is chosen for guests and networks that publish something, and kept.

Addresses by DHCP, free ports, addresses of a guest's own: decided once, and the
same ever after.
"""

from collections.abc import Collection, Iterable
from itertools import chain

from libvirt_natns import names
from libvirt_natns.addresses import FAMILIES, Address, AddressRange, Family
from libvirt_natns.engine import forwards, guest_leases
from libvirt_natns.engine.forwards import Attachment, Wish
from libvirt_natns.engine.observer import NOBODY, Observer, tell
from libvirt_natns.errors import ConflictError, DocumentError, LeaseError
from libvirt_natns.kernel import address_probe, listening_ports
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.metadata import AddressRequest
from libvirt_natns.model.network import Domain, Network
from libvirt_natns.model.publication import Forward
from libvirt_natns.model.subnet import DhcpHost
from libvirt_natns.model.upstream import Outside, Upstream
from libvirt_natns.records import dataclass
from libvirt_natns.state import pool
from libvirt_natns.state.applicants import Applicant
from libvirt_natns.state.claims import Claims, ClaimScope
from libvirt_natns.state.store import Store
from libvirt_natns.upstream import routers


@dataclass(frozen=True, slots=True)
class Choices:
    """What is chosen for guests, and kept in the tables.

    ``asks`` False asks no neighbours whether an address is free: inside a transaction,
    all other writers would wait for the answer.
    """

    config: Config
    store: Store
    kernel: Kernel
    observer: Observer = NOBODY
    asks: bool = True

    def knows(self, domain: Domain, attachment: Attachment, family: Family) -> bool:
        network, mac = attachment.network, attachment.nic.mac
        fixed = fixed_address(network, mac, family, domain.name)
        return fixed is not None or bool(ranges_of(network, family))

    def target(self, domain: Domain, attachment: Attachment, family: Family) -> Address:
        network, mac = attachment.network, attachment.nic.mac
        fixed = fixed_address(network, mac, family, domain.name)
        kept = self.store.reservations.get(network.uuid, mac, family)
        if fixed is not None or kept is None or not _tenable(attachment, kept):
            self.store.reservations.drop(network.uuid, mac, family)
        return fixed or self._reserve(domain.uuid, attachment, family)

    def _reserve(self, owner: str, attachment: Attachment, family: Family) -> Address:
        network, mac = attachment.network, attachment.nic.mac
        if kept := self.store.reservations.get(network.uuid, mac, family):
            return self.store.reservations.reserve(
                network.uuid, mac, owner, [kept], lambda _: False, family
            )
        if not ranges_of(network, family):
            which = "DHCP" if family == 4 else "DHCPv6"
            raise ConflictError(
                f"network {network.name} has no {which} range to reserve an address from",
                "give guestAddress in <natns:portForward>, or a <range> in the network's <dhcp>",
            )
        try:
            return self._reserve_free(owner, attachment, family)
        except ConflictError as error:
            raise ConflictError(f"network {network.name}: {error.fact}", error.remedy) from error

    def _reserve_free(self, owner: str, attachment: Attachment, family: Family) -> Address:
        network, mac = attachment.network, attachment.nic.mac
        leased, fixed = guest_leases.present(network.bridge or ""), _fixed(network)
        spans = ranges_of(network, family)
        # Where the outside knows the addresses as they are, nothing is translated.
        spans.sort(key=lambda span: not attachment.is_public(span.first))

        known = {mac, *self.store.reservations.all(network.uuid, family), *_fixed_macs(network)}

        def inside(address: Address) -> bool:
            return address not in fixed and any(address in span for span in spans)

        def is_free(address: Address) -> bool:
            return inside(address) and leased.get(address, mac) == mac

        def usable(address: Address) -> bool:
            if not inside(address):
                return False
            holder = leased.get(address, mac)
            stranger = guest_leases.is_stranger(network.bridge or "", holder, known)
            return holder == mac or stranger

        # Its present lease first, then free addresses, then leases of strangers.
        own = [address for address, holder in leased.items() if holder == mac]
        candidates = chain(filter(is_free, chain(own, pool.listed(spans))), filter(usable, leased))
        return self.store.reservations.reserve(network.uuid, mac, owner, candidates, usable, family)

    def port(self, wish: Wish) -> int:
        kept = self.store.chosen_ports.get(wish.key)
        # In one transaction, or two starts at once would choose the same.
        with self.store.transaction():
            fits = kept is not None and self._is_free_still(wish, kept)
            port = kept if fits else self._free_port(wish)
            if port is not None:
                self.store.chosen_ports.put(wish.key, port)
        if port is None:
            first, last = self.config.auto_ports
            raise ConflictError(
                f"no {wish.key.proto} port from {first} to {last} is free for start='auto'",
                f"enlarge auto_ports in {names.CONFIG_FILE}",
            )
        if kept not in (None, port):
            said = f"{wish.owner_name}: {wish.key.proto} port {kept} is taken, {port} instead"
            tell(self.observer, "choose a port", wish.attachment.network.name, [said])
        return port

    def _is_free_still(self, wish: Wish, port: int) -> bool:
        """Whether nobody has taken a port that was chosen, while its owner did not use it."""
        upstream = wish.attachment.upstream
        shared = upstream.kind == "host"
        scope = ClaimScope("" if shared else upstream.name, upstream.is_transit)
        if _lies_in(port, wish.avoided):
            return False
        if any(self.store.claims.is_claimed(wish.key, scope, each, port) for each in wish.listens):
            return False
        if not shared or any(
            each.proto == wish.key.proto and each.first == port
            for each in self.store.claims.forwards(owner=wish.key.owner)
        ):
            # In force already: it stays so, whatever has come up in the host since.
            return True
        return port not in listening_ports.listening(wish.key.proto)

    def _free_port(self, wish: Wish) -> int | None:
        """The first port for start="auto" that nobody uses and that is kept for nobody.

        Where there is none, one that was kept for somebody who is not there any more.
        """
        proto = wish.key.proto
        kept = {port for kind, port in self.store.chosen_ports.all() if kind == proto}
        used = listening_ports.listening(proto) | self.store.claims.ports(proto)
        used |= routers.ports_of_host(wish.attachment.upstream, proto)
        first, last = self.config.auto_ports

        def usable(port: int) -> bool:
            return first <= port <= last and port not in used and not _lies_in(port, wish.avoided)

        fresh = (port for port in range(first, last + 1) if port not in kept)
        return next(filter(usable, chain(fresh, self.store.chosen_ports.reclaimable(proto))), None)

    def address(
        self, request: AddressRequest, domain: Domain, attachment: Attachment, family: Family
    ) -> Address:
        upstream = attachment.upstream
        if upstream.by_dhcp and family == 4:
            raise LeaseError(
                f"guest {domain.name}: there are no addresses for <natns:address> on upstream"
                f" {upstream.name}, whose DHCP server leases one to each network",
                "publish ports with <natns:portForward>, or use an upstream with a pool",
            )
        if request.address is not None:
            who = f"guest {domain.name}"
            self.store.claims.check_address(upstream.name, request.address, domain.uuid, who)
        key = f"{domain.uuid}/{attachment.nic.mac}"
        mine = self.store.claims.static_nats(attachment.network.uuid, domain.uuid)
        present = {static.address for static in mine}

        def probe(addresses: Collection[Address]) -> set[Address]:
            # The namespace itself answers for those in force.
            asked = [address for address in addresses if address not in present]
            if not asked or not upstream.probe or not self.asks:
                return set()
            return address_probe.probe(upstream.bridge or "", asked, upstream.probe)

        guest = Applicant(
            key, f"guest {domain.name}", request.address, "natns:address", family=family
        )
        return pool.reserve(self.store, guest, upstream, probe, self.kernel.host_addresses())


def _lies_in(port: int, spans: Iterable[tuple[int, int]]) -> bool:
    return any(first <= port <= last for first, last in spans)


def ranges_of(network: Network, family: Family) -> list[AddressRange]:
    """A network's DHCP ranges of a family."""
    spans = [span for subnet in network.subnets for span in subnet.ranges]
    return [span for span in spans if span.first.version == family]


def fixed_address(
    network: Network, mac: str, family: Family = 4, name: str | None = None
) -> Address | None:
    """The address that a network's own XML gives a NIC.

    DHCPv6 has no MAC addresses: there it is whoever bears the guest's ``name``, or an
    identifier that was made of the NIC's.
    """
    hosts = [host for subnet in network.subnets for host in subnet.hosts]
    own = [host for host in hosts if host.ip.version == family]
    found = [host for host in own if host.mac == mac or _is_made_of(mac, host.id)]
    if family == 6:
        found += [host for host in own if name and _bears(host, name)]
    return next((host.ip for host in found), None)


def _is_made_of(mac: str, identifier: str | None) -> bool:
    """Whether a DUID is one of those that hold a link-layer address (RFC 8415, 11.2, 11.4)."""
    if identifier is None or not identifier.lower().endswith(mac):
        return False
    return identifier.startswith(("00:01:00:01:", "00:03:00:01:", "0:1:0:1:", "0:3:0:1:"))


def _bears(host: DhcpHost, name: str) -> bool:
    return host.mac is None and host.id is None and host.name == name


def known_addresses(store: Store, network: Network, mac: str, name: str) -> set[Address]:
    """The DHCP addresses of a NIC: by the network's XML, else those kept for it."""
    found = {
        fixed_address(network, mac, family, name)
        or store.reservations.get(network.uuid, mac, family)
        for family in FAMILIES
    }
    return {each for each in found if each is not None}


def _tenable(attachment: Attachment, address: Address) -> bool:
    """Whether a reservation still holds.

    The network's XML may have changed.  And dnsmasq learns of a reservation only
    when the guest starts: somebody else may have leased the address just before.
    """
    network = attachment.network
    taken = _fixed(network)
    inside = any(address in subnet.network for subnet in network.subnets)
    holder = guest_leases.present(network.bridge or "").get(address, attachment.nic.mac)
    # Of some clients of DHCPv6 nobody learns the MAC address.
    return inside and address not in taken and holder in (attachment.nic.mac, "")


def _fixed_macs(network: Network) -> set[str]:
    """MAC addresses that the network's own XML names."""
    return {host.mac for subnet in network.subnets for host in subnet.hosts if host.mac}


def _fixed(network: Network) -> set[Address]:
    """Addresses that the network's own XML has given away."""
    hosts = {host.ip for subnet in network.subnets for host in subnet.hosts}
    return hosts | {subnet.gateway for subnet in network.subnets}


def scopes(store: Store, networks: Iterable[str]) -> dict[str, ClaimScope]:
    """Where the claims of each of these networks must be unique, by its uuid.

    All upstreams of kind "host" are one: they share the host's addresses.  Networks
    on a router share that one's.
    """
    records = [record for uuid in networks if (record := store.networks.get(uuid))]
    return {
        record.uuid: ClaimScope("", True)
        if record.kind == "host"
        else ClaimScope(record.upstream, record.kind == "router")
        for record in records
    }


def check_host(
    claims: Claims, where: dict[str, ClaimScope], addresses: Collection[Address]
) -> None:
    """Refuse new forwards that the host itself cannot serve.

    Those that listen on an address that is none of the host's ``addresses``, or
    would take a port away from one of its programs.  Raises DocumentError or
    ConflictError.
    """
    sharing = {uuid: scope.upstream for uuid, scope in where.items() if scope.shared}
    routers.check_claims(claims.forwards, {uuid: name for uuid, name in sharing.items() if name})
    shared = [
        forward
        for forward in claims.forwards
        if sharing.get(forward.network) == "" and not forward.own
    ]
    for forward in shared:
        listens = forward.address
        if listens.is_loopback and listens.version == 6:
            raise DocumentError(
                f"{forward.owner_name}: <natns:portForward address='{listens}'> cannot be"
                " published, as the kernel routes it nowhere",
                "use 127.0.0.1, or another address of the host",
            )
        if (
            listens not in (forwards.ANY, forwards.ANY6)
            and not listens.is_loopback
            and listens not in addresses
        ):
            raise DocumentError(
                f"{forward.owner_name}: <natns:portForward address='{listens}'> is not an address"
                " of the host",
                "leave it out to listen on all of them",
            )
    listening_ports.check_free(shared)


def claim_for_network(
    choices: Choices,
    network: Network,
    upstream: Upstream,
    outside: Outside,
    held: Collection[Forward] = (),
) -> None:
    """Take all that a network's own metadata publishes; ``held`` is in force already.

    Raises DocumentError or ConflictError.
    """
    claims = forwards.of_network(network, upstream, outside, choices)
    where = scopes(choices.store, [network.uuid])
    fresh = Claims(claims.owner, tuple(f for f in claims.forwards if f not in held))
    check_host(fresh, where, choices.kernel.host_addresses())
    choices.store.claims.put(claims, where, published=True)
