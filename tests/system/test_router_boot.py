# SPDX-License-Identifier: LGPL-2.1-or-later
"""A boot with each file of a router missing, damaged or of another version, each step broken.

In each case the host ends with its network: as the router, or as it was.  The unit's own
commands are run, in its order: ExecStart, and ExecStopPost where that has failed.
"""

import json
import os
import shlex
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import lab_vps
import pytest
from lab import CHECKOUT, ECHO_PORT, INTERNET, PYTHON, run, wait_for, write_config
from lab_sides import Command, in_process
from lab_vps import (
    ADDRESS,
    ADDRESS6,
    CONFIG,
    GATEWAY,
    GATEWAY6,
    HOST_LINK,
    INTERNET6,
    MAC,
    NIC,
    ROUTER,
    Vps,
    greeting,
    provider,
)

from libvirt_natns import names
from libvirt_natns.cli import commands
from libvirt_natns.documents import config
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import boot_clock
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.upstream import routers
from libvirt_natns.upstream.router import boot, hardware, journal, nic_snapshot
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle

UNIT = CHECKOUT / "contrib" / "systemd" / "libvirt-natns-router@.service"
STATE = lab_vps.STATE
DATABASE = STATE.parent / "state.db"
EARLIER = "11111111-2222-3333-4444-555555555555"
RENAMED = "enp1s0"


@pytest.fixture(scope="module")
def world() -> Iterator[Vps]:
    with Vps() as made:
        yield made


@pytest.fixture
def vps(world: Vps, nothing_left: None) -> Iterator[Vps]:
    """A server with a router that was confirmed, and that is up."""
    write_config(CONFIG)
    assert commands.main(["router", "up"]) == 0
    yield world
    for link in (RENAMED, NIC):
        run("ip", "-n", ROUTER, "link", "set", link, "netns", "1", check=False)
    run("ip", "link", "del", HOST_LINK, check=False)
    run("ip", "netns", "del", ROUTER, check=False)
    run("ip", "link", "set", RENAMED, "down", check=False)
    run("ip", "link", "set", RENAMED, "name", NIC, check=False)
    unconfigure()
    shutil.rmtree(STATE.parent, ignore_errors=True)
    shutil.rmtree(names.RUN_DIRECTORY, ignore_errors=True)
    shutil.rmtree(names.CONFIG_FILE.parent, ignore_errors=True)
    world.configure()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process(capsys)


def file(kind: str) -> Path:
    return STATE / f"wan.{kind}"


def reboot(*, crash: bool = False) -> None:
    """The machine goes down, in an orderly way or not, and nobody configures its NIC."""
    record = json.loads(file("json").read_text())
    rules = file("rules").read_bytes()
    assert commands.main(["router", "down", "--force", "wan"]) == 0
    if crash:
        file("json").write_text(json.dumps(record | {"boot": EARLIER}))
        file("rules").write_bytes(rules)
    unconfigure()


def unconfigure() -> None:
    run("ip", "address", "flush", "dev", NIC)
    run("ip", "link", "set", NIC, "down")


def talks() -> bool:
    """Whether the host reaches the outside, and bears its own addresses there."""
    found = (greeting(INTERNET, ECHO_PORT), greeting(INTERNET6, ECHO_PORT))
    return found == (ADDRESS, ADDRESS6)


def is_router() -> bool:
    return "wan" in run("ip", "netns").stdout and not Path("/sys/class/net", NIC).exists()


def unit_lines(key: str) -> list[list[str]]:
    lines = [line for line in UNIT.read_text().splitlines() if line.startswith(f"{key}=")]
    values = (line.partition("=")[2].lstrip("-").replace("%i", "wan") for line in lines)
    return [shlex.split(value) for value in values]


def stop_post() -> None:
    """What systemd runs where the unit has failed."""
    for line in unit_lines("ExecStopPost"):
        run(*line, check=False)


# -- files -------------------------------------------------------------------


def remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(200))


def truncated(path: Path) -> None:
    content = path.read_bytes() if path.exists() else b'{"a'
    path.write_bytes(content[: len(content) // 2])


def directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def dangling(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("/nowhere/at/all")


def looping(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def other_type(path: Path) -> None:
    path.write_text("[1, 2, 3]")


def newer(path: Path) -> None:
    """Of a later version: fields that are not known here, and objects of a new form."""
    data = json.loads(path.read_text())
    data |= {"format": 7, "addresses": {"new": "form"}, "target": {"nic": NIC}}
    path.write_text(json.dumps(data))


def more_fields(path: Path) -> None:
    """Of a later version that has only added some."""
    data = json.loads(path.read_text())
    data |= {"since": 12345}
    data["target"]["quality"] = {"of": "service"}
    path.write_text(json.dumps(data))


DAMAGES = (remove, empty, garbage, truncated, directory, dangling, looping, other_type)
FILES = ("kept", "json", "rules", "restore")


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_each_file_of_the_router(
    vps: Vps, command: Command, damage: Callable[[Path], None]
) -> None:
    for kind in FILES:
        for crash in (False, True):
            what = f"{kind} {damage.__name__}, {'crash' if crash else 'shutdown'}"
            reboot(crash=crash)
            damage(file(kind))
            answer = command("router", "up", "--boot", "wan")
            if answer.status:
                stop_post()
            assert talks(), f"{what}: {answer.err}"
            # What was confirmed is all that is needed; the journal has it after a crash.
            assert is_router() == (kind != "kept" or crash), f"{what}: {answer.err}"
            if not is_router():
                shutil.rmtree(STATE)
                unconfigure()
                vps.configure()
                assert command("router", "up").status == 0, what


def test_files_of_a_later_version(vps: Vps, command: Command) -> None:
    reboot()
    more_fields(file("kept"))
    assert command("router", "up", "--boot", "wan").status == 0
    assert talks()
    assert is_router()
    reboot()
    newer(file("kept"))
    answer = command("router", "up", "--boot", "wan")
    assert answer.status == 1
    assert str(file("kept")) in answer.err
    assert file("kept.damaged").exists(), "a damaged file is kept"
    assert talks()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_all_files_but_the_script(
    vps: Vps, command: Command, damage: Callable[[Path], None]
) -> None:
    """The unit's ExecStopPost alone is left, and finds nothing more to do."""
    reboot(crash=True)
    for kind in ("kept", "json", "rules"):
        damage(file(kind))
    write_config("nonsense = [")
    assert command("router", "up", "--boot", "wan").status == 1
    assert talks()
    stop_post()
    assert talks()
    assert not is_router()


def newer_database(path: Path) -> None:
    with sqlite3.connect(path) as store:
        store.execute("PRAGMA user_version = 4000")
    store.close()


OTHERS = (*((each, DATABASE) for each in (*DAMAGES[1:], newer_database)),
          *((each, names.CONFIG_FILE) for each in DAMAGES))  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "path"),
    OTHERS,
    ids=lambda each: getattr(each, "__name__", getattr(each, "name", "")),
)
def test_configuration_and_database(
    vps: Vps, command: Command, damage: Callable[[Path], None], path: Path
) -> None:
    reboot()
    STATE.parent.mkdir(exist_ok=True)
    damage(path)
    answer = command("router", "up", "--boot", "wan")
    assert answer.status == 0, answer.err
    assert talks()
    assert is_router()
    assert command("router", "status", "wan").out
    assert command("router", "confirm", "wan").status == 0
    assert command("router", "down", "wan").status == 0, "no network uses it"
    assert talks()


def test_a_wrong_configuration(vps: Vps, command: Command) -> None:
    for text in ("typo = 1\n", '[upstreams.other]\nkind = "router"\n', CONFIG.replace(NIC, "nic9"),
                 "[upstreams.wan]\nkind = 'host'\n"):  # fmt: skip
        reboot()
        write_config(text)
        answer = command("router", "up", "--boot", "wan")
        assert answer.status == 0, answer.err
        assert talks(), text
        assert is_router()


# -- steps -------------------------------------------------------------------


def machine(kernel: Kernel, before: Callable[[str], None] | None = None) -> RouterLifecycle:
    return RouterLifecycle(config.load(), kernel, before=before)


def told_at_boot() -> list[str]:
    told: list[str] = []
    with Kernel() as kernel:
        boot.up(machine(kernel, told.append), "wan", lambda _: None)
    return told


def test_each_step_fails(vps: Vps) -> None:
    reboot()
    announced = told_at_boot()
    assert len(announced) > 10
    for number, what in enumerate(announced):
        reboot()
        left = number

        def fail(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise KernelError("no more of this")

        with Kernel() as kernel, pytest.raises(KernelError):
            try:
                boot.up(machine(kernel, fail), "wan", lambda _: None)
            except Exception as error:
                raise KernelError(str(error)) from error
        assert talks(), what
        unconfigure()
        told_at_boot()


def killed(act: Callable[[], object]) -> bool:
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_each_step_is_killed(vps: Vps, command: Command) -> None:
    """Out of memory, or TimeoutStartSec: the unit's script is all that runs after it."""
    reboot()
    for number, what in enumerate(told_at_boot()):
        reboot()
        left = number

        def kill(_: str) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def act() -> None:
            with Kernel() as kernel:
                boot.up(machine(kernel, kill), "wan", lambda _: None)

        assert killed(act), what
        stop_post()
        assert talks(), what
        # What comes next finds its way from there.
        assert command("router", "down", "--force", "wan").status == 0
        assert talks(), what
        unconfigure()
        told_at_boot()
        assert talks(), what


def test_without_python(vps: Vps) -> None:
    """ExecStart does not even start: 203/EXEC."""
    reboot()
    stop_post()
    assert talks()
    shown = run("ip", "address", "show", "dev", NIC).stdout
    stop_post()
    assert run("ip", "address", "show", "dev", NIC).stdout == shown


def test_without_python_while_the_router_is_up(vps: Vps, command: Command) -> None:
    """ExecStop fails: the router stands, and so it is left alone."""
    stop_post()
    assert is_router()
    assert talks()
    # One that has lost its way out does not stand.
    run("ip", "route", "del", "default", "dev", HOST_LINK)
    stop_post()
    assert not is_router()
    assert talks()


def test_the_script_restores_what_ip_can_say(vps: Vps, command: Command) -> None:
    assert command("router", "down").status == 0
    for line in (
        f"address add 198.51.100.11/24 dev {NIC}",
        f"address add 203.0.113.200/32 dev {NIC}",
        f"route add 192.0.2.0/24 via {GATEWAY} metric 70",
        f"route add default via {GATEWAY} table 100",
        f"rule add from {ADDRESS} lookup 100 priority 1000",
        f"rule add iif {NIC} lookup 100 priority 1001",
    ):
        run("ip", *line.split())
    try:
        before = shown()
        assert command("router", "up").status == 0
        reboot()
        for priority in ("1000", "1001"):
            run("ip", "rule", "del", "priority", priority)
        stop_post()
        assert shown() == before
    finally:
        for priority in ("1000", "1001"):
            run("ip", "rule", "del", "priority", priority, check=False)


def shown() -> dict[str, set[str]]:
    commands = {
        "addresses": ("-o", "address", "show", "dev", NIC, "scope", "global"),
        "routes": ("route", "show", "table", "all", "dev", NIC, "type", "unicast"),
        "rules": ("rule",),
        "routes6": ("-6", "route", "show", "dev", NIC),
    }
    found = {}
    for key, words in commands.items():
        lines = (" ".join(each.split()[1:] if key == "addresses" else each.split())
                 for each in run("ip", *words).stdout.splitlines())  # fmt: skip
        kept = {line.replace(" proto static", "").replace(" proto boot", "") for line in lines}
        found[key] = {line for line in kept if "fe80::/64" not in line}
    return found


# -- the NIC -----------------------------------------------------------------


def rename(old: str, new: str) -> None:
    run("ip", "link", "set", old, "down")
    run("ip", "link", "set", old, "name", new)


@pytest.mark.parametrize("failing", [False, True])
def test_another_name(vps: Vps, command: Command, failing: bool) -> None:
    reboot()
    rename(NIC, RENAMED)
    if failing:
        file("kept").write_text("nonsense")
    answer = command("router", "up", "--boot", "wan")
    assert talks()
    if failing:
        assert answer.status == 1
        assert ADDRESS in run("ip", "address", "show", RENAMED).stdout
    else:
        assert RENAMED in answer.out
        assert run("ip", "link", "show", RENAMED, namespace=ROUTER).stdout
        assert command("router", "down", "wan").status == 0
        assert talks()


def test_another_link_has_the_name(vps: Vps, command: Command) -> None:
    reboot()
    rename(NIC, RENAMED)
    run("ip", "link", "add", NIC, "type", "dummy" if has_dummy() else "bridge")
    try:
        assert command("router", "up", "--boot", "wan").status == 0
        assert talks()
        assert command("router", "down", "wan").status == 0
    finally:
        run("ip", "link", "del", NIC)


def has_dummy() -> bool:
    made = not run("ip", "link", "add", "natns-try", "type", "dummy", check=False).returncode
    run("ip", "link", "del", "natns-try", check=False)
    return made


@pytest.mark.parametrize("by_script", [False, True])
def test_a_late_nic(vps: Vps, command: Command, by_script: bool) -> None:
    """The driver takes its time, and udev has not renamed the NIC yet."""
    reboot()
    rename(NIC, RENAMED)
    run("ip", "link", "set", RENAMED, "netns", lab_vps.NAMESPACE)

    def appear() -> None:
        time.sleep(1.5)
        provider("ip", "link", "set", RENAMED, "netns", "1")

    late = threading.Thread(target=appear)
    late.start()
    try:
        if by_script:
            stop_post()
        else:
            assert command("router", "up", "--boot", "wan").status == 0
    finally:
        late.join()
    assert talks()


def test_no_nic_at_all(vps: Vps, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "DRIVER_LIMIT", 0.5)
    reboot()
    run("ip", "link", "set", NIC, "netns", lab_vps.NAMESPACE)
    file("restore").unlink()
    try:
        answer = command("router", "up", "--boot", "wan")
        assert answer.status == 1
        assert f"there is no NIC {NIC}, and none with the MAC address {MAC}" in answer.err
        assert answer.err.count("\n") == 1
    finally:
        provider("ip", "link", "set", NIC, "netns", "1")


def test_a_leased_address_does_not_end(vps: Vps, command: Command) -> None:
    """At a boot nobody renews it."""
    reboot()
    run("ip", "link", "set", NIC, "up")
    data = json.loads(file("kept").read_text())
    for each in data["addresses"]:
        each["valid"] = each["preferred"] = 600
    del data["target"]["transit"]
    file("kept").write_text(json.dumps(data))
    run("ip", "address", "flush", "dev", NIC, "scope", "global")
    kept = nic_snapshot.from_object(data)
    assert boot.configure_bare(kept) == NIC
    addresses = run("ip", "-o", "address", "show", NIC, "scope", "global").stdout
    assert ADDRESS in addresses
    assert "600sec" not in addresses
    run("ip", "address", "flush", "dev", NIC, "scope", "global")
    run("ip", "route", "add", "default", "via", GATEWAY6, "dev", NIC, check=False)


# -- while it is up ----------------------------------------------------------


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
@pytest.mark.parametrize("kinds", [("json",), ("json", "kept")], ids=lambda each: "+".join(each))
def test_down_without_the_journal(
    vps: Vps, command: Command, kinds: tuple[str, ...], damage: Callable[[Path], None]
) -> None:
    for kind in kinds:
        damage(file(kind))
    assert "damaged" in command("router", "status", "wan").out
    answer = command("router", "down", "wan")
    assert answer.status == 0, answer.err
    assert Path("/sys/class/net", NIC).exists()
    assert talks()


def test_up_without_the_journal(vps: Vps, command: Command) -> None:
    garbage(file("json"))
    answer = command("router", "up", "wan")
    assert answer.status == 0
    assert f"{file('json')} is damaged" in answer.out
    assert is_router()
    assert talks()
    assert "wan: up\n" in command("router", "status", "wan").out


# -- the deadline ------------------------------------------------------------


def unconfirmed(command: Command, seconds: str = "2s") -> None:
    assert command("router", "down").status == 0
    assert command("router", "up", "--confirm-within", seconds).status == 0
    assert is_router()


def is_back() -> bool:
    return Path("/sys/class/net", NIC).exists() and not file("json").exists()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda each: each.__name__)
def test_the_journal_is_damaged_at_the_deadline(
    vps: Vps, command: Command, damage: Callable[[Path], None]
) -> None:
    unconfirmed(command)
    damage(file("json"))
    wait_for(lambda: Path("/sys/class/net", NIC).exists(), timeout=30, what="the way back")
    wait_for(talks, what="the host's network")


def test_the_journal_is_away_at_the_deadline(vps: Vps, command: Command) -> None:
    unconfirmed(command, "8s")
    record = journal.load("wan")
    assert record is not None and record.deadline is not None
    away = file("json").rename(STATE / "away")
    directory(file("json"))
    # Later on, the timer takes the router back by the record that it remembers.
    time.sleep(record.deadline + 1 - boot_clock.now())
    file("json").rmdir()
    away.rename(file("json"))
    wait_for(is_back, timeout=30, what="the way back")
    assert talks()


def test_a_confirmed_one_stays_though_the_journal_was_away(vps: Vps, command: Command) -> None:
    unconfirmed(command, "4s")
    away = file("json").rename(STATE / "away")
    directory(file("json"))
    time.sleep(1)
    file("json").rmdir()
    away.rename(file("json"))
    assert command("router", "confirm", "wan").status == 0
    time.sleep(4)
    assert is_router()
    assert talks()


def test_the_unit_takes_back_whose_timer_was_killed(vps: Vps, command: Command) -> None:
    unconfirmed(command, "600s")
    for process in run("pgrep", "-f", "expire wan", check=False).stdout.split():
        os.kill(int(process), signal.SIGKILL)
    record = journal.load("wan")
    assert record is not None
    journal.advance(record, deadline=boot_clock.now() - 1)
    assert "rolled back" in command("router", "up", "--boot", "wan").out
    assert is_router(), "what was confirmed before comes up"
    assert talks()


def test_the_service_takes_back_whose_timer_was_killed(vps: Vps, command: Command) -> None:
    """By what the service calls every few seconds."""
    unconfirmed(command, "600s")
    for process in run("pgrep", "-f", "expire wan", check=False).stdout.split():
        os.kill(int(process), signal.SIGKILL)
    assert routers.expire_overdue() == [], "its time is not over"
    record = journal.load("wan")
    assert record is not None
    journal.advance(record, deadline=boot_clock.now() - 1)
    (line,) = routers.expire_overdue()
    assert line == "rolled back router wan, which was never confirmed"
    assert is_back()
    assert talks()
    assert routers.expire_overdue() == []


PROGRAM = f"PYTHONPATH={CHECKOUT} exec {PYTHON} -m libvirt_natns"


def test_the_unit_says_that(vps: Vps) -> None:
    """The very lines of the unit, in processes of their own."""
    reboot()
    (start,) = unit_lines("ExecStart")
    assert start[0] == "virt-natns"
    run("/bin/sh", "-c", f"{PROGRAM} {shlex.join(start[1:])}")
    assert is_router()
    (stop,) = unit_lines("ExecStop")
    run("/bin/sh", "-c", f"{PROGRAM} {shlex.join(stop[1:])}")
    stop_post()
    assert not is_router()
    assert talks()
