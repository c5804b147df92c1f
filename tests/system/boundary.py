# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold in every house of ``lab_boundary``, whatever iptables and backend it has."""

from lab import FastGuest, isolated, natns, run, start_network, virsh
from lab_boundary import NOT_OURS, House, chain, reaches
from lab_servers import WEB_PORT

JUMP = "NATNS-FORWARD"


def check_kinds(world: House, kind: str) -> None:
    """With some kind of firewall in the host's FORWARD chain."""
    with world.firewalled(kind):
        ours, control = world.reached()
        assert "world" in ours
        assert "world" in control
        # What the host itself publishes is for guests of ours, too.
        assert ours <= control | {"published container"}
        assert ours - {"world"} <= {"published container"}
        if kind.startswith("docker"):
            assert "published container" in ours
        assert natns("check", check=False).stdout == ""


def check_later_network(world: House) -> None:
    """One that starts when ours has been up for long, without anybody looking."""
    natns("sync")
    start_network(isolated("late", "virbr59", address="10.8.0.1", metadata=NOT_OURS))
    try:
        with FastGuest("virbr59", name="late") as guest:
            guest.static("10.8.0.5/24", "10.8.0.1")
            guest.serve("http", WEB_PORT)
            assert not reaches(world.ours, "10.8.0.5", WEB_PORT)
            assert not reaches(world.control, "10.8.0.5", WEB_PORT)
    finally:
        virsh("net-destroy", "late")
        virsh("net-undefine", "late")


def check_order(world: House) -> None:
    """Rules that come later than ours decide first; and ours does not move for others' sake."""
    with world.firewalled("rejects"):
        assert JUMP in chain("FORWARD")[-2]
        before = chain("FORWARD")
        run("iptables", "-I", "FORWARD", "-d", "203.0.113.0/24", "-j", "REJECT")
        assert natns("check", check=False).stdout == ""
        natns("sync")
        assert chain("FORWARD")[1:] == before
        assert "world" not in world.reached()[0]
        run("iptables", "-D", "FORWARD", "1")
        # As an earlier version had it, and behind the end.
        for change in ("-I FORWARD", "-A FORWARD"):
            run("sh", "-ec", f"iptables -D FORWARD {len(before) - 1}; iptables {change} -j {JUMP}")
            assert "our jump" in natns("check", check=False).stdout
            natns("sync")
            assert chain("FORWARD") == before
        assert "world" in world.reached()[0]
