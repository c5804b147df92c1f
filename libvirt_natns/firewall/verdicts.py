# SPDX-License-Identifier: LGPL-2.1-or-later
"""The verdict of a filter's chains on a sample packet, without the kernel.

A rule has conditions.  Each tells of a packet: it fits, it does not fit, or unknown (None): the
condition depends on a mark, a rate, or a match that is not known here.

* A rule that refuses, and fits, stops the packet.  If its fit is unknown, the rule is taken for
  a rule about other packets: a list of banned clients, a rate.
* A rule that accepts, and fits, lets the packet pass.  If its fit is unknown, a stop
  behind that rule is unsure.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from libvirt_natns.firewall.sample_packets import SamplePacket

Condition = Callable[[SamplePacket], bool | None]

DEPTH = 16
"""Calls of chains by chains that the kernel allows (NFT_JUMP_STACK_SIZE)."""

ACCEPTS = ("accept", "queue")
"""Words after which a chain says no more: a program that gets packets decides about them."""
REFUSES = ("drop", "reject")
TRANSLATES = ("dnat", "redirect")
"""Words of rules that lead a packet elsewhere, in chains of NAT."""


@dataclass(frozen=True, slots=True)
class RuleEnd:
    """The end of a rule: a word of nft's, and the chain that it calls; "" goes on."""

    word: str = ""
    target: str = ""


@dataclass(frozen=True, slots=True)
class FilterRule:
    """A rule: its conditions, and its end, which may depend on the packet.

    ``choose`` returns the end of a verdict map; None where that is not known.
    """

    conditions: tuple[Condition, ...] = ()
    end: RuleEnd = RuleEnd()
    choose: Callable[[SamplePacket], RuleEnd | None] | None = None

    def fits(self, packet: SamplePacket) -> bool | None:
        """True if the rule is about the packet, None if that is not known."""
        known: bool | None = True
        for condition in self.conditions:
            fit = condition(packet)
            if fit is False:
                return False
            known = None if fit is None else known
        return known

    def end_for(self, packet: SamplePacket) -> RuleEnd | None:
        """Return the end; None where a verdict map is not known."""
        return self.choose(packet) if self.choose else self.end


Chains = Mapping[str, Sequence[FilterRule]]
"""The rules of a table's chains, by the name of the chain."""


@dataclass(frozen=True, slots=True)
class Stop:
    """A chain that stops a packet, and how: "drop", "reject" or "policy drop".

    In chains of NAT, also a chain that translates the packet: "dnat" or "redirect".
    """

    chain: str
    how: str
    sure: bool = True


@dataclass(slots=True)
class _Walk:
    """The way of a packet through a table's chains."""

    chains: Chains
    packet: SamplePacket
    perhaps_accepted: bool = False
    calls: list[str] = field(default_factory=list)

    def through(self, chain: str) -> Stop | bool | None:
        """Return where the packet is stopped, True if it is accepted, None at the chain's end."""
        if len(self.calls) >= DEPTH:
            return None
        self.calls.append(chain)
        try:
            for rule in self.chains.get(chain, ()):
                fits = rule.fits(self.packet)
                end = rule.end_for(self.packet) if fits is not False else RuleEnd()
                if end is None:
                    self.perhaps_accepted = True
                elif fits is None:
                    self._perhaps(end)
                elif end.word == "return":
                    return None
                elif (reached := self._reached(end)) is not None or end.word == "goto":
                    return reached
            return None
        finally:
            self.calls.pop()

    def _reached(self, end: RuleEnd) -> Stop | bool | None:
        if end.word in REFUSES + TRANSLATES:
            return Stop(self.calls[-1], end.word, not self.perhaps_accepted)
        if end.word in ACCEPTS:
            return True
        return self.through(end.target) if end.target else None

    def _perhaps(self, end: RuleEnd) -> None:
        """Take note of a rule that may be about the packet."""
        if end.word in ACCEPTS or (end.target and self.through(end.target) is True):
            self.perhaps_accepted = True


def stop_of(chains: Chains, base: str, policy: str, packet: SamplePacket) -> Stop | None:
    """Return where a base chain stops a packet; None for a packet that passes."""
    walk = _Walk(chains, packet)
    end = walk.through(base)
    if isinstance(end, Stop):
        return end
    if end is None and policy == "drop":
        return Stop(base, "policy drop", not walk.perhaps_accepted)
    return None
