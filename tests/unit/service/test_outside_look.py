# SPDX-License-Identifier: LGPL-2.1-or-later
"""The look outside for guests' addresses: an error of one network concerns no other."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from libvirt_natns import names
from libvirt_natns.engine.engine import Engine
from libvirt_natns.engine.proxied_addresses import Asked
from libvirt_natns.errors import KernelError
from libvirt_natns.model.configuration import Config
from libvirt_natns.service.log import Log
from libvirt_natns.service.outside_look import OutsideLook


class Networks:
    """Networks with an ndppd; those in ``broken`` cannot be looked at."""

    def __init__(self) -> None:
        self.looked: list[str] = []
        self.broken: dict[str, Exception] = {}
        self.reported: list[tuple[str, str | None]] = []
        self.suspected: list[str] = []
        self.log = io.StringIO()
        self.outside = OutsideLook(self, Log(self.log), self._report, self.suspected.append)
        self.store = SimpleNamespace(networks=self)

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        yield cast("Engine", self)

    def get(self, uuid: str) -> SimpleNamespace:
        return SimpleNamespace(name=f"name-{uuid}")

    def look_elsewhere(self, uuid: str, asked: Asked) -> list[str]:
        self.looked.append(uuid)
        if uuid in self.broken:
            raise self.broken[uuid]
        return ["2001:db8::77 is outside"] if uuid == "c" else []

    def _report(self, error: Exception, when: str, network: str | None = None) -> None:
        self.reported.append((str(error), network))


@pytest.fixture
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Networks:
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "config.toml")
    for uuid in "abc":
        (tmp_path / "networks" / uuid).mkdir(parents=True)
        (tmp_path / "networks" / uuid / "ndppd.conf").touch()
    return Networks()


@pytest.mark.parametrize("error", [KernelError("no namespace nat-a"), OSError("x"), KeyError("x")])
def test_an_error_of_one_network_keeps_no_other_from_its_look(
    error: Exception, networks: Networks
) -> None:
    networks.broken["a"] = error
    assert networks.outside.look()
    assert networks.looked == ["a", "b", "c"]
    assert networks.log.getvalue().count("event=claimed network=name-c") == 1
    assert networks.reported == [(str(error), "a")]
    assert networks.suspected == ["a"]


def test_an_error_that_stays_is_told_once(networks: Networks) -> None:
    networks.broken["a"] = KernelError("no namespace nat-a")
    for _ in range(3):
        assert networks.outside.look()
    assert networks.suspected == ["a"]
    assert len(networks.reported) == 1
    del networks.broken["a"]
    networks.outside.look()
    networks.broken["a"] = KernelError("no namespace nat-a")
    networks.outside.look()
    assert len(networks.reported) == 2


def test_a_broken_configuration_is_told_once_and_suspects_no_network(networks: Networks) -> None:
    names.CONFIG_FILE.write_text("upstream = [\n")
    for _ in range(3):
        assert networks.outside.look()
    assert not networks.looked
    assert not networks.suspected
    assert len(networks.reported) == 1
    names.CONFIG_FILE.unlink()
    networks.outside.look()
    assert networks.looked == ["a", "b", "c"]


def test_the_look_ends_with_the_last_network(networks: Networks, tmp_path: Path) -> None:
    for file in tmp_path.glob("networks/*/ndppd.conf"):
        file.unlink()
    assert not networks.outside.look()
