# SPDX-License-Identifier: LGPL-2.1-or-later
"""A resident process builds ahead of `started`; failures on the way leave nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from lab import (
    run,
    snapshot,
)
from lab_bench import (
    DNSMASQ,
    Bench,
    FailAt,
    InjectedError,
    covered,
    settles_as,
)

from libvirt_natns.daemons import dnsmasq, dnsmasq_files
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import DnsmasqError, NatnsError
from libvirt_natns.operations.addressing import Withdrawal
from libvirt_natns.operations.daemon_operations import Dnsmasq, IdleDnsmasq
from libvirt_natns.operations.link_operations import LinkUp, Port

pytest_plugins = ("lab_bench",)


@pytest.mark.parametrize("setting", ["nftables", "host upstream"], indirect=True)
def test_started_joins_what_was_built(ahead: Bench) -> None:
    before = snapshot()
    network = libvirt_xml.parse_network(ahead.xml)
    noted = FailAt()
    with ahead.engine(noted) as verbs:
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        assert any(isinstance(step, LinkUp) for step in noted.steps)
        noted.steps.clear()
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        kinds = {type(step) for step in noted.steps} - {str}
        assert kinds <= {Port, Withdrawal, Dnsmasq, IdleDnsmasq}
        assert (Dnsmasq in kinds) == network.taken_over
        # Twice is once.
        assert not verbs.build(network, ahead.xml)
        assert verbs.up(network, ahead.xml) == []
        assert ahead.differences() == []
    assert dnsmasq.running(ahead.uuid, "nat-bench")
    ahead.stop()
    settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_a_bridge_of_another_mtu_than_expected(ahead: Bench) -> None:
    network = libvirt_xml.parse_network(ahead.xml)
    with ahead.engine() as verbs:
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        ahead.make_bridge()
        run("ip", "link", "set", "virbr10", "mtu", "9000")
        verbs.up(network, ahead.xml)
    for command in (["ip", "-n", "nat-bench"], ["ip"]):
        assert "mtu 9000" in run(*command, "link", "show", "type", "veth").stdout
    assert "option:mtu,1500" in dnsmasq_files.present(ahead.uuid).configuration
    assert ahead.differences() == []
    ahead.stop()


@pytest.mark.parametrize("setting", ["nftables", "host upstream"], indirect=True)
def test_a_start_that_libvirt_gave_up(ahead: Bench) -> None:
    """Nothing stays of what was built, unless something else has come of it."""
    before = snapshot()
    network = libvirt_xml.parse_network(ahead.xml)
    with ahead.engine() as verbs:
        verbs.prepare(network, ahead.xml)
        assert verbs.build(network, ahead.xml)
        first = verbs.store.networks.get(ahead.uuid)
        # The next start finds what the first has left.
        verbs.prepare(network, ahead.xml)
        assert verbs.build(network, ahead.xml)
        second = verbs.store.networks.get(ahead.uuid)
        assert first is not None
        assert second is not None
        assert not verbs.give_up(first)
        assert verbs.give_up(second)
        assert not verbs.give_up(second)
        settles_as(before)
        # A libvirt that is only slow gets its router all the same.
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        assert not verbs.give_up(second)
        assert ahead.differences() == []
    ahead.stop()
    settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
def test_whatever_fails_while_building_is_made_when_started(ahead: Bench) -> None:
    network = libvirt_xml.parse_network(ahead.xml)
    before = snapshot()
    rehearsal = FailAt()
    with ahead.engine(rehearsal) as verbs:
        verbs.prepare(network, ahead.xml)
        first = len(rehearsal.steps)
        verbs.build(network, ahead.xml)
        built = len(rehearsal.steps)
        ahead.make_bridge()
        verbs.up(network, ahead.xml)
        last = len(rehearsal.steps)
    ahead.stop()
    settles_as(before)
    assert built - first > 10
    for index in range(first, last):
        failing = FailAt(index)
        with ahead.engine(failing) as verbs:
            verbs.prepare(network, ahead.xml)
            if index < built:
                with pytest.raises(InjectedError):
                    verbs.build(network, ahead.xml)
                assert "nat-bench" not in run("ip", "netns", "list").stdout
                links = run("ip", "-br", "link").stdout
                assert "natin-" not in links and "natup-" not in links
                ahead.make_bridge()
                verbs.up(network, ahead.xml)
                assert ahead.differences() == []
            else:
                verbs.build(network, ahead.xml)
                ahead.make_bridge()
                with pytest.raises(InjectedError):
                    verbs.up(network, ahead.xml)
        ahead.stop()
        settles_as(before)


@pytest.mark.parametrize("setting", ["nftables"], indirect=True)
@pytest.mark.parametrize("ahead", ["address in the metadata"], indirect=True)
def test_dnsmasq_that_gives_up_while_nobody_looks(ahead: Bench) -> None:
    """`started` tells of it.  Where libvirt's own has read the same, it would not be up."""
    network = libvirt_xml.parse_network(ahead.xml)
    before = snapshot()
    refusing = Path("/run/tmp/refusing")
    # Its configuration is right; it fails as it starts.
    refusing.write_text(
        '#!/bin/sh\ncase $1 in --test) exit 0 ;; esac\necho "out of luck" >&2\nexit 3\n'
    )
    refusing.chmod(0o755)
    told: list[str] = []
    with covered(DNSMASQ, refusing), ahead.engine() as verbs:

        def later(work: Callable[[], None]) -> None:
            try:
                work()
            except NatnsError as error:
                told.append(str(error))

        verbs = replace(verbs, later=later)
        verbs.prepare(network, ahead.xml)
        verbs.build(network, ahead.xml)
        assert told == ["dnsmasq refuses to start in nat-bench: out of luck"]
        ahead.make_bridge()
        with pytest.raises(DnsmasqError, match="refuses to start in nat-bench"):
            verbs.up(network, ahead.xml)
    refusing.unlink()
    ahead.stop()
    settles_as(before)


@pytest.mark.parametrize("setting", ["host upstream"], indirect=True)
def test_the_networks_row_is_read_once_in_each_verb(ahead: Bench) -> None:
    """Over a real start, with all that reads the row on the way: firewall, host, dnsmasq."""
    network = libvirt_xml.parse_network(ahead.xml)
    asked = f"FROM network WHERE uuid = '{ahead.uuid}'"
    read: list[str] = []

    def note(statement: str) -> None:
        if statement.startswith("SELECT") and asked in statement:
            read.append(statement)

    with ahead.engine() as verbs:
        verbs.store._database._db.set_trace_callback(note)
        for verb in (verbs.prepare, verbs.build, verbs.up):
            if verb == verbs.up:
                ahead.make_bridge()
            read.clear()
            assert verb(network, ahead.xml) != []
            assert len(read) == 1, (verb, read)
        read.clear()
        assert verbs.up(network, ahead.xml) == []
        assert len(read) == 1, read
    assert ahead.differences() == []
    ahead.stop()
