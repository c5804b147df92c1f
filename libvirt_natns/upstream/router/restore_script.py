# SPDX-License-Identifier: LGPL-2.1-or-later
"""A shell script that gives a NIC its addresses and routes back in the host.

The script needs a POSIX shell and ip(8).  It outlives an upgrade of Python, a
virtual environment that has gone, and the package itself.  A confirmation writes it beside
the confirmed router.  The router's systemd unit runs it when the router has not come up, or
has stopped.

The script changes nothing where the router is up, or where the NIC has an address in the host.

Known limits: it makes rules by source, destination and link, and routes with one next hop
over the NIC.  Settings below /proc/sys/net and resolv.conf stay as they are.
"""

import shlex
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6

from libvirt_natns.kernel import netlink
from libvirt_natns.upstream.router.nic_addresses import NicAddress, oldest_first
from libvirt_natns.upstream.router.nic_routes import NicRoute
from libvirt_natns.upstream.router.nic_rules import NicRule
from libvirt_natns.upstream.router.nic_snapshot import Capture

SHELL = "/bin/sh"
LIMIT = 60.0
"""Seconds for the script to end."""

RENDERED = {
    netlink.FRA_DST,
    netlink.FRA_SRC,
    netlink.FRA_IIFNAME,
    netlink.FRA_OIFNAME,
    netlink.FRA_PRIORITY,
    netlink.FRA_TABLE,
    netlink.FRA_PROTOCOL,
}
UNSET = b"\xff" * 4
"""The kernel lists each rule with such values: no suppressed prefix length or group."""

SCRIPT = r"""#!/bin/sh
# SPDX-License-Identifier: LGPL-2.1-or-later
# libvirt-natns: gives a NIC its addresses and routes back in the host, without Python.
# Written where the router was confirmed; each confirmation writes it anew.
# Nothing is changed where the router stands, or where the NIC has an address.

name=@NAME@
macs=@MACS@
namespace=@NAMESPACE@
link=@LINK@
altnames=@ALTNAMES@

PATH=/usr/sbin:/usr/bin:/sbin:/bin
export PATH
for ip in /usr/sbin/ip /sbin/ip /usr/bin/ip /bin/ip; do
    [ ! -x "$ip" ] || break
done

is_hardware() {
    [ ! -e "/sys/class/net/$1/bridge" ] || return 1
    for lower in "/sys/class/net/$1"/lower_*; do
        # A VLAN, macvlan or bond has a copy of the NIC's MAC address.
        [ ! -L "$lower" ] || return 1
    done
}

# The host's link that has the NIC's MAC address, else the one of its name.
in_host() {
    for directory in /sys/class/net/*; do
        found=
        [ ! -r "$directory/address" ] || read -r found <"$directory/address" || :
        case " $macs " in
        *" ${found:-none} "*)
            ! is_hardware "${directory##*/}" || { echo "${directory##*/}"; return; }
            ;;
        esac
    done
    [ ! -e "/sys/class/net/$name" ] || echo "$name"
}

in_namespace() {
    $ip -n "$namespace" -o link show 2>/dev/null | while read -r _ found rest; do
        found=${found%:}
        found=${found%@*}
        for mac in $macs; do
            case $rest in
            *"link/ether $mac "*) [ "$found" = host ] || [ "$found" = transit ] || echo "$found" ;;
            esac
        done
    done | head -n 1
}

router_stands() {
    [ -n "$moved" ] &&
        [ -n "$($ip -n "$namespace" -o address show dev "$moved" scope global 2>/dev/null)" ] &&
        [ -n "$($ip route show default dev "$link" 2>/dev/null)" ]
}

# Another route may have to be there first, or the gateway is in no subnet of the NIC.
route() {
    $ip "$@" 2>/dev/null || {
        sleep 1
        $ip "$@" 2>/dev/null || $ip "$@" onlink
    }
}

moved=
[ ! -e "/run/netns/$namespace" ] || moved=$(in_namespace)
! router_stands || exit 0
if [ -n "$moved" ]; then
    for altname in $altnames; do
        $ip -n "$namespace" link property del dev "$moved" altname "$altname" 2>/dev/null
    done
    $ip -n "$namespace" link set dev "$moved" netns 1
fi
tries=30
while nic=$(in_host) && [ -z "$nic" ] && [ "$tries" -gt 0 ]; do
    tries=$((tries - 1))
    sleep 1
done
if [ -z "$nic" ]; then
    echo "libvirt-natns: there is no NIC $name, and none with the MAC address $macs" >&2
    exit 1
fi
# The patch to the router's namespace leads nowhere by now.
[ ! -e "/sys/class/net/$link" ] || $ip link delete dev "$link"
if [ -e "/sys/class/net/$nic/master" ] ||
    [ -n "$($ip -o address show dev "$nic" scope global)" ]; then
    exit 0
fi
echo "libvirt-natns: $nic gets the addresses and routes that it had" >&2
$ip link set dev "$nic" mtu @MTU@ 2>/dev/null
$ip link set dev "$nic" up
@LINES@
[ -n "$($ip -o address show dev "$nic" scope global)" ]
"""


def script(namespace: str, link: str, before: Capture) -> str:
    """Return the script for a NIC, as it was ``before`` it moved to a namespace.

    ``link`` is the host's end of the patch to that namespace.
    """
    macs = [each for each in dict.fromkeys((before.mac, before.permanent)) if each]
    words = {
        "NAME": before.name,
        "MACS": " ".join(macs),
        "NAMESPACE": namespace,
        "LINK": link,
        "ALTNAMES": " ".join(before.altnames),
    }
    text = SCRIPT
    for key, word in words.items():
        text = text.replace(f"@{key}@", shlex.quote(word))
    text = text.replace("@MTU@", str(before.mtu))
    return text.replace("@LINES@", "\n".join(_lines(before)))


def run(file: Path) -> str:
    """Run a restore script; returns its complaint, "" for success."""
    if not file.is_file():
        return f"there is no {file}"
    try:
        done = subprocess.run(
            [SHELL, str(file)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=LIMIT,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"{file}: {error}"
    said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return f"{file}: {said}" if done.returncode else ""


def _lines(before: Capture) -> Iterator[str]:
    if before.ipv6:
        yield 'echo 0 2>/dev/null >"/proc/sys/net/ipv6/conf/$nic/disable_ipv6"'
    for address in oldest_first(before.addresses):
        if address.family == AF_INET or address.is_global:
            yield _address(address)
    # Routes to the NIC's own link come first: the kernel finds gateways by them.
    for route in sorted(before.routes, key=lambda each: each.gateway is not None):
        if _is_plain(route):
            yield _route(route)
    for rule in before.rules:
        words = rule_words(rule, before.name)
        if words:
            yield words


def _family(number: int) -> str:
    return "-4" if number == AF_INET else "-6"


def _address(address: NicAddress) -> str:
    nodad = " nodad" if address.family == AF_INET6 else ""
    return f'$ip address replace {address.ip}/{address.prefix} dev "$nic"{nodad}'


def _is_plain(route: NicRoute) -> bool:
    """True for a route of one next hop that neither the kernel nor an address makes."""
    several = route.attributes.get(netlink.RTA_MULTIPATH)
    by_kernel = route.protocol == netlink.RTPROT_KERNEL or route.is_link_local
    return route.kind == netlink.RTN_UNICAST and several is None and not by_kernel


def _route(route: NicRoute) -> str:
    words = ["route", _family(route.family), "route", "replace", route.destination]
    words += ["via", route.gateway] if route.gateway else []
    words += ["dev", '"$nic"']
    words += ["metric", str(route.metric)] if route.metric else []
    words += ["table", str(route.table)] if route.table != netlink.RT_TABLE_MAIN else []
    if route.family == AF_INET and route.source:
        words += ["src", route.source]
    return " ".join(words)


def rule_words(rule: NicRule, name: str) -> str:
    """Return the command for a rule; "" for a rule that the script does not make."""
    body, attributes = bytes.fromhex(rule.body), rule.attributes
    kinds = {kind & netlink.NLA_TYPE for kind, value in attributes if value != UNSET}
    inverted = int.from_bytes(body[8:12], sys.byteorder) & netlink.FIB_RULE_INVERT
    if kinds - RENDERED or inverted or body[3] or body[7] != netlink.FR_ACT_TO_TBL:
        return ""
    words = ["$ip", _family(body[0]), "rule", "add"]
    for word, kind, length in (
        ("to", netlink.FRA_DST, body[1]),
        ("from", netlink.FRA_SRC, body[2]),
    ):
        address = attributes.get(kind)
        words += [word, f"{ip_address(address)}/{length}"] if address else []
    for word, kind in (("iif", netlink.FRA_IIFNAME), ("oif", netlink.FRA_OIFNAME)):
        link = (attributes.get(kind) or b"").rstrip(b"\0").decode(errors="replace")
        words += [word, '"$nic"' if link == name else shlex.quote(link)] if link else []
    words += ["lookup", str(rule.table), "priority", str(rule.priority)]
    return " ".join(words) + " 2>/dev/null"
