# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bug report of a real host, with each part broken in turn, and with planted secrets."""

import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from lab import Libvirtd, Provider, Service, isolated, natns, run
from lab_domains import (
    STATE,
    create,
    destroy,
    domain,
    nat,
    networks,
    nic,
    ports,
    provider_world,
    settle,
)

REAL_INTERPRETER = True
WEB = "52:54:00:00:00:05"
PUBLIC, VENDOR = "8.8.4.77", "3c:ec:ef:12:34:56"
SECRET = "PLANTED"
"""Part of each planted secret."""

HOOK = Path("/etc/libvirt/hooks/network.d/another")
CONFIG = Path("/etc/libvirt-natns/config.toml")

FOREIGN = f'<lab:key xmlns:lab="urn:lab" token="{SECRET}">{SECRET}</lab:key>'
SECRETIVE = (
    f"<graphics type='vnc' listen='127.0.0.1' passwd='{SECRET}'/>"
    f"<serial type='file'><source path='/run/tmp/{SECRET}'/></serial>"
)

HEADINGS = (
    "versions", "configuration", "virt-natns status", "virt-natns check", "virt-natns doctor",
    "virt-natns forward list", "virt-natns router status", "hooks", "service", "processes", "log",
    "networks of libvirt", "guests of libvirt", "rules of the host", "links of the host", "state",
    "AppArmor and SELinux", "plan of lab", "namespace nat-lab",
)  # fmt: skip


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Provider]:
    lab = isolated("lab", "virbr10", metadata=nat("") + FOREIGN, more="")
    with provider_world() as provider, networks(lab), ExitStack() as cleanup:
        cleanup.callback(destroy, "web")
        web = domain("web", nic("lab", WEB), metadata=nat(ports("start='80'")) + FOREIGN)
        create(web.replace("</devices>", f"{SECRETIVE}</devices>"))
        settle("virbr10")
        HOOK.parent.mkdir(exist_ok=True)
        HOOK.write_text(f"#!/bin/sh\n# token={SECRET}\nexit 0\n")
        HOOK.chmod(0o755)
        cleanup.callback(HOOK.unlink)
        comment = f'comment "{SECRET}"'
        run("nft", "add table ip mine; add chain ip mine unseen")
        run("nft", f"add set ip mine {SECRET} {{ type ipv4_addr; }}")
        run("nft", f"add rule ip mine unseen ip daddr {PUBLIC} drop {comment}")
        run("nft", "add chain ip mine seen { type filter hook forward priority 20; }")
        run("nft", f"add rule ip mine seen ip daddr {PUBLIC} counter {comment}")
        cleanup.callback(run, "nft", "delete table ip mine")
        run("ip", "link", "add", "public0", "address", VENDOR, "type", "bridge")
        run("ip", "address", "add", f"{PUBLIC}/24", "dev", "public0")
        cleanup.callback(run, "ip", "link", "delete", "public0")
        text = CONFIG.read_text()
        CONFIG.write_text(f"# the switch's password is {SECRET}\n{text}")
        yield provider


def reported(*arguments: str) -> dict[str, str]:
    """The parts of a report by their headings; in any report there is no secret."""
    __tracebackhide__ = True
    file = Path("/run/tmp/report.txt")
    file.unlink(missing_ok=True)
    done = natns("report", *arguments, os.fspath(file), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{file}\n", "")
    status = file.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, 0)
    text = file.read_text()
    for secret in (SECRET, PUBLIC, VENDOR, "Traceback"):
        assert secret not in text, text[max(0, text.index(secret) - 300) :][:500]
    head, *parts = text.split("\n== ")
    assert "Masked in all parts" in head
    return dict(part.split("\n", 1) for part in parts)


def test_a_report_has_all_that_is_needed(world: Provider) -> None:
    parts = reported()
    assert tuple(parts) == HEADINGS
    for heading, words in {
        "versions": ("libvirt-natns ", "kernel Linux", "PRETTY_NAME=", "lxml ", "Dnsmasq version"),
        "configuration": ('kind = "bridge"', "[upstreams.provider]"),
        "virt-natns status": ("lab ", "nat-lab", "service: not running"),
        "virt-natns doctor": ("ok      state database: ", "ok      hooks: "),
        "virt-natns forward list": ("web ", "tcp "),
        "hooks": (f"{HOOK} (another's)", "/etc/libvirt/hooks/network (ours)"),
        "processes": ("/usr/sbin/dnsmasq --conf-file=/run/libvirt-natns/networks/",),
        "networks of libvirt": ("lab: active", "<natns:nat/>", '<ip address="10.0.0.1"'),
        "guests of libvirt": ("<name>web</name>", "<natns:portForward", '<source network="lab"'),
        "rules of the host": (
            "table inet natns {", "chain seen {", "ip daddr public1.77 counter comment (left out)",
        ),
        "links of the host": ("3c:ec:ef:nic1", "public1.77/24"),
        "state": (f"{STATE}/state.db", "/run/libvirt-natns/networks/"),
        "plan of lab": ("namespace nat-lab", "address 192.168.0.100/24 on upstream in nat-lab"),
        "namespace nat-lab": ("virbr10@", "default via 192.168.0.1", "table inet natns {"),
    }.items():  # fmt: skip
        for word in words:
            assert word in parts[heading], (heading, word, parts[heading])
    assert "chain unseen" not in parts["rules of the host"]
    assert not any("failed" in part for part in parts.values())


def test_a_report_about_one_network(world: Provider) -> None:
    parts = reported("--network", "lab")
    assert "namespace nat-lab" in parts
    parts = reported("--network", "no-such")
    assert "no network no-such" in parts["plan of no-such"]
    assert "No such file" in parts["namespace nat-no-such"]


# -- broken states -----------------------------------------------------------


@contextmanager
def damaged_database() -> Iterator[None]:
    files = {file: file.read_bytes() for file in STATE.glob("state.db*")}
    for file in files:
        file.unlink()
    (STATE / "state.db").write_bytes(b"SQLite format 3\0" + SECRET.encode() * 1000)
    try:
        yield
    finally:
        (STATE / "state.db").unlink()
        for file, octets in files.items():
            file.write_bytes(octets)


@contextmanager
def broken_configuration() -> Iterator[None]:
    kept = CONFIG.read_text()
    CONFIG.write_text(f'scope = "isolated\napi_token = "{SECRET}"\n# {SECRET}\n')
    try:
        yield
    finally:
        CONFIG.write_text(kept)


@contextmanager
def stuck_service() -> Iterator[None]:
    with Service() as service:
        service.signal(signal.SIGSTOP)
        yield


@contextmanager
def stuck_libvirt() -> Iterator[None]:
    pid = Libvirtd().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def no_namespace() -> Iterator[None]:
    run("ip", "netns", "delete", "nat-lab")
    try:
        yield
    finally:
        natns("sync")


BROKEN = {
    "database": (damaged_database, "virt-natns status", "state.db"),
    "configuration": (broken_configuration, "virt-natns status", "config.toml"),
    "service": (stuck_service, "virt-natns status", "does not answer"),
    "libvirt": (stuck_libvirt, "networks of libvirt", "(ended: it took too long)"),
    "namespace": (no_namespace, "virt-natns check", "namespace nat-lab is missing"),
}


@pytest.mark.parametrize("state", BROKEN)
def test_a_report_works_where_things_are_broken(world: Provider, state: str) -> None:
    broken, heading, words = BROKEN[state]
    with broken():
        parts = reported()
    assert words in parts[heading], parts[heading]
    # All else is there.
    assert set(HEADINGS[:17]) <= set(parts)
    assert "table inet natns {" in parts["rules of the host"]
    assert "Dnsmasq version" in parts["versions"]
    if state not in ("libvirt",):
        assert "<name>lab</name>" in parts["networks of libvirt"]
    if state != "namespace":
        assert "default via 192.168.0.1" in parts["namespace nat-lab"]


def test_a_socket_that_nobody_serves(world: Provider) -> None:
    """Another process has the service's socket, and never answers."""
    place = Path("/run/libvirt-natns/service.sock")
    place.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(place))
        listener.listen()
        try:
            assert "does not answer" in reported()["virt-natns status"]
        finally:
            place.unlink()
