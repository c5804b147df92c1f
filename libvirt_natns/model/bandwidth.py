# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's ``<bandwidth>`` of a network, as the limits that libvirt makes of it."""

from dataclasses import dataclass

LEAST_BURST = 1600
"""Octets of a burst without a value in the XML: the choice of tc(8)."""


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A limit in one direction, in octets a second; a ``burst`` is in octets.

    ``peak`` is the rate of a burst, and the most that is sent at that rate is ``burst``.
    ``peak_burst`` is the most that is sent at once.
    """

    average: int
    peak: int
    burst: int
    peak_burst: int

    def __str__(self) -> str:
        text = f"{self.average} octets/s"
        return text if self.peak == self.average else f"{text}, at most {self.peak}"


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """The limits of packets that the router sends to guests, and gets from them."""

    inbound: RateLimit | None = None
    outbound: RateLimit | None = None


def inbound(average: int, peak: int, burst: int) -> RateLimit:
    """Return the limit to guests; rates in units of 1000 octets, ``burst`` in KiB, 0 for none."""
    return RateLimit(
        average * 1000, (peak or average) * 1000, burst * 1024 or LEAST_BURST, LEAST_BURST
    )


def outbound(average: int, burst: int) -> RateLimit:
    """Return the limit from guests: libvirt's has no peak, and a burst of a second by itself."""
    rate, most = average * 1000, (burst or average) * 1024
    return RateLimit(rate, rate, most, most)
