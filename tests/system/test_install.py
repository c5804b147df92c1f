# SPDX-License-Identifier: LGPL-2.1-or-later
"""install and uninstall on a machine with libvirt: what appears, what runs, what stays."""

import os
import re
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from lab import (
    FastGuest,
    Host,
    Libvirtd,
    Provider,
    Snapshot,
    define_network,
    forward_at_once,
    isolated,
    run,
    snapshot,
    start_network,
    virsh,
    wait_for,
    write_config,
)
from lab_sides import (
    HOOKS,
    MAC,
    Answer,
    Command,
    Side,
    World,
    another_boot,
    in_process,
    networks,
    two_networks,
    without_hooks,
)

from libvirt_natns.cli import commands

REAL_INTERPRETER = True
CONFIG = Path("/etc/libvirt-natns/config.toml")
PLACES = ("/etc/libvirt/hooks", "/etc/libvirt-natns", "/var/lib/libvirt-natns",
          "/run/libvirt-natns")  # fmt: skip
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1"{}/>'
FOREIGN = """\
#!/bin/sh
# Not ours, though it knows of "# libvirt-natns: a hook".
xml=$(cat)
echo "$1 $2 $3 $(echo "$xml" | grep -c '<network')" >>/run/tmp/foreign.log
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


@pytest.fixture(autouse=True)
def fresh(nothing_left: None) -> Iterator[None]:
    """No hooks before the test; afterwards as it was."""
    installed = any(HOOKS.iterdir())
    kept = CONFIG.read_text() if CONFIG.exists() else None
    if installed:
        assert commands.main(["uninstall"]) == 0
    CONFIG.unlink(missing_ok=True)
    yield
    commands.main(["uninstall"])
    CONFIG.unlink(missing_ok=True)
    if kept is not None:
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text(kept)
    if installed:
        assert commands.main(["install"]) == 0


def files() -> dict[str, str]:
    """All files that an installation may touch, with mode and content."""
    found = {}
    for place in PLACES:
        for file in Path(place).rglob("*"):
            content = file.read_text(errors="replace") if file.is_file() else ""
            found[os.fspath(file)] = f"{file.stat().st_mode:o} {content}"
    return found


# -- files -------------------------------------------------------------------


def test_install_says_what_it_does_and_uninstall_undoes_it(command: Command) -> None:
    before = files()
    define_network(isolated("lab", "virbr10"))
    define_network(isolated("kept", "virbr11", metadata=NAT.format(' enabled="no"')))
    bridged = isolated("bridged", "br9", address=None).replace(
        "<bridge", "<forward mode='bridge'/><bridge"
    )
    define_network(
        bridged.replace(' stp="on" delay="0"', "").replace('<domain name="bridged"/>', "")
    )
    define_network(isolated("wrong", "virbr12", metadata=NAT.format(' enable="no"')))
    done = command("install")
    assert (done.status, done.err) == (0, "")
    out = done.out
    assert "installed /etc/libvirt/hooks/network\ninstalled /etc/libvirt/hooks/qemu\n" in out
    assert "told libvirtd to look for hooks\n" in out
    handled, _, untouched = out.partition("networks that are not touched:\n")
    assert "networks that get a NAT router from now on:\n  lab\n" in handled
    assert "  kept: its metadata says enabled='no'\n" in untouched
    assert "  bridged: has <forward mode='bridge'>\n" in untouched
    assert "  wrong: will not start: " in untouched
    assert '<natns:nat xmlns:natns="urn:libvirt-natns:1" enabled="no"/>' in untouched
    installed = files()
    for hook in ("network", "qemu"):
        file = HOOKS / hook
        assert file.stat().st_mode & 0o777 == 0o755
        assert "\npython=/usr/bin/python3\n" in file.read_text()
    # What "install" says about the way out is true.
    virsh("net-start", "kept")
    assert "nat-kept" not in run("ip", "netns", "list").stdout
    again = command("install")
    assert again.status == 0
    state = "/var/lib/libvirt-natns"
    assert {k: v for k, v in files().items() if state not in k} == {
        k: v for k, v in installed.items() if state not in k
    }
    done = command("uninstall")
    assert (done.status, done.err) == (0, "")
    assert "removed /etc/libvirt/hooks/network\nremoved /etc/libvirt/hooks/qemu\n" in done.out
    assert files() == before
    assert command("uninstall").status == 0


def test_a_foreign_hook_stays_and_both_run(command: Command, provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    foreign = HOOKS / "network"
    foreign.write_text(FOREIGN)
    foreign.chmod(0o755)
    log = Path("/run/tmp/foreign.log")
    before = files()
    done = command("install")
    assert "installed /etc/libvirt/hooks/network.d/libvirt-natns\n" in done.out
    assert "installed /etc/libvirt/hooks/qemu\n" in done.out
    start_network(isolated("a", "virbr10"))
    assert "inet 192.168.0.1" in run("ip", "-n", "nat-a", "address").stdout
    assert log.read_text().splitlines() == ["a start begin 1", "a started begin 1"]
    assert command("doctor").status == 0
    virsh("net-destroy", "a")
    assert "nat-a" not in run("ip", "netns", "list").stdout
    assert "a stopped end 1" in log.read_text()
    assert foreign.read_text() == FOREIGN
    # A refusal reaches the user from there as well.
    write_config("scope = 1\n")
    refused = virsh("net-start", "a", check=False)
    assert refused.returncode == 1
    assert "libvirt-natns: /etc/libvirt-natns/config.toml: scope: is 1" in refused.stderr
    write_config(provider.config(more="probe = 0"))
    assert command("uninstall").status == 0
    assert files() == before
    # Once the foreign one has gone, ours takes its place.
    assert command("install").status == 0
    foreign.unlink()
    assert command("install").status == 0
    assert foreign.exists()
    assert not (HOOKS / "network.d").exists()
    log.unlink()


def test_doctor_tells_whether_libvirt_has_seen_the_hooks(command: Command) -> None:
    assert command("install").status == 0
    assert command("doctor").status == 0
    # Hooks that somebody copied there by hand, after libvirtd was started.
    Path("/var/lib/libvirt-natns/told.json").unlink()
    later = (HOOKS / "network").stat().st_mtime + 60
    os.utime(HOOKS / "network", (later, later))
    done = command("doctor")
    assert done.status == 1
    assert (
        "broken  hooks in libvirt: libvirtd has not looked for hooks since ours were"
        " installed: systemctl reload libvirtd\n" in done.out
    )
    assert command("install").status == 0
    assert command("doctor").status == 0


def test_hooks_are_seen_by_a_libvirtd_that_was_reloading(
    command: Command, provider: Provider
) -> None:
    # It looks for hooks first, then renews every network's rules, and meanwhile
    # ignores whoever tells it to look again.
    natted = isolated("natted", "virbr-natted", address="172.31.254.1", more="<forward/>")
    start_network(natted)
    write_config(provider.config())
    pid = Libvirtd().pid
    assert pid is not None
    for _ in range(3):
        os.kill(pid, signal.SIGHUP)
        assert command("install").status == 0
        start_network(isolated("a", "virbr10"))
        assert Path("/run/netns/nat-a").exists()
        virsh("net-destroy", "a")
        virsh("net-undefine", "a")
        assert command("uninstall").status == 0
    virsh("net-destroy", "natted")
    virsh("net-undefine", "natted")
    # libvirt switches it on, and never off again.
    run("sysctl", "-qw", "net.ipv4.ip_forward=0")


# -- scope -------------------------------------------------------------------


def test_scope_annotated_is_opt_in(command: Command) -> None:
    done = command("install", "--scope", "annotated")
    assert done.status == 0
    assert f"wrote {CONFIG}: scope = annotated\n" in done.out
    define_network(isolated("plain", "virbr10"))
    define_network(isolated("asked", "virbr11", address="10.1.0.1", metadata=NAT.format("")))
    done = command("install", "--scope", "annotated")
    assert "networks that get a NAT router from now on:\n  asked\n" in done.out
    assert "  plain: scope is 'annotated'" in done.out
    for name in ("plain", "asked"):
        virsh("net-start", name)
    namespaces = run("ip", "netns", "list").stdout
    assert "nat-asked" in namespaces
    assert "nat-plain" not in namespaces
    # The other way round, what runs is taken over at once.
    done = command("install", "--scope", "isolated")
    assert "plain: is active in libvirt, but has no router: made a router\n" in done.out
    assert command("uninstall").status == 0
    assert not CONFIG.exists()


def test_scope_is_set_in_a_users_file_and_nothing_else(command: Command) -> None:
    CONFIG.parent.mkdir(exist_ok=True)
    text = '# mine\nfirewall = "auto"  # whatever\n\n[upstreams.host] # built in\nkind = "host"\n'
    CONFIG.write_text(text)
    assert command("install", "--scope", "annotated").status == 0
    assert CONFIG.read_text() == f'scope = "annotated"\n{text}'
    CONFIG.write_text(text.replace("\n\n", "\nscope = 'annotated' # for now\n\n"))
    assert command("install", "--scope", "isolated").status == 0
    assert CONFIG.read_text() == text.replace("\n\n", '\nscope = "isolated" # for now\n\n')
    kept = CONFIG.read_text()
    assert command("uninstall").status == 0
    assert CONFIG.read_text() == kept


def test_a_wrong_configuration_is_refused_before_anything_is_done(command: Command) -> None:
    CONFIG.parent.mkdir(exist_ok=True)
    CONFIG.write_text('scope = "all"\n')
    before = files()
    done = command("install", "--scope", "annotated")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"virt-natns: {CONFIG}: scope: is 'all': expected ")
    assert files() == before


# -- networks that run -------------------------------------------------------


def serves_as_libvirt(bridge: str, guest: FastGuest) -> None:
    """The bridge has its address again, and libvirt's own dnsmasq serves it."""
    assert "inet 10.0.0.1/24 brd 10.0.0.255" in run("ip", "address", "show", bridge).stdout
    offer = guest.dhcp()
    assert (offer["ip"], offer["serverid"]) == ("10.0.0.5", "10.0.0.1")
    assert "router" not in offer


def settled() -> Snapshot:
    """A snapshot when nothing is on the move, such as the run of a lease script."""
    seen = [snapshot()]

    def twice() -> bool:
        seen.append(snapshot())
        return seen[-1] == seen[-2]

    wait_for(twice)
    return seen[-1]


def test_a_running_network_is_taken_over_and_given_back(
    command: Command, provider: Provider
) -> None:
    write_config(provider.config(more="probe = 0"))
    before = files()
    route = '<route address="10.9.0.0" prefix="16" gateway="10.0.0.9"/>'
    xml = isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")])
    start_network(xml.replace("</network>", f"{route}</network>"))
    with FastGuest("virbr10", MAC) as guest:
        serves_as_libvirt("virbr10", guest)
        native = settled()
        done = command("install")
        assert "a: is active in libvirt, but has no router: made a router\n" in done.out
        assert done.status == 0
        # The address that the guest asks for again is the same; now there is a way out.
        offer = guest.dhcp()
        assert (offer["ip"], offer["router"]) == ("10.0.0.5", "10.0.0.1")
        assert guest.curl(f"http://{provider.gateway}/").startswith("192.168.0.100:")
        assert command("uninstall").status == 0
        # libvirt starts its dnsmasq again, lease helper included.
        wait_for(lambda: not native.diff(settled()))
        serves_as_libvirt("virbr10", guest)
        assert files() == before


def test_twins_are_given_back(command: Command, provider: Provider) -> None:
    """What libvirt alone would not have started goes on as well."""
    write_config(provider.config(more="probe = 0"))
    text = CONFIG.read_text()
    assert command("install").status == 0
    twins = (("a", "virbr10"), ("b", "virbr11"))
    for name, bridge in twins:
        start_network(isolated(name, bridge, hosts=[Host(MAC, "10.0.0.5")]))
    # Not even a broken configuration holds an uninstallation up.
    CONFIG.write_text("scope = 1\n")
    done = command("uninstall")
    assert (done.status, done.err) == (0, "")
    assert "a: given back to libvirt\nb: given back to libvirt\n" in done.out
    CONFIG.write_text(text)
    for name, bridge in twins:
        with FastGuest(bridge, MAC, f"guest-{name}") as guest:
            serves_as_libvirt(bridge, guest)


def test_install_and_uninstall_without_libvirt(command: Command, provider: Provider) -> None:
    write_config(provider.config(more="probe = 0"))
    start_network(isolated("a", "virbr10", hosts=[Host(MAC, "10.0.0.5")]))
    listening = Path("/run/libvirt/libvirt-sock-ro")
    away = listening.with_name("away")
    listening.rename(away)
    try:
        done = command("install")
        assert done.status == 0
        assert "libvirt does not answer" in done.err
        assert "virt-natns sync" in done.err
    finally:
        away.rename(listening)
    assert command("sync").status == 0
    listening.rename(away)
    try:
        done = command("uninstall")
        assert done.status == 0
        assert "a: given back to libvirt\n" in done.out
    finally:
        away.rename(listening)
    with FastGuest("virbr10", MAC) as guest:
        serves_as_libvirt("virbr10", guest)


def test_hooks_whose_package_is_gone_let_everything_start(command: Command) -> None:
    assert command("install").status == 0
    Path("/run/libvirt-natns/guests").mkdir(parents=True, exist_ok=True)
    for hook, operation in (("network", "start"), ("qemu", "reconnect")):
        file = HOOKS / hook
        file.write_text(re.sub("(?m)^library=.*", "library=/gone", file.read_text()))
        done = run(file, "x", operation, "begin", "-", input="<domain/>", check=False)
        assert (done.returncode, done.stdout) == (0, "")
        assert "libvirt-natns is not installed" in done.stderr
    start_network(isolated("a", "virbr10"))
    assert "inet 10.0.0.1/24" in run("ip", "address", "show", "virbr10").stdout
    virsh("net-destroy", "a")


# -- a reboot ----------------------------------------------------------------


def power_off(world: World) -> None:
    """End what a reboot ends: libvirt, its networks, our namespaces and run-time files."""
    for side in (world.a, world.b):
        virsh("net-destroy", side.name)
        for pid in run("ip", "netns", "pids", side.namespace).stdout.split():
            # One may have been on its way out.
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for patch in ("private", "upstream"):
            run("ip", "link", "delete", side.port(patch))
        run("ip", "netns", "delete", side.namespace)
    Libvirtd().stop()
    run("rm", "-rf", "/run/libvirt-natns")


def start_side(side: Side) -> None:
    """Start a network again, with its guest."""
    virsh("net-start", side.name)
    run("ip", "link", "set", side.guest.port, "master", side.bridge)
    forward_at_once(side.bridge)


def after_a_reboot(world: World, command: Command) -> None:
    """Addresses are the same as before, in whatever order the networks start."""
    with without_hooks():
        power_off(world)
        with another_boot(1):
            Libvirtd().start()
            # Without us libvirt cannot have both.
            start_side(world.b)
            assert command("check").out == "b: is active in libvirt, but has no router\n"
            assert command("sync").status == 0
            start_side(world.a)
            assert command("sync").status == 0
            assert command("check") == Answer(0, "", "")
            addresses = {side["network"]: side["address"] for side in networks(command)}
            assert addresses == {"a": "192.168.0.100", "b": "192.168.0.101"}
            world.b.connect(world.provider)
        # The machine's real boot is yet another one; what runs, runs on.
        assert command("check").status == 1
        assert command("sync").status == 0
        assert command("check") == Answer(0, "", "")
        assert world.b.talks()
    assert {side["address"] for side in networks(command)} == {"192.168.0.100", "192.168.0.101"}


def test_after_a_reboot_without_hooks(command: Command) -> None:
    assert command("install").status == 0
    with two_networks("auto") as world:
        after_a_reboot(world, command)
        for side in (world.a, world.b):
            assert side.talks()
