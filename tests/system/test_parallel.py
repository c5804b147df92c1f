# SPDX-License-Identifier: LGPL-2.1-or-later
"""Many networks that start and stop at the same moment, all with the same subnet."""

import os
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab import (
    INTERNET,
    FastGuest,
    Libvirtd,
    Provider,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    snapshot,
    spawn,
    virsh,
    wait_for,
    write_config,
)
from views import (
    addresses,
    at_once,
    define_all,
    namespaces,
    refusal,
    routes,
    settled,
    upstream_address,
)

MANY = 50
AT_A_TIME = 20
MAC = "52:54:00:00:00:05"
GUEST = "10.0.0.5"
STORM = {"a": "virbr10", "b": "virbr11", "c": "virbr12"}
ROUNDS = 2
HOOK = "/etc/libvirt/hooks/network"

pytestmark = pytest.mark.usefixtures("upstream")


@pytest.fixture
def upstream(installed: None, provider: Provider) -> Iterator[Provider]:
    """The provider's bridge is the default upstream."""
    write_config(provider.config(pool=f"192.168.0.100-192.168.0.{99 + MANY}"))
    yield provider
    remove_config()


# -- fifty, twenty at a time ----------------------------------------------------


def uuid_of(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def all_at_once(action: str) -> None:
    """Do something with all fifty, from twenty virsh processes.

    By uuid: libvirt looks for a name by locking one network after the other, and
    so waits for those that are being started.
    """
    lines = [f"{action} {uuid_of(number)}" for number in range(MANY)]
    at_once(*("; ".join(lines[first::AT_A_TIME]) for first in range(AT_A_TIME)))


def answering(provider: Provider, wanted: Iterable[str]) -> set[str]:
    """Which addresses answer the provider's router's ping."""
    script = 'for a; do (busybox ping -c 1 -W 2 "$a" >/dev/null && echo "$a") & done; wait'
    return set(provider.router.run("sh", "-c", script, "sh", *wanted).stdout.split())


def check_guest(bridge: str, seen: str) -> None:
    with FastGuest(bridge, MAC) as guest:
        guest.static(f"{GUEST}/24", "10.0.0.1")
        assert guest.curl(f"http://{INTERNET}/").partition(":")[0] == seen


def test_fifty_networks_with_one_subnet(upstream: Provider) -> None:
    """All addresses of the pool; one more network is refused."""
    define_all(
        isolated(f"net{number}", f"virbr{100 + number}", uuid=uuid_of(number), domain=None)
        for number in range(MANY)
    )
    before = settled()
    all_at_once("net-start")
    assert namespaces() == {f"nat-net{number}" for number in range(MANY)}
    leased = [upstream_address(f"net{number}") for number in range(MANY)]
    assert len(set(leased)) == MANY, sorted(leased)
    assert natns("check").stdout == ""
    wait_for(lambda: answering(upstream, leased) == set(leased), what="an answer of each")
    for number in (0, MANY // 2, MANY - 1):
        check_guest(f"virbr{100 + number}", leased[number])
    assert not [subnet for subnet in routes() if subnet.startswith("10.")]
    define_network(isolated("more", "virbr300"))
    assert "no address of upstream provider is free" in refusal("more")
    virsh("net-undefine", "more")
    all_at_once("net-destroy")
    wait_for(lambda: before.diff(snapshot()) == "", interval=0.1, what="the host as it was")
    virsh("; ".join(f"net-undefine {uuid_of(number)}" for number in range(MANY)))


# -- again and again -------------------------------------------------------------


def test_storm() -> None:
    """Each network starts and stops again and again while others do."""
    for name, bridge in STORM.items():
        define_network(isolated(name, bridge))

    def storm(name: str) -> set[str]:
        seen = set()
        for _ in range(ROUNDS):
            virsh("net-start", name)
            seen.add(upstream_address(name))
            assert addresses(STORM[name]) == []
            virsh("net-destroy", name)
        virsh("net-start", name)
        return seen | {upstream_address(name)}

    with ThreadPoolExecutor() as threads:
        leased = list(threads.map(storm, STORM))
    assert [len(each) for each in leased] == [1, 1, 1], "an address changed"
    assert len(set.union(*leased)) == len(STORM)
    assert natns("check").stdout == ""


# -- one that never comes ---------------------------------------------------------


def test_a_start_that_died_holds_others_up_for_a_while_only(libvirtd: Libvirtd) -> None:
    """libvirt tells nobody that a start has failed after its hook."""
    define_network(isolated("dead", "virbr10"))
    # As long as it has a bridge, it may be a slow one.
    run("ip", "link", "add", "virbr10", "type", "bridge")
    die_after_start("dead")
    define_network(isolated("same", "virbr11"))
    other = uuid_of(1)  # a name would be looked for behind the lock of the other
    define_network(isolated("other", "virbr12", address="10.7.0.1", uuid=other))
    waiting = spawn("virsh", "-q", "net-start", "same")
    wait_for(lambda: calls_of_hook(libvirtd, "same"), what="its start")
    virsh("net-start", other)
    assert waiting.poll() is None, "it did not wait, or other subnets wait, too"
    run("ip", "link", "delete", "virbr10")
    output, error = waiting.communicate(timeout=60)
    assert waiting.returncode == 0, output + error
    virsh("net-start", "dead")
    assert namespaces() == {"nat-dead", "nat-same", "nat-other"}
    assert natns("check").stdout == ""


def calls_of_hook(libvirtd: Libvirtd, name: str) -> int:
    return libvirtd.log().count(f"Calling hook {HOOK} id={name} op=start ")


def die_after_start(name: str) -> None:
    """Answer libvirt's `start` of a network that then never comes up."""
    xml = virsh("net-dumpxml", name).stdout
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        [HOOK, name, "start", "begin", "-"],
        input=f"<hookData>{xml}</hookData>",
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
