# SPDX-License-Identifier: LGPL-2.1-or-later
"""Notes of refused starts: who gets one, who loses it, and what is read of it."""

from ipaddress import IPv4Interface
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.engine import late_starts, start
from libvirt_natns.engine.context import Context
from libvirt_natns.errors import ConflictError, DocumentError, NatnsError, UpstreamError
from libvirt_natns.kernel import locks
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.network import Network
from libvirt_natns.model.subnet import Subnet

UUID = "6b8f0e52-9a44-4c0f-8f3e-0a6d5b7c9d11"
NETWORK = Network(UUID, "a", "virbr10", subnets=(Subnet(IPv4Interface("10.0.0.1/24")),))
XML = (
    f"<hookData><network><name>a</name><uuid>{UUID}</uuid><bridge name='virbr10'/>"
    "<ip address='10.0.0.1' netmask='255.255.255.0'/></network></hookData>"
).encode()


@pytest.fixture
def autostart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """libvirt's link of a network with autostart."""
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    monkeypatch.setattr(late_starts, "AUTOSTART", tmp_path)
    link = tmp_path / "a.xml"
    link.symlink_to("nowhere")
    return link


def context(fault: str = "", kind: type[NatnsError] = UpstreamError) -> Context:
    """A context in which only the upstream counts."""

    def segment(network: Network) -> None:
        assert network.uuid == UUID
        raise kind(fault, "")

    found = SimpleNamespace(config=Config(), planner=SimpleNamespace(segment=segment))
    return cast("Context", found)


def test_a_refused_start_is_noted_until_the_next(autostart: Path) -> None:
    late_starts.note(NETWORK, XML)
    assert late_starts.noted() == [UUID]
    (late,) = late_starts.waiting(context("br0 does not exist"))
    assert (late.uuid, late.name, late.fault) == (UUID, "a", "br0 does not exist")
    late_starts.forget(UUID)
    late_starts.forget(UUID)
    assert late_starts.noted() == []
    assert not (names.RUN_DIRECTORY / "late").exists()


@pytest.mark.parametrize(("kind", "left"), [(UpstreamError, [UUID]), (DocumentError, [])])
def test_a_start_that_is_refused_again(
    kind: type[NatnsError], left: list[str], autostart: Path
) -> None:
    """The service would have libvirt try a start again and again that no upstream can help."""
    late_starts.note(NETWORK, XML)
    with pytest.raises(kind):
        start.prepare(context("refused", kind), NETWORK, XML)
    assert late_starts.noted() == left


def test_only_networks_with_autostart_wait(autostart: Path) -> None:
    late_starts.note(NETWORK, XML)
    autostart.unlink()
    assert list(late_starts.waiting(context())) == []
    late_starts.forget(UUID)
    late_starts.note(NETWORK, XML)
    assert late_starts.noted() == []


def test_a_note_that_cannot_be_read_starts_nothing(autostart: Path) -> None:
    late_starts.note(NETWORK, b"<hookData><network>")
    assert late_starts.noted() == [UUID]
    assert list(late_starts.waiting(context())) == []


def test_half_a_note_is_none(autostart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halfway: list[str] = []

    def write(file: Path, xml: bytes) -> int:
        with file.open("wb") as opened:
            halfway.extend(late_starts.noted())
            return opened.write(xml)

    monkeypatch.setattr(Path, "write_bytes", write)
    late_starts.note(NETWORK, XML)
    assert halfway == []
    assert late_starts.noted() == [UUID]


def test_the_last_other_note_goes_at_the_same_moment(
    autostart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = ["another network"]
    make = locks.make_directory

    def make_for_a_moment(directory: Path) -> None:
        make(directory)
        if others:
            others.pop()
            directory.rmdir()

    monkeypatch.setattr(late_starts, "make_directory", make_for_a_moment)
    late_starts.note(NETWORK, XML)
    assert late_starts.noted() == [UUID]


def test_a_start_that_is_refused_for_another_reason_is_not_tried_again(
    autostart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt would be asked every second, for ever."""
    late_starts.note(NETWORK, XML)
    refusal = ConflictError("network a: dnsmasq refuses its configuration")

    def check(*_: object) -> None:
        raise refusal

    monkeypatch.setattr(start, "check", check)
    planner = SimpleNamespace(segment=lambda _: None)
    with pytest.raises(ConflictError):
        start.prepare(cast("Context", SimpleNamespace(planner=planner)), NETWORK, XML)
    assert late_starts.noted() == []
