# SPDX-License-Identifier: LGPL-2.1-or-later
"""A router that cannot be taken back concerns neither networks nor other routers."""

import argparse
import io
import struct
import sys
from contextlib import nullcontext
from socket import AF_INET
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns.cli import router
from libvirt_natns.errors import RouterError
from libvirt_natns.kernel import netlink
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.daemon import Service
from libvirt_natns.service.log import Log
from libvirt_natns.service.looks import ROUTERS
from libvirt_natns.upstream import routers
from libvirt_natns.upstream.router import boot, health, journal, recover, restore_script
from libvirt_natns.upstream.router.lifecycle import RouterLifecycle
from libvirt_natns.upstream.router.nic_rules import NicRule


def test_the_service_complains_once_and_suspects_no_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> list[str]:
        raise next(errors)

    errors = iter(
        [RouterError("router wan: busy"), RouterError("router wan: busy"), KeyError("bug")]
    )
    log = io.StringIO()
    service = Service(Log(log))
    again: list[float] = []
    monkeypatch.setattr(routers, "expire_overdue", fail)
    monkeypatch.setattr(service.background, "after", lambda limit, _: again.append(limit))
    monkeypatch.setattr(service, "suspect_all", lambda: pytest.fail("a network is suspected"))
    for _ in range(3):
        service.looks.expire_routers()
    assert log.getvalue().count("router wan: busy") == 1
    assert "KeyError" in log.getvalue()
    assert again == [ROUTERS] * 3


def test_another_router_does_not_stop_a_boot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> list[str]:
        raise OSError("no space left on device")

    opened = SimpleNamespace(expire_overdue=fail, reattach=lambda _: [], config=Config(), faults=())
    monkeypatch.setattr(journal, "known_names", lambda: ["lan"])
    monkeypatch.setattr(recover, "is_confirmed", lambda _: True)
    monkeypatch.setattr(health, "unapplied", lambda *_: [])
    monkeypatch.setattr(boot, "up", lambda *_: ["router lan is up"])
    parser = argparse.ArgumentParser()
    router.add_parser(parser, lambda: nullcontext(cast("RouterLifecycle", opened)))
    options = parser.parse_args(["up", "lan", "--boot"])
    assert options.command(options) == 0
    said = capsys.readouterr()
    assert said.out == "router lan is up\n"
    assert "cannot roll back a router that was not confirmed in time: no space" in said.err


def test_inverted_rules_are_known_in_any_byte_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    head = bytes([AF_INET, 0, 0, 0, netlink.RT_TABLE_MAIN, 0, 0, netlink.FR_ACT_TO_TBL])
    for flags, shown in ((0, True), (netlink.FIB_RULE_INVERT, False)):
        rule = NicRule((head + struct.pack(">I", flags)).hex())
        assert bool(restore_script.rule_words(rule, "eth0")) == shown
