# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo: two stock networks with the same subnet, both with a way out and in.

Started by contrib/demo, which brings it into the sandbox.  Every claim that is
printed is checked first; the first that does not hold ends the demo with status 1.
"""

import json
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(CHECKOUT / "tests" / "system"))
sys.path.append(os.fspath(CHECKOUT))

import lab  # noqa: E402 - needs the path

MAC = "52:54:00:00:00:05"
ADDRESS = "10.0.0.5"
NETWORKS = {"a": "virbr10", "b": "virbr11"}
PORT = 8080
NEIGHBOUR = "192.168.0.77/24"
STEPS = 8

METADATA = f"""
    <natns:nat xmlns:natns="urn:libvirt-natns:1">
      <natns:portForward><natns:range start="{PORT}" to="80"/></natns:portForward>
    </natns:nat>
"""
"""The metadata that the owner of each guest writes, with virsh edit, to publish its web page."""

TTY = sys.stdout.isatty() and "NO_COLOR" not in os.environ
BOLD, GREEN, RED, DIM, PLAIN = (
    ("\033[1m", "\033[32m", "\033[31m", "\033[2m", "\033[0m") if TTY else ("",) * 5
)


class Failed(Exception):
    """A claim of the demo does not hold."""


class Narrator:
    """Prints what happens; owns the step counter and the clock."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._step = 0

    def step(self, title: str) -> None:
        self._step += 1
        print(f"\n{BOLD}[{self._step}/{STEPS}] {title}{PLAIN}", flush=True)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def show(self, command: str, output: str) -> None:
        """Print a command as a user types it, and its output."""
        print(f"  {DIM}# {command}{PLAIN}")
        for line in output.rstrip().splitlines():
            print(f"    {line}")
        sys.stdout.flush()

    def claim(self, text: str, holds: bool, evidence: str = "") -> None:
        """Print a claim that holds; end the demo with one that does not."""
        if not holds:
            print(f"  {RED}NO  {text}{PLAIN}\n{evidence}", flush=True)
            raise Failed(text)
        print(f"  {GREEN}ok{PLAIN}  {text}", flush=True)

    @contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Print the name and the duration of a slow step."""
        begin = time.monotonic()
        print(f"  ... {text}", end="" if TTY else "\n", flush=True)
        yield
        took = f"{time.monotonic() - begin:.1f} s"
        print(f" {DIM}{took}{PLAIN}" if TTY else f"      {took}", flush=True)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._begin


def stock(name: str) -> str:
    """Return a network as virt-manager writes it when its user clicks "Isolated"."""
    return lab.isolated(name, NETWORKS[name], hosts=[lab.Host(MAC, ADDRESS)])


def without_natns(tell: Narrator) -> None:
    tell.step("Two networks with the same subnet, by libvirt alone")
    for name in NETWORKS:
        lab.define_network(stock(name))
    tell.show("virsh net-dumpxml a", lab.virsh("net-dumpxml", "a").stdout)
    tell.say("Network b is the same, but for its name and its bridge.")
    lab.virsh("net-start", "a")
    refused = lab.virsh("net-start", "b", check=False)
    tell.show("virsh net-start a; virsh net-start b", refused.stderr)
    tell.claim("libvirt alone refuses the second one", refused.returncode != 0)
    lab.virsh("net-destroy", "a")


def install(tell: Narrator, provider: lab.Provider) -> None:
    tell.step("libvirt-natns comes in")
    lab.write_config(provider.config(pool="192.168.0.100-192.168.0.199"))
    tell.show("cat /etc/libvirt-natns/config.toml", provider.config().strip())
    result = lab.install_natns()
    tell.show("virt-natns install", result.stdout + result.stderr)
    hooks = sorted(file.name for file in Path("/etc/libvirt/hooks").iterdir())
    tell.claim("libvirt has its hooks", bool(hooks), f"found: {hooks}")


def start_networks(tell: Narrator) -> None:
    tell.step("The same two networks again: nothing else is typed")
    for name in NETWORKS:
        begin = time.monotonic()
        output = lab.virsh("net-start", name)
        took = (time.monotonic() - begin) * 1000
        tell.show(f"virsh net-start {name}", f"started in {took:.0f} ms{output.stderr}")
    spaces = lab.run("ip", "netns", "list").stdout
    for name in NETWORKS:
        tell.claim(f"network {name} has a router of its own, nat-{name}", f"nat-{name}" in spaces)
    routes = lab.run("ip", "route").stdout
    tell.show("ip route", routes)
    tell.claim("the host itself has no route to 10.0.0.0/24", "10.0.0." not in routes, routes)


def boot_guests(tell: Narrator, stack: ExitStack) -> dict[str, lab.RealGuest]:
    tell.step(f"A real guest in each: both have MAC {MAC} and address {ADDRESS}")
    url = f"http://{lab.INTERNET}/"
    tell.say(f"They fetch {url}, which answers with the address that it saw.")
    tell.say(f"Both want port {PORT} to lead to their own web page:")
    tell.show("virsh metadata guest-a urn:libvirt-natns:1", textwrap.dedent(METADATA).strip())
    guests = {}
    for name in NETWORKS:
        guest = lab.RealGuest(f"guest-{name}", name, MAC, url=url, metadata=METADATA)
        guests[name] = stack.enter_context(guest)
    tell.show("virt-natns forward list", lab.natns("forward", "list").stdout)
    with tell.waiting("Linux boots in two emulated machines"):
        for guest in guests.values():
            guest.wait_ready()
    for guest in guests.values():
        said = [line for line in guest.console.splitlines() if line.startswith("guest ")]
        tell.show(f"the console of {guest.name}", "\n".join(said))
    return guests


def check_guests(tell: Narrator, guests: dict[str, lab.RealGuest], provider: lab.Provider) -> None:
    for guest in guests.values():
        tell.claim(f"{guest.name} leased {ADDRESS}", guest.address == ADDRESS, guest.console)
    seen = {name: guest.fetched.rpartition(":")[0] for name, guest in guests.items()}
    for name, address in seen.items():
        tell.claim(
            f"the web server saw {guests[name].name} as {address or 'no client'}",
            address.startswith("192.168.0.") and address != provider.address,
            guests[name].console,
        )
    tell.claim("that is a different upstream address for each", len(set(seen.values())) == 2)


def fetch_pages(tell: Narrator, guests: dict[str, lab.RealGuest], provider: lab.Provider) -> None:
    tell.step(f"The guests' own pages: two ports {PORT}, one for each network's upstream address")
    urls = {}
    for name in NETWORKS:
        entry = json.loads(lab.natns("status", "--json", name).stdout)["networks"][0]
        urls[name] = f"http://{entry['address']}:{PORT}/"
    tell.say("From another machine on the provider's network:")
    with provider.neighbour("neighbour", NEIGHBOUR) as neighbour:
        for name, url in urls.items():
            page = neighbour.curl(url, check=False)
            tell.show(f"curl {url}", page)
            tell.claim(f"that is {guests[name].name}", page == f"this is {guests[name].name}")
        other = urls["a"].replace(f":{PORT}", ":80")
        closed = not neighbour.curl(other, check=False, timeout=1)
        tell.claim("port 80, which was not published, is closed", closed)
    for client, name in (("b", "a"), ("a", "b")):
        page = guests[client].fetch(urls[name])
        holds = page == f"this is {guests[name].name}"
        tell.claim(f"{guests[client].name} fetches that of {guests[name].name}", holds, page)


def look(tell: Narrator) -> None:
    tell.step("What the administrator sees")
    status = lab.natns("status").stdout
    tell.show("virt-natns status", status)
    rows = [line for line in status.splitlines() if "nat-a" in line or "nat-b" in line]
    tell.claim("status lists both networks", len(rows) >= 2, status)
    for name in NETWORKS:
        leases = lab.virsh("net-dhcp-leases", name).stdout
        tell.show(f"virsh net-dhcp-leases {name}", leases)
        tell.claim(f"libvirt knows the lease in {name}", MAC in leases and ADDRESS in leases)
    tell.show("virt-natns check", lab.natns("check").stdout or "no difference")


def tear_down(tell: Narrator, stack: ExitStack, before: lab.Snapshot) -> None:
    tell.step("Down again")
    stack.close()
    for name in NETWORKS:
        tell.show(f"virsh net-destroy {name}", lab.virsh("net-destroy", name).stderr)
    try:
        lab.wait_for(lambda: lab.snapshot() == before, interval=0.1)
    except lab.LabError:
        tell.claim("nothing is left", False, before.diff(lab.snapshot()))
    for section, lines in before.sections.items():
        tell.say(f"{DIM}{section}: {len(lines)}, as before{PLAIN}")
    tell.claim("nothing is left: no namespace, link, route, rule, process or file", True)
    tell.show("virt-natns uninstall", lab.uninstall_natns().stdout)
    hooks = [file for file in Path("/etc/libvirt/hooks").rglob("*") if file.is_file()]
    tell.claim("the hooks are gone, too", not hooks, f"found: {hooks}")


def play(tell: Narrator) -> None:
    lab.require_sandbox()
    tell.step("A sandbox: a whole libvirt of its own, out of the machine's reach")
    daemon = lab.Libvirtd()
    with tell.waiting("libvirtd starts"):
        daemon.start()
        daemon.prime()
    tell.show("virsh version", lab.virsh("version", "--daemon").stdout)
    with lab.Provider() as provider, ExitStack() as stack:
        tell.say(f"The provider's network: bridge br0, router {provider.gateway}, and behind it")
        tell.say(f"a web server, {lab.INTERNET}, that answers with the address it saw.")
        without_natns(tell)
        install(tell, provider)
        before = lab.snapshot()
        start_networks(tell)
        guests = boot_guests(tell, stack)
        check_guests(tell, guests, provider)
        fetch_pages(tell, guests, provider)
        look(tell)
        tear_down(tell, stack, before)


def main() -> int:
    tell = Narrator()
    try:
        play(tell)
    except (Failed, lab.LabError) as error:
        print(f"\n{RED}The demo failed:{PLAIN} {error}", file=sys.stderr)
        return 1
    print(f"\n{BOLD}All of it held, in {tell.elapsed:.0f} s.{PLAIN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
