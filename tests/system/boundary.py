# SPDX-License-Identifier: LGPL-2.1-or-later
"""What must hold in every house of ``lab_boundary``, whatever iptables and backend it has."""

from lab import FastGuest, isolated, run, start_network, virsh
from lab_boundary import NOT_OURS, House, chain, command, reaches, sync
from lab_servers import WEB_PORT
from lab_sides import Answer

JUMP = "NATNS-FORWARD"


OWN = {"published", "published by twin"}
"""Ports that networks of ours publish to everybody."""

HOST_REACHES = {
    *("world", "victim", "secret", "mgmt", "container", "for host"),
    *(*OWN, *(f"{name}, loopback" for name in OWN), "for 127.0.0.1, loopback"),
}
"""All that answers, which shows that it does, and ports that the host is a client of.

Not a port for other clients, nor any by the transit address of its network."""


def check_kinds(world: House, kind: str) -> None:
    """With some kind of firewall in the host's FORWARD chain."""
    with world.firewalled(kind):
        ours, control, host = world.reached()
        # What the host itself publishes is for guests of ours, too.
        container = {"published container"}
        assert ours - container == {"world", *OWN}
        assert control >= {"world", *OWN, "for control"}
        assert ours <= control | container
        if kind.startswith("docker"):
            assert container <= ours
        assert not {name for name in control if name.endswith("transit")}
        assert host == HOST_REACHES
        assert command("check") == Answer(0, "", "")


def check_later_network(world: House) -> None:
    """One that starts when ours has been up for long, without anybody looking."""
    sync()
    start_network(isolated("late", "virbr59", address="10.8.0.1", metadata=NOT_OURS))
    try:
        with FastGuest("virbr59", name="late") as guest:
            guest.static("10.8.0.5/24", "10.8.0.1")
            guest.serve("http", WEB_PORT)
            assert reaches(None, "10.8.0.5", WEB_PORT), "it answers"
            assert not reaches(world.ours, "10.8.0.5", WEB_PORT)
            assert not reaches(world.control, "10.8.0.5", WEB_PORT)
    finally:
        virsh("net-destroy", "late")
        virsh("net-undefine", "late")


def check_notes(world: House) -> None:
    """An administrator's own chain that drops is named, with rules that let the networks pass."""
    sync()
    hook = "{ type filter hook forward priority 10; policy drop; }"
    run("nft", f"add table inet guard; add chain inet guard forward {hook}")
    try:
        assert "world" not in world.reached().ours
        *stopped, note = command("check").out.splitlines()
        place = "nftables: inet guard forward (policy drop)"
        assert stopped and all(line.endswith(f": stopped by {place}") for line in stopped)
        what = f"{place} stops packets of the networks: add to it "
        assert note.startswith(f"note: {what}")
        assert warnings() == [note.replace("note: ", "foreign chains: ")]
        for rule in note.rpartition(what)[2].split("; "):
            run("nft", f"add rule inet guard forward {rule}")
        assert command("check") == Answer(0, "", "")
        assert warnings() == []
        assert "world" in world.reached().ours
    finally:
        run("nft", "delete table inet guard")


def warnings() -> list[str]:
    """What doctor warns of, the chains of others alone."""
    told = command("doctor").out.splitlines()
    found = [line.removeprefix("warn").strip() for line in told if line.startswith("warn ")]
    return [line for line in found if line.startswith("foreign chains:")]


def check_order(world: House) -> None:
    """Rules that come later than ours decide first; and ours does not move for others' sake."""
    with world.firewalled("rejects"):
        assert JUMP in chain("FORWARD")[-2]
        before = chain("FORWARD")
        run("iptables", "-I", "FORWARD", "-d", "203.0.113.0/24", "-j", "REJECT")
        assert command("check").out == ""
        sync()
        assert chain("FORWARD")[1:] == before
        assert "world" not in world.reached().ours
        run("iptables", "-D", "FORWARD", "1")
        # As an earlier version had it, and behind the end.
        for change in ("-I FORWARD", "-A FORWARD"):
            run("sh", "-ec", f"iptables -D FORWARD {len(before) - 1}; iptables {change} -j {JUMP}")
            assert "our jump" in command("check").out
            sync()
            assert chain("FORWARD") == before
        assert "world" in world.reached().ours
