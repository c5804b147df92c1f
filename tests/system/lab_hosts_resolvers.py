# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts as people have them: their resolvers, each with a DNS server that runs there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lab import FastGuest, Node, end_process, run, spawn, wait_for
from lab_boundary import on_a_link

RESOLV_CONF = Path("/etc/resolv.conf")

LAN, HERE, ROUTER = "wlan0", "192.168.7.2", "192.168.7.1"
"""The link of the host to a machine that routes for it, and may serve DNS."""
ROUTER6 = "fd00:77::1"
LINK_LOCAL = "fe80::53"


@contextmanager
def dns(
    namespace: str | None, answer: str, *options: str, address: str = "", port: int = 53
) -> Iterator[None]:
    """A DNS server that answers every name with one address; it listens on ``address``, or all."""
    where = ("--bind-interfaces", f"--listen-address={address}") if address else ()
    with tempfile.TemporaryDirectory() as directory:
        # --conf-file= of the package's own is no way to read no file.
        process = spawn(
            "dnsmasq", "--keep-in-foreground", f"--conf-file={os.devnull}", "--pid-file=",
            "--user=root", "--no-resolv", "--no-hosts", "--except-interface=lo" if address and not
            address.startswith("127.") else "--cache-size=0", f"--port={port}", *where,
            f"--log-facility={directory}/log", *options,
            *([f"--address=/#/{answer}"] if answer else []), namespace=namespace,
        )  # fmt: skip
        try:
            log = Path(directory, "log")
            wait_for(
                lambda: log.exists() and "started" in log.read_text(), what=f"dnsmasq {address}"
            )
            yield
        finally:
            end_process(process)


@contextmanager
def resolvers(*lines: str) -> Iterator[None]:
    """The host's /etc/resolv.conf with these lines; a single "nameserver" may be left out."""
    kept = RESOLV_CONF.read_bytes() if RESOLV_CONF.exists() else None
    link = RESOLV_CONF.readlink() if RESOLV_CONF.is_symlink() else None
    write_resolvers(*lines)
    try:
        yield
    finally:
        RESOLV_CONF.unlink(missing_ok=True)
        if link is not None:
            RESOLV_CONF.symlink_to(link)
        elif kept is not None:
            RESOLV_CONF.write_bytes(kept)


def write_resolvers(*servers: str, file: Path = RESOLV_CONF) -> None:
    """Have the host ask these servers from now on, as resolvconf does: by a new file."""
    fresh = file.with_suffix(".new")
    lines = [f"nameserver {server}\n" for server in servers]
    # The host itself goes on to the next server soon; dnsmasq has no use for options.
    fresh.write_text("".join([*lines, "options timeout:1\n"]))
    fresh.rename(file)


@contextmanager
def lan() -> Iterator[Node]:
    """A link of the host to a router, its way out, with addresses of IPv6, too."""
    with ExitStack() as stack:
        node = on_a_link(stack, "lan", "p-lan", HERE, ROUTER)
        run("ip", "route", "add", "default", "via", ROUTER)
        run("ip", "-6", "address", "add", "fd00:77::2/64", "dev", "p-lan", "nodad")
        run("ip", "-n", "lan", "-6", "address", "add", f"{ROUTER6}/64", "dev", "eth0", "nodad")
        run("ip", "-n", "lan", "-6", "address", "add", f"{LINK_LOCAL}/64", "dev", "eth0", "nodad")
        yield node


def host_asks(name: str) -> list[str]:
    """The addresses that the host's own programs find for a name."""
    found = run("getent", "ahostsv4", name, check=False).stdout
    return sorted({line.split()[0] for line in found.splitlines()})


def resolves(guest: FastGuest, name: str, answer: str, *options: str) -> bool:
    return guest.dig(name, "A", *options) == [answer]
