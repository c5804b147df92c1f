# SPDX-License-Identifier: LGPL-2.1-or-later
"""The model: which networks and guests there are, and what each should show.

Networks and guests are numbered slots, so that a random choice needs nothing of
what has happened before.  The networks are twins, apart from a few kinds: each
slot always makes a network of the same kind.
"""

import random
from dataclasses import dataclass, field

from lab import isolated
from lab_domains import domain, nat, nic, ports

SLOTS = 24
"""Networks: what two busy hosts would have, twins most of them."""

PILLARS = 3
"""The first networks: they run all the time, each with a guest's TCP stream."""

GUESTS = 5
MOST_RUNNING = 12
"""Networks that run at once; the rest of a step's time goes into starting them."""

ADDRESS = "10.0.0.1"
NATNS_IP = (
    f'<natns:ip address="{ADDRESS}" prefix="24">'
    '<natns:dhcp><natns:range start="10.0.0.100" end="10.0.0.200"/></natns:dhcp></natns:ip>'
)
KINDS = ("stock", "metadata address", "host upstream", "no DHCP", "own subnet", "forwards")


@dataclass(eq=False)
class Net:
    """One slot's network.  ``name`` changes where it is renamed; ``uuid`` never does."""

    slot: int
    name: str = ""
    hosts: set[int] = field(default_factory=set)
    disabled: bool = False

    def __post_init__(self) -> None:
        self.name = self.name or f"net{self.slot}"

    @property
    def kind(self) -> str:
        return "stock" if self.slot < PILLARS else KINDS[self.slot % len(KINDS)]

    @property
    def uuid(self) -> str:
        return f"c0ffee00-0000-4000-8000-{self.slot:012d}"

    @property
    def bridge(self) -> str:
        return f"virbr{100 + self.slot}"

    @property
    def namespace(self) -> str:
        return f"nat-{self.name}"

    @property
    def is_pillar(self) -> bool:
        return self.slot < PILLARS

    @property
    def has_dnsmasq(self) -> bool:
        """True if one of ours serves it: each of these networks has at least DNS."""
        return not self.disabled

    @property
    def subnet(self) -> str:
        """The subnet without its last octet."""
        return f"10.1.{self.slot}" if self.kind == "own subnet" else "10.0.0"

    def xml(self, *, more: str = "", instead: str = "") -> str:
        """The network as a user defines it; ``instead`` of its ``<natns:nat>`` another inside."""
        inside = ""
        gateway: str | None = f"{self.subnet}.1"
        if instead:
            return self._isolated(nat(instead), gateway, more)
        if self.disabled:
            disabled = nat("").replace("<natns:nat ", '<natns:nat enabled="no" ')
            return self._isolated(disabled, gateway, more)
        if self.kind == "metadata address":
            inside, gateway = NATNS_IP, None
        elif self.kind == "host upstream":
            inside = '<natns:upstream name="host"/>'
        elif self.kind == "forwards":
            published = ports(
                f'start="{7000 + self.slot}" to="80"', more='guestAddress="10.0.0.50"'
            )
            inside = published
        return self._isolated(nat(inside) if inside else "", gateway, more)

    def _isolated(self, metadata: str, gateway: str | None, more: str) -> str:
        if self.kind == "no DHCP":
            return isolated(
                self.name, self.bridge, address=gateway, dhcp=None, metadata=metadata,
                uuid=self.uuid, more=more,
            )  # fmt: skip
        return isolated(
            self.name, self.bridge, address=gateway, metadata=metadata, uuid=self.uuid, more=more
        )


@dataclass
class Guest:
    """One slot's guest: a paused domain that publishes a port of its own."""

    number: int
    moved: bool = False

    @property
    def name(self) -> str:
        return f"guest{self.number}"

    @property
    def uuid(self) -> str:
        return f"c0ffee00-0000-4000-9000-{self.number:012d}"

    @property
    def mac(self) -> str:
        return f"52:54:00:00:01:{self.number:02x}"

    @property
    def second_mac(self) -> str:
        return f"52:54:00:00:02:{self.number:02x}"

    @property
    def port(self) -> int:
        return (9100 if self.moved else 9000) + self.number

    @property
    def published(self) -> str:
        return ports(f'start="{self.port}" to="80"', more=f'mac="{self.mac}"')

    def xml(self, network: str, *, broken: bool = False) -> str:
        """The domain; ``broken``: libvirt gives its start up after `prepare`."""
        text = domain(self.name, nic(network, self.mac), publishes=self.published, uuid=self.uuid)
        # Without ACPI the machine takes no NIC while it runs.
        text = text.replace("<devices>", "<features><acpi/></features><devices>", 1)
        if broken:
            log = "<serial type='pty'><log file='/nonexistent/log'/></serial></devices>"
            return text.replace("</devices>", log)
        return text


@dataclass
class Model:
    """All slots, and what the campaign itself decided of late."""

    nets: list[Net] = field(default_factory=lambda: [Net(slot) for slot in range(SLOTS)])
    guests: list[Guest] = field(default_factory=lambda: [Guest(n) for n in range(GUESTS)])

    def net_of(self, uuid: str) -> Net | None:
        return next((net for net in self.nets if net.uuid == uuid), None)


@dataclass(frozen=True)
class Choice:
    """One step: the operation's name, and all that it decides by chance."""

    step: int
    kind: str
    slot: int
    other: int
    guest: int
    delay: float
    variant: int

    @classmethod
    def of(cls, seed: int, step: int, weights: dict[str, int]) -> "Choice":
        """Choose by seed and step alone, so that a replay makes the same choice."""
        dice = random.Random(f"{seed}/{step}")
        kind = dice.choices(list(weights), list(weights.values()))[0]
        slot, other = dice.sample(range(PILLARS, SLOTS), 2)
        return cls(
            step, kind, slot, other, dice.randrange(GUESTS), dice.uniform(0.0, 0.5),
            dice.randrange(1000),
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.kind} slot={self.slot} other={self.other}"
            f" guest={self.guest} delay={self.delay:.3f} variant={self.variant}"
        )
