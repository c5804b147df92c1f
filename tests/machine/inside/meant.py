# SPDX-License-Identifier: LGPL-2.1-or-later
"""Warnings in a machine's journal that are meant, each with its reason."""

from typing import NamedTuple


class Meant(NamedTuple):
    """A warning as ``PROGRAM: MESSAGE``, and why it is no fault."""

    pattern: str
    reason: str


EMULATION = "the emulated hardware is slow, and is no real hardware"
STOCK = "Debian says so on this machine without libvirt-natns, too"
LEFT_ALONE = "libvirt's dnsmasq of an isolated network goes on, and serves nobody"
OUTLIVES = "dnsmasq outlives the daemon that has started it, ours as libvirt's"

RELAY = "a rule lets the transit bridge alone ask; bind-dynamic would hide a port that is taken"

MEANT = (
    Meant(r"^kernel: (tsc|APIC calibration|clocksource|hrtimer|TSC|rcu|workqueue)", EMULATION),
    Meant(r"^kernel: (mtrr|acpi PNP|amd_pstate|RAPL|pci|i8042|platform)", EMULATION),
    Meant(r"^kernel: Unstable clock detected", EMULATION),
    Meant(r"^kernel: device-mapper: core: CONFIG_IMA_DISABLE_HTABLE", STOCK),
    Meant(r'event=reconciled network=lab repaired="is active in libvirt', "the package does that"),
    Meant(r"^systemd-sysv-generator: ", STOCK),
    Meant(r"^dnsmasq-dhcp: DHCP packet received on virbr1\d which has no address$", LEFT_ALONE),
    Meant(r"^dnsmasq: warning: no upstream servers configured$", LEFT_ALONE),
    Meant(r"^dnsmasq: LOUD WARNING: listening on 198\.19\.252\.1 may accept requests", RELAY),
    Meant(r"^dnsmasq: LOUD WARNING: use --bind-dynamic", RELAY),
    Meant(r"^libvirtd: Network name='\w+' .* is tainted: hook-script$", "each hook does that"),
    Meant(r"^systemd: \S+: Found left-over process \d+ \(dnsmasq\)", OUTLIVES),
    Meant(r"^systemd: (\S+: )?This usually indicates unclean termination", OUTLIVES),
    Meant(r"^libvirtd: End of file while reading data", "the service was killed"),
    Meant(r"^systemd: libvirt-natns.service: Main process exited.*/KILL$", "it was killed"),
    Meant(r"^systemd: libvirt-natns.service: Failed with result 'signal'", "it was killed"),
)
