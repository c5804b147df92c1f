# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket for those who look: members of group libvirt, and nobody else but root.

Real processes of real users, frames that no client of ours sends, and floods: hooks are
answered by the service whatever happens there.
"""

import json
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import (
    CHECKOUT,
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    run,
    spawn,
    virsh,
    wait_for,
    write_config,
)
from lab_base import end
from lab_domains import define, domain, nic, ports
from lab_json import (
    GROUP,
    MEMBER,
    OTHER_MEMBER,
    STRANGER,
    Watcher,
    as_python,
    as_user,
    processes_of_look,
    valid,
)
from lab_service import SOCKET
from views import namespaces

LOOK = Path("/run/libvirt-natns/look.sock")
GREETING = b"libvirt-natns look 1\n"
LOOKS = (
    ("status",),
    ("status", "--json"),
    ("status", "a"),
    ("check",),
    ("check", "--json"),
    ("plan", "a"),
    ("plan", "--json", "a"),
    ("plan", f"{CHECKOUT}/xml/isolated.xml"),
    ("forward", "list"),
    ("forward", "list", "--json", "web"),
    ("diagram",),
)
CHANGES = (
    ("install",),
    ("uninstall",),
    ("sync",),
    ("forward", "add", "web", "1:2"),
    ("forward", "remove", "web", "8080"),
    ("router", "up"),
    ("router", "status"),
    ("doctor",),
    ("metrics",),
    ("serve",),
    ("exec", "a", "--", "id"),
)
ROOT_ONLY = "virt-natns: only root can do this: use sudo\n"
MEMBERS_ONLY = (
    "virt-natns: only root and members of group libvirt can do this:"
    " use sudo, or add the user to group libvirt and log in again\n"
)


@pytest.fixture(scope="module")
def world(installed: None) -> Iterator[Service]:
    """The service with network a, and a guest that is off."""
    with ExitStack() as stack:
        provider = stack.enter_context(Provider())
        write_config(provider.config())
        stack.callback(remove_config)
        service = stack.enter_context(Service())
        define_network(isolated("a", "virbr10"))
        virsh("net-start", "a")
        state = Path("/sys/class/net/virbr10/operstate")
        wait_for(lambda: state.read_text() == "up\n", timeout=10, what="the bridge")
        define(domain("web", nic("a", "52:54:00:00:00:05"), publishes=ports("start='8080'")))
        yield service


def asked(request: bytes, user: tuple[str, ...] = MEMBER) -> bytes:
    """All that the service says to a user's raw request, the greeting included."""
    program = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.settimeout(90);"
        f"s.connect({os.fspath(LOOK)!r});\n"
        "try: s.sendall(bytes.fromhex(sys.stdin.read())); s.shutdown(1)\n"
        "except OSError: pass\n"
        # A connection that is refused is reset, as its request is never read.
        "try:\n"
        "  while b := s.recv(65536): sys.stdout.buffer.write(b)\n"
        "except ConnectionResetError: pass\n"
    )
    done = run(*user, "/usr/bin/python3", "-c", program, input=request.hex(), timeout=120)
    return done.stdout.encode()


def answer(request: bytes) -> dict[str, object]:
    """The answer to a member's raw request."""
    said = asked(request)
    assert said.startswith(GREETING)
    document: dict[str, object] = json.loads(said.removeprefix(GREETING))
    assert set(document) == {"status", "out", "err"}
    return document


# -- users ---------------------------------------------------------------------


def test_the_sockets_are_those_of_root_and_of_the_group(world: Service) -> None:
    for path, mode, group in ((SOCKET, 0o600, 0), (LOOK, 0o660, GROUP)):
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (mode, 0, group)


@pytest.mark.parametrize("words", LOOKS, ids=" ".join)
def test_members_see_all_that_root_sees(world: Service, words: tuple[str, ...]) -> None:
    root = natns(*words)
    for user in (MEMBER, OTHER_MEMBER):
        done = as_user(user, *words)
        assert (done.returncode, done.stdout, done.stderr) == (0, root.stdout, root.stderr)


@pytest.mark.parametrize("words", CHANGES, ids=" ".join)
def test_members_change_nothing(world: Service, words: tuple[str, ...]) -> None:
    before = (namespaces(), natns("status", "--json").stdout)
    done = as_user(MEMBER, *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", ROOT_ONLY)
    # Nor by a request that no client of ours sends.
    told = answer(json.dumps({"argv": words}).encode() + b"\n")
    assert told == {"status": 1, "out": "", "err": ROOT_ONLY}
    assert (namespaces(), natns("status", "--json").stdout) == before


@pytest.mark.parametrize("words", [*LOOKS, ("watch",), ("status", "--watch")], ids=" ".join)
def test_others_see_nothing(world: Service, words: tuple[str, ...]) -> None:
    done = as_user(STRANGER, *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", MEMBERS_ONLY)


def test_others_get_no_octet_of_a_socket_that_is_open_to_all(world: Service) -> None:
    LOOK.chmod(0o666)
    try:
        assert asked(b'{"argv": ["status"]}\n', STRANGER) == b""
        assert asked(b'{"argv": ["watch", "--json"]}\n', STRANGER) == b""
        assert asked(b'{"argv": ["status"]}\n').startswith(GREETING)
    finally:
        LOOK.chmod(0o660)


def test_a_member_that_was_one_at_the_connection_counts(world: Service) -> None:
    """Who connects, not who holds the connection or has its number by now."""
    program = (
        "import os, socket\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        f"s.connect({os.fspath(LOOK)!r})\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print(s.recv(100))\n"
    )
    # Root has connected, and root it is; a stranger who becomes nobody else stays one.
    assert repr(GREETING) in run("/usr/bin/python3", "-c", program).stdout


def test_a_files_content_is_the_users_own(world: Service) -> None:
    """A member's plan of a file that only root reads tells nothing of it."""
    secret = Path("/run/tmp/secret.xml")
    secret.write_text("<network><name>hidden</name></network>")
    secret.chmod(0o600)
    try:
        refused = as_user(MEMBER, "plan", os.fspath(secret))
        assert refused.returncode == 1
        assert f"cannot read {secret}: Permission denied" in refused.stderr
        told = answer(json.dumps({"argv": ["plan", os.fspath(secret)]}).encode() + b"\n")
        assert told["status"] == 1
        assert "hidden" not in str(told)
        assert "there is no file and no network" in str(told["err"])
    finally:
        secret.unlink()


# -- frames that no client of ours sends ---------------------------------------

MALFORMED = "virt-natns: the request is malformed: install one version of virt-natns\n"
FORGED = {
    "no JSON": b"status\n",
    "no object": b"[]\n",
    "no words": b"{}\n",
    "words that are none": b'{"argv": "status"}\n',
    "numbers": b'{"argv": ["status", 1]}\n',
    "a document that is none": b'{"argv": ["plan", "a"], "document": 1}\n',
    "half a surrogate": b'{"argv": ["plan", "a"], "document": "\\ud800"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a huge number": b'{"argv": ' + b"9" * 100_000 + b"}\n",
    "octets": bytes(range(128, 256)) + b"\n",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_requests(world: Service, name: str) -> None:
    assert answer(FORGED[name]) == {"status": 1, "out": "", "err": MALFORMED}


def test_requests_that_do_not_end(world: Service) -> None:
    assert asked(b"") == GREETING
    assert asked(b'{"argv": ["status"]}') == GREETING
    # More than a request may have.
    assert asked(b"x" * 100_000) == GREETING


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--version"],
        ["status", "--watch"],
        ["watch"],
        ["watch", "--json", "x"],
        ["forward"],
        ["forward", "add", "web", "9:9"],
        ["--", "sync"],
        ["status;sync"],
    ],
)
def test_words_that_are_not_listed(world: Service, words: list[str]) -> None:
    told = answer(json.dumps({"argv": words}).encode() + b"\n")
    assert told == {"status": 1, "out": "", "err": ROOT_ONLY}


def test_wrong_usage_is_told(world: Service) -> None:
    told = answer(b'{"argv": ["status", "--no-such"]}\n')
    assert (told["status"], told["out"]) == (2, "")
    assert "unknown option --no-such" in str(told["err"])
    # Odd words are names, and no more.
    told = answer(json.dumps({"argv": ["status", "--", "$(id)\n\0"]}).encode() + b"\n")
    assert told["status"] == 1
    assert "there is no network" in str(told["err"])


def test_a_hostile_document(world: Service) -> None:
    entity = '<!DOCTYPE n [<!ENTITY x SYSTEM "file:///etc/shadow">]><network><name>&x;</name>'
    told = answer(json.dumps({"argv": ["plan", "f"], "document": entity}).encode() + b"\n")
    assert told["status"] == 1
    assert "root:" not in str(told)


# -- floods --------------------------------------------------------------------

FLOOD = f"""
import socket, sys, time
links = []
print("floods", flush=True)
while True:
    time.sleep(0.001)
    try:
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(0.2)
        link.connect({os.fspath(LOOK)!r})
        link.sendall(b'{{"argv": ["check"]}}\\n' if len(links) % 2 else b"{{")
        links.append(link)
    except OSError:
        time.sleep(0.01)
    if len(links) > 400:
        for link in links:
            link.close()
        links.clear()
"""


def test_a_flood_stops_neither_hooks_nor_root(world: Service, provider_free: None) -> None:
    floods = [spawn(*user, "/usr/bin/python3", "-c", FLOOD) for user in (MEMBER, OTHER_MEMBER)]
    try:
        for flood in floods:
            assert flood.stdout is not None
            flood.stdout.readline()
        for number in range(3):
            define_network(isolated(f"f{number}", f"virbr2{number}"))
            virsh("net-start", f"f{number}")
            # Not by the hook itself: the service has answered.
            assert world.logged("event=up", f"network=f{number}"), world.log()
        with Watcher() as watcher:
            assert {each["network"] for each in watcher.state["networks"]} >= {"a", "f0"}
        for number in range(3):
            virsh("net-destroy", f"f{number}")
    finally:
        for flood in floods:
            end(flood)
    assert as_user(MEMBER, "status", "a").returncode == 0


@pytest.fixture
def provider_free() -> Iterator[None]:
    """Leave none of the flood's networks."""
    yield
    for number in range(3):
        virsh("net-destroy", f"f{number}", check=False)
        virsh("net-undefine", f"f{number}", check=False)


MANY = f"""
import socket
links = []
for _ in range(12):
    link = socket.socket(socket.AF_UNIX)
    link.settimeout(30)
    link.connect({os.fspath(LOOK)!r})
    links.append(link)
for link in links:
    try:
        link.sendall(b'{{"argv": ["watch", "--json"]}}\\n')
    except BrokenPipeError:
        pass
    file = link.makefile("rb")
    print(file.readline(), file.readline()[:200], flush=True)
"""


def test_a_member_has_a_bounded_share(world: Service) -> None:
    done = as_python(MEMBER, MANY)
    assert done.stdout.count("too many read-only commands") == 4, done.stdout + done.stderr
    assert done.stdout.count('"networks"') == 8
    # Others have theirs.
    assert as_user(OTHER_MEMBER, "status", "a").returncode == 0


# -- the process that serves ---------------------------------------------------


def test_a_fault_of_it_is_no_fault_of_the_service(world: Service) -> None:
    with Watcher() as watcher:
        for pid in processes_of_look():
            os.kill(int(pid), signal.SIGKILL)
        # It is started again, and the watcher comes back.
        watcher.next("state")
        assert world.logged("event=look", "status=-9"), world.log()
    valid("status", as_user(MEMBER, "status", "--json").stdout)


def test_the_service_is_stuck(world: Service) -> None:
    """Members wait for a process that nobody starts, and no longer than they must."""
    wait_for(lambda: not processes_of_look(), timeout=60, what="the end without clients")
    link = socket.socket(socket.AF_UNIX)
    world.signal(signal.SIGSTOP)
    try:
        link.connect(os.fspath(LOOK))
        link.settimeout(0.5)
        with pytest.raises(TimeoutError):
            link.recv(1)
    finally:
        world.signal(signal.SIGCONT)
        link.settimeout(30)
        assert link.recv(100) == GREETING
        link.close()
