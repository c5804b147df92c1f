# SPDX-License-Identifier: LGPL-2.1-or-later
"""TFTP and active FTP from guests to the outside, where the upstream names conntrack's helpers."""

import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import pytest
from lab import FastGuest, define_network, end_process, natns, run, spawn, virsh, write_config
from lab_bench import covered, nat
from lab_domains import networks
from lab_hosts_packets import Place, place
from lab_ipv6 import dual, static6

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import helper_trial, helpers
from libvirt_natns.kernel.netns import entered
from libvirt_natns.model.upstream import Helper

HELPERS = 'helpers = ["tftp", "ftp"]'
METADATA = ' helpers="tftp, ftp"'
FILES = Path("/run/tmp/served")
CONTENT = "what is served"

TRIAL = "".join(
    f'table inet trial {{ ct helper {name} {{ type "{name}" protocol {protocol}; }}; }}\n'
    for name, protocol in (("ftp", "tcp"), ("tftp", "udp"))
)
FOLLOWED = not subprocess.run(
    ["unshare", "--net", "nft", "-f", "-"], input=TRIAL.encode(), capture_output=True, check=False
).returncode
"""Whether this kernel has the helpers."""

pytestmark = pytest.mark.usefixtures("installed")
needs_helpers = pytest.mark.skipif(not FOLLOWED, reason="this kernel has no helpers of conntrack")


class FtpSession(socketserver.StreamRequestHandler):
    """A server of one file that knows active transfers alone (RFC 959, RFC 2428)."""

    server: "FtpServer"

    def handle(self) -> None:
        self._say("220 ready")
        client = ("", 0)
        for line in iter(self.rfile.readline, b""):
            verb, _, words = line.decode().strip().partition(" ")
            if verb == "PORT":
                *address, high, low = words.split(",")
                client = (".".join(address), int(high) * 256 + int(low))
            elif verb == "EPRT":
                _, _, where, port, _ = words.split(words[0])
                client = (where, int(port))
            if verb == "RETR":
                self._send(client)
            else:
                answers = {"USER": "230 in", "EPSV": "502 no", "PASV": "502 no", "QUIT": "221 bye"}
                self._say(answers.get(verb, "200 fine"))

    def _send(self, client: tuple[str, int]) -> None:
        self._say("150 coming")
        try:
            with entered(self.server.namespace):
                # A host with several addresses answers by the one that it was asked at.
                own = (self.request.getsockname()[0], 0)
                data = socket.create_connection(client, 2.0, own)
        except OSError:
            self._say("425 no connection")
            return
        with data:
            data.sendall(CONTENT.encode())
        self._say("226 done")

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())


class FtpServer(socketserver.ThreadingTCPServer):
    """The server in a namespace, where its own connections begin, too."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, namespace: str | None, address: str) -> None:
        self.namespace = namespace
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with entered(namespace):
            super().__init__((address, 21), FtpSession)


@contextmanager
def ftp(namespace: str | None, address: str) -> Iterator[None]:
    server = FtpServer(namespace, address)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def tftp(namespace: str | None) -> Iterator[None]:
    FILES.mkdir(parents=True, exist_ok=True)
    FILES.chmod(0o755)
    (FILES / "file").write_text(CONTENT)
    process = spawn(
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file=", "--user=root",
        "--port=0", "--enable-tftp", f"--tftp-root={FILES}", "--log-facility=-",
        namespace=namespace,
    )  # fmt: skip
    try:
        yield
    finally:
        end_process(process)


def got(guest: FastGuest, address: str, limit: float = 4) -> tuple[bool, bool]:
    """Whether a guest gets the file by active FTP, and by TFTP."""
    target = f"[{address}]" if ":" in address else address
    ways = (("ftp", ("--ftp-port", "-")), ("tftp", ()))
    first, second = (
        guest.curl(f"{way}://{target}/file", *options, check=False, timeout=limit) == CONTENT
        for way, options in ways
    )
    return first, second


@contextmanager
def served(
    kind: str, firewall: str, more: str, attributes: str = "", others: str = ""
) -> Iterator[tuple[Place, FastGuest, FastGuest]]:
    """Servers outside, and guests of twins: the networks have these attributes of metadata."""
    with ExitStack() as stack:
        where = stack.enter_context(place(kind, firewall, more))
        twins = dual("a", "virbr10", metadata=nat("", attributes))
        stack.enter_context(networks(twins, dual("b", "virbr11", metadata=nat("", others))))
        guests = []
        for name, bridge in (("one", "virbr10"), ("two", "virbr11")):
            guest = stack.enter_context(FastGuest(bridge, name=name))
            guest.static("10.0.0.5/24", "10.0.0.1")
            static6(guest, "fd00:10::5/64", "fd00:10::1")
            guests.append(guest)
        for address in where.servers:
            stack.enter_context(ftp(where.clients[0], address))
        stack.enter_context(tftp(where.clients[0]))
        yield where, guests[0], guests[1]


# -- packets -----------------------------------------------------------------


@needs_helpers
@pytest.mark.parametrize(
    ("kind", "firewall", "asked"),
    [
        ("host", "nftables", "configuration"),
        ("host", "iptables", "metadata"),
        ("bridge", "nftables", "metadata"),
        ("macvlan", "iptables", "configuration"),
        ("router", "nftables", "metadata"),
        ("router", "iptables", "configuration"),
    ],
)
def test_transfers_that_a_server_begins(kind: str, firewall: str, asked: str) -> None:
    """The twin is the control: with the same guest, and without helpers."""
    ways = (HELPERS, "", ' helpers="none"') if asked == "configuration" else ("", METADATA, "")
    with served(kind, firewall, *ways) as (where, guest, other):
        for address in where.servers:
            assert got(guest, address) == (True, True), address
        assert got(other, where.servers[0], 1) == (False, False)
        assert natns("sync").stdout == ""


@needs_helpers
def test_sync_brings_changed_helpers_to_a_running_network() -> None:
    config = Path("/etc/libvirt-natns/config.toml")
    with served("host", "nftables", "") as (where, guest, _):
        before = config.read_text()
        assert got(guest, where.servers[0], 1) == (False, False)
        write_config(f"{before}\n{HELPERS}\n")
        assert natns("sync").stdout
        assert got(guest, where.servers[0]) == (True, True)
        assert natns("sync").stdout == ""
        write_config(before)
        natns("sync")
        assert got(guest, where.servers[0], 1) == (False, False)
        assert "helper" not in run("nft", "list", "ruleset").stdout


# -- kernels without helpers -------------------------------------------------


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_the_kernel_itself_refuses_a_helper_that_it_lacks(
    firewall: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = cast("Helper", "nosuch")
    monkeypatch.setitem(helpers.PORTS, unknown, ("tcp", 21))
    with pytest.raises(FirewallError, match="no helper nosuch, as module nf_conntrack_nosuch is"):
        helper_trial.check((unknown,), firewall, "network a", "")


@contextmanager
def no_helpers(folder: Path) -> Iterator[None]:
    """A kernel without conntrack's helpers, or an nft that answers as on such a kernel."""
    if not FOLLOWED:
        yield
        return
    real, content = folder / "real", folder / "nft"
    shutil.copy("/usr/sbin/nft", real)
    content.write_text(
        "#!/bin/sh\n"
        '[ "$1" != -i ] || exit 1\n'
        f"case $* in *'-f -'*) text=$(cat);; *) exec {real} \"$@\";; esac\n"
        "case $text in *'ct helper'*)\n"
        "    echo 'Error: Could not process rule: No such file or directory' >&2; exit 1;;\n"
        f'esac\nprintf \'%s\\n\' "$text" | exec {real} "$@"\n'
    )
    for program in (folder, content):
        program.chmod(0o755)
    with covered("/usr/sbin/nft", content):
        yield


@pytest.mark.parametrize("asked", ["configuration", "metadata"])
def test_a_network_with_a_helper_that_the_kernel_lacks(asked: str, tmp_path: Path) -> None:
    """Its start is refused, and networks that ask for no helper start as ever."""
    more, attributes, others = (
        (HELPERS, "", ' helpers="none"') if asked == "configuration" else ("", METADATA, "")
    )
    with no_helpers(tmp_path), place("host", "nftables", more):
        define_network(dual("a", "virbr10", metadata=nat("", attributes)))
        try:
            refused = virsh("net-start", "a", check=False)
            assert refused.returncode
            assert "network a: the kernel has no helper ftp, as module nf_conntrack_ftp is" in (
                refused.stderr
            )
            assert ("[upstreams.host]" if asked == "configuration" else "its metadata") in (
                refused.stderr
            )
            with networks(dual("b", "virbr11", metadata=nat("", others))):
                assert natns("sync").stdout == ""
            if asked == "configuration":
                assert "nf_conntrack_ftp" in natns("doctor", check=False).stdout
        finally:
            virsh("net-undefine", "a")
