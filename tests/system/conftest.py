# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures of the system tests: a real libvirtd in the sandbox, and no leftovers.

Run by tests/run, or by hand:
    contrib/sandbox /usr/bin/python3 -m pytest tests/system -k WHAT
"""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
sys.path.append(os.fspath(CHECKOUT))

# A plugin of several files, which they import as well.
pytest.register_assert_rewrite("lab_bench")

import lab  # noqa: E402 - needs the checkout on the path
import lab_base  # noqa: E402
import lab_interpreter  # noqa: E402
import lab_service  # noqa: E402
import lab_virsh  # noqa: E402


def pytest_sessionstart() -> None:
    """Refuse to run on the machine itself."""
    try:
        lab.require_sandbox()
    except lab.LabError as error:
        raise pytest.UsageError(str(error)) from error


@pytest.fixture(scope="session", autouse=True)
def libvirtd() -> Iterator[lab.Libvirtd]:
    """The sandbox's libvirtd, started once."""
    lab_base.virsh_library = lab_virsh.run
    daemon = lab.Libvirtd()
    daemon.start()
    daemon.prime()
    yield daemon
    lab.clear()


@pytest.fixture(scope="session", autouse=True)
def interpreter(request: pytest.FixtureRequest, libvirtd: lab.Libvirtd) -> Iterator[None]:
    """The command server, and hooks whose interpreter is a fork of it.

    ``REAL_INTERPRETER = True`` in a file has each event start an interpreter instead.
    """
    server = lab_base.start_command_server()
    modules = {getattr(item, "module", None) for item in request.session.items}
    if any(getattr(module, "REAL_INTERPRETER", False) for module in modules):
        yield
    else:
        with lab_interpreter.loaded(server):
            yield
    lab.clear()
    lab_base.end_command_server()


@pytest.fixture(autouse=True)
def nothing_left(libvirtd: lab.Libvirtd) -> Iterator[None]:
    """Destroy what the test defined, then compare the host with what it was."""
    kept = lab.objects()
    before = lab.snapshot()
    yield
    libvirtd.start()  # a test may have stopped it
    lab.clear(kept)
    left = lab.remaining(before)
    if left:
        pytest.fail(f"left behind:\n{left}", pytrace=False)


@pytest.fixture
def provider(nothing_left: None) -> Iterator[lab.Provider]:
    """The provider network on br0, with the host's address 192.168.0.2."""
    with lab.Provider() as world:
        yield world


@pytest.fixture(params=["nftables", "iptables"])
def backend(request: pytest.FixtureRequest, provider: lab.Provider) -> Iterator[str]:
    """Run the test once a firewall backend, on the provider's bridge as upstream.

    Writes ``provider.config(firewall=...)``; a test that needs another one writes
    it itself, with this fixture's value as its ``firewall``.
    """
    name = str(request.param)
    lab.write_config(provider.config(firewall=name))
    yield name
    lab.remove_config()


@pytest.fixture
def served(request: pytest.FixtureRequest) -> bool:
    """Whether the service runs: beside one backend, as it knows no difference of theirs."""
    return "nftables" in request.node.callspec.params.values()


@pytest.fixture(scope="session")
def installed(interpreter: None) -> Iterator[None]:
    """libvirt-natns' hooks, installed from the checkout for the whole session."""
    lab.install_natns()
    yield
    lab.clear()
    lab.uninstall_natns()


@pytest.fixture
def service(installed: None, provider: lab.Provider) -> Iterator[lab.Service]:
    """The resident service, over the provider's bridge as the default upstream."""
    lab.write_config(provider.config())
    with lab.Service() as resident:
        yield resident
    lab.remove_config()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, None, None]:
    """Add the end of libvirtd's log to the report of a failed test."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        report.sections.append(("libvirtd.log", lab.Libvirtd().log()[-4000:]))
        report.sections.append(("service.log", lab_service.services_log()[-4000:]))
