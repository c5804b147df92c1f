# SPDX-License-Identifier: LGPL-2.1-or-later
"""router up fails, is killed, or is not confirmed: the host is as it was, in every detail."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import lab_vps
import pytest
from lab import CHECKOUT, PYTHON, remove_config, run, wait_for, write_config
from lab_vps import ADDRESS, CONFIG, GATEWAY, NIC, ROUTER, Vps, state_of_host

from libvirt_natns.cli import commands
from libvirt_natns.documents import config
from libvirt_natns.errors import KernelError, RouterError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.netlink import Socket
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.upstream.router import health, journal, nic_snapshot
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

STRIDE = 2
"""Every other request, for the time it takes; 1 for all of them."""

RESOLV = Path("/etc/resolv.conf")

ELABORATE = f"""\
link set {NIC} mtu 1400 txqueuelen 500 alias uplink
link property add dev {NIC} altname enp0s3
link set {NIC} promisc on
address add 198.51.100.11/24 dev {NIC} label {NIC}:1
address add 203.0.113.200/32 dev {NIC}
address add 2001:db8:1::11/64 dev {NIC} nodad preferred_lft 0
route replace default via {GATEWAY} src {ADDRESS} metric 50
route add 192.0.2.0/24 via {GATEWAY} mtu 1300
route add 192.0.2.128/25 dev {NIC} scope link table 100
route add default via {GATEWAY} table 100
rule add from {ADDRESS} lookup 100 priority 1000
rule add iif {NIC} lookup 101 priority 1001
-6 route add 2001:db8:2::/48 via {lab_vps.GATEWAY6} dev {NIC} metric 77
-6 route add default via {lab_vps.GATEWAY6} dev {NIC} table 100 src {lab_vps.ADDRESS6}
neighbour add 198.51.100.77 lladdr 02:00:00:00:00:77 dev {NIC} nud permanent
neighbour add proxy 198.51.100.78 dev {NIC}
link add other type veth peer other-peer
link set other up
route add 192.0.2.64/26 dev other src {ADDRESS}
"""


@pytest.fixture(scope="module")
def vps() -> Iterator[Vps]:
    """A server whose NIC has a bit of everything that a NIC can have."""
    with ExitStack() as cleanup:
        world = cleanup.enter_context(Vps(serving=False))
        cleanup.callback(run, "ip", "link", "del", "other", check=False)
        for rule in ("1000", "1001"):
            cleanup.callback(run, "ip", "rule", "del", "priority", rule, check=False)
        for line in ELABORATE.splitlines():
            run("ip", *line.split())
        for key in (
            "ipv4/conf/{}/rp_filter=2",
            "ipv6/conf/{}/accept_ra=0",
            "ipv4/neigh/{}/gc_stale_time=77",
        ):
            path, _, value = key.format(NIC).partition("=")
            Path("/proc/sys/net", path).write_text(value)
        stub = Path("/run/stub-resolv.conf")
        stub.write_text(f"nameserver 127.0.0.53\nnameserver {GATEWAY}\nsearch example.test\n")
        kept = (RESOLV.read_bytes(), RESOLV.is_symlink())
        RESOLV.unlink()
        RESOLV.symlink_to(stub)
        write_config(CONFIG)
        yield world
        remove_config()
        RESOLV.unlink()
        RESOLV.write_bytes(kept[0])
        stub.unlink()


@pytest.fixture(autouse=True)
def nothing_kept(nothing_left: None) -> Iterator[None]:
    """Routers that were confirmed are forgotten, as if it were another machine."""
    yield
    shutil.rmtree(lab_vps.STATE, ignore_errors=True)


def machine(kernel: Kernel, before: Callable[[str], None] | None = None) -> RouterLifecycle:
    return RouterLifecycle(config.load(), kernel, before=before)


def steps(verb: str) -> list[str]:
    """All that is announced on the way up, or down."""
    told: list[str] = []
    with Kernel() as kernel:
        machine(kernel, told.append if verb == "up" else None).up("wan")
        machine(kernel, told.append if verb == "down" else None).down("wan")
    return told


def test_down_puts_everything_back(vps: Vps) -> None:
    before = state_of_host()
    assert any("altname enp0s3" in line for line in before["link"])
    assert commands.main(["router", "up"]) == 0
    assert not Path("/sys/class/net", NIC).exists()
    assert "enp0s3" in run("ip", "link", "show", NIC, namespace=ROUTER).stdout
    assert f"nameserver {GATEWAY}" in RESOLV.read_text()
    assert not RESOLV.is_symlink()
    assert commands.main(["router", "down"]) == 0
    after = state_of_host()
    assert after == before, before.diff(after)
    assert commands.main(["router", "down"]) == 0


def test_whatever_step_fails(vps: Vps) -> None:
    before = state_of_host()
    announced = steps("up")
    assert len(announced) == 15
    for number, what in enumerate(announced):
        left = number

        def fail(_: str) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise KernelError("no more of this")

        with Kernel() as kernel, pytest.raises(RouterError, match=r"no more of this.*as it was"):
            machine(kernel, fail).up("wan")
        after = state_of_host()
        assert after == before, f"{what}: {before.diff(after)}"
        assert journal.load("wan") is None


def killed(act: Callable[[], object]) -> bool:
    """Whether a child that does something is killed on the way."""
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            act()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_at(number: int) -> Callable[[object], None]:
    """What kills the process when it is called for the time of that number."""
    left = number

    def count(_: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def act(verb: str, before: Callable[[str], None] | None = None) -> None:
    with Kernel() as kernel:
        opened = machine(kernel, before)
        opened.up("wan") if verb == "up" else opened.down("wan")


def test_killed_ahead_of_any_step_of_up(vps: Vps, capsys: pytest.CaptureFixture[str]) -> None:
    before = state_of_host()
    for number, what in enumerate(steps("up")):
        assert killed(partial(act, "up", kill_at(number))), what
        capsys.readouterr()
        assert commands.main(["router", "status"]) == 0
        assert "half-done (killed at: " in capsys.readouterr().out
        repair = ("down", "up")[number % 2]
        act(repair)
        if repair == "up":
            with Kernel() as kernel:
                assert health.of(machine(kernel), "wan")[0] == "up"
            act("down")
        after = state_of_host()
        assert after == before, f"{what}: {before.diff(after)}"


def test_killed_ahead_of_any_step_of_down(vps: Vps) -> None:
    before = state_of_host()
    for number, what in enumerate(steps("down")):
        act("up")
        assert killed(partial(act, "down", kill_at(number))), what
        act("down")
        after = state_of_host()
        assert after == before, f"{what}: {before.diff(after)}"


@pytest.mark.parametrize("verb", ["up", "down"])
def test_killed_between_any_two_changes_of_the_nic(
    vps: Vps, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step, too: ahead of each request to the kernel, and after the last."""
    before, taken = state_of_host(), of_nic()
    original = Socket.change

    def run_with(number: int) -> None:
        count = kill_at(number)

        def change(self: Socket, kind: int, body: bytes, flags: int = 0) -> None:
            count(kind)
            original(self, kind, body, flags)

        monkeypatch.setattr(Socket, "change", change)
        act(verb)

    number = 0
    if verb == "down":
        act("up")
    while killed(partial(run_with, number)):
        act("down")
        assert of_nic() == taken, f"change {number}"
        if verb == "down":
            act("up")
        number += STRIDE
    assert number > 15
    act("down")
    after = state_of_host()
    assert after == before, before.diff(after)


def of_nic() -> set[str]:
    """The NIC as the product sees it: quicker to look at than the whole host."""
    found = nic_snapshot.capture(None, NIC)
    routes = (*found.routes, *found.foreign)
    bodies = {each.body for each in found.addresses} | {each.body for each in routes}
    bodies |= {each.body for each in found.neighbours} | {each.body for each in found.rules}
    simple = replace(found, addresses=(), routes=(), foreign=(), neighbours=(), rules=(), at=0.0)
    return {str(simple), *bodies}


# -- two at once -------------------------------------------------------------


@pytest.mark.parametrize("configured", [False, True])
def test_a_repair_that_comes_after_down_leaves_the_router_down(
    vps: Vps, configured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at the router takes no lock, and `router down` ends before the repair begins."""
    before = state_of_host()
    look = health.differences

    def look_and_take_down(verbs: RouterLifecycle, name: str) -> list[str]:
        found = look(verbs, name)
        with Kernel() as other:
            machine(other).down("wan")
        return found

    with Kernel() as kernel:
        machine(kernel).up("wan")
        run("ip", "link", "set", "host", "down", namespace=ROUTER)
        monkeypatch.setattr(health, "differences", look_and_take_down)
        with kernel.work():
            assert health.repair_all(machine(kernel), configured=configured) == []
    assert journal.load("wan") is None
    after = state_of_host()
    assert after == before, before.diff(after)


def test_a_router_that_others_repaired_is_seen_as_it_is(
    vps: Vps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair waits for the lock, and holds readings from before."""
    look = health.differences

    def look_while_others_repair(verbs: RouterLifecycle, name: str) -> list[str]:
        found = look(verbs, name)
        run("ip", "link", "set", "lo", "up", namespace=ROUTER)
        with Kernel() as other:
            machine(other).up("wan")
        return found

    with Kernel() as kernel:
        machine(kernel).up("wan")
        run("ip", "link", "set", "lo", "down", namespace=ROUTER)
        monkeypatch.setattr(health, "differences", look_while_others_repair)
        with kernel.work():
            assert health.repair_all(machine(kernel)) == []
        machine(kernel).down("wan")


# -- nobody confirms ---------------------------------------------------------


def waiting() -> list[str]:
    """The processes that wait for a confirmation."""
    return run("pgrep", "-f", "expire wan", check=False).stdout.split()


def test_unconfirmed(vps: Vps) -> None:
    before = state_of_host()
    # From a session that ends at once, and takes its processes along.
    command = f"{PYTHON} -m libvirt_natns router up wan --confirm-within 5s; kill -HUP 0"
    run("setsid", "sh", "-c", command, check=False, env={"PYTHONPATH": str(CHECKOUT)})
    assert not Path("/sys/class/net", NIC).exists()
    assert len(waiting()) == 1
    wait_for(lambda: not journal.load("wan") and not waiting(), timeout=60, what="the way back")
    after = state_of_host()
    assert after == before, before.diff(after)
    assert commands.main(["router", "up", "--boot"]) == 0
    assert Path("/sys/class/net", NIC).exists(), "what was not confirmed comes up at boot"


def test_confirmed(vps: Vps) -> None:
    before = state_of_host()
    assert commands.main(["router", "up", "--confirm-within", "60"]) == 0
    with Kernel() as kernel:
        assert health.of(machine(kernel), "wan")[0] == "unconfirmed"
        assert commands.main(["router", "confirm"]) == 0
        assert health.of(machine(kernel), "wan")[0] == "up"
    wait_for(lambda: not waiting(), what="the end of the timer")
    assert commands.main(["router", "confirm"]) == 0
    act("down")
    assert state_of_host() == before
    assert commands.main(["router", "confirm"]) == 1


def test_killed_while_the_timer_waits(vps: Vps) -> None:
    """up is killed half-way, and nobody comes: the timer alone mends it."""
    before = state_of_host()

    def up() -> None:
        with Kernel() as kernel:
            machine(kernel, kill_at(7)).up("wan", 1.0)

    assert killed(up)
    wait_for(lambda: not journal.load("wan") and not waiting(), timeout=60, what="the way back")
    after = state_of_host()
    assert after == before, before.diff(after)


def test_killed_together_with_the_timer(vps: Vps) -> None:
    """Nobody is left: the next command takes the router back first."""
    before = state_of_host()
    with Kernel() as kernel:
        machine(kernel).up("wan", 600.0)
        for process in waiting():
            os.kill(int(process), signal.SIGKILL)
        record = journal.load("wan")
        assert record is not None
        journal.advance(record, deadline=boot_clock.now() - 1)
        assert health.of(machine(kernel), "wan")[0] == "overdue"
        done = machine(kernel).up("wan")
        assert "rolled back router wan, which was never confirmed" in done[0]
        assert health.of(machine(kernel), "wan")[0] == "up"
        machine(kernel).down("wan")
    assert state_of_host() == before
