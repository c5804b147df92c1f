# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks as processes: silent, harmless, and out of the way of what is not ours."""

import posix
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from libvirt_natns import hook, names
from libvirt_natns.documents import xml_sniff
from libvirt_natns.engine import events, host_forwarding
from libvirt_natns.engine.host import record
from libvirt_natns.kernel import locks
from libvirt_natns.service import client

CHECKOUT = Path(__file__).resolve().parents[2]
HOOKS = CHECKOUT / "hooks"
UUID = "c0ffee00-0000-4000-8000-000000000001"
NAT = '<natns:nat xmlns:natns="urn:libvirt-natns:1"{}/>'
ENABLED = NAT.format(' enabled="yes"')
DISABLED = NAT.format(' enabled="no"')

IP = b"<ip address='10.0.0.1' netmask='255.255.255.0'/>"

NETWORK_OPERATIONS = ("start", "started", "updated", "stopped", "port-created", "port-deleted")
GUEST_OPERATIONS = ("prepare", "start", "started", "stopped", "release", "migrate", "restore",
                    "reconnect", "attach")  # fmt: skip
INPUTS = {
    "empty": b"",
    "garbage": bytes(range(256)) * 40,
    "half": b"<hookData><network><name>a</na",
    "another document": b"<html><body/></html>",
    "not UTF-8": b"<hookData><network><name>\xff</name></network></hookData>",
    "entities": b'<!DOCTYPE a [<!ENTITY b "b">]><hookData><network><name>&b;</name></network>'
    b"</hookData>",
    "no uuid": b"<hookData><network><name>a</name>%s</network></hookData>" % IP,
    "odd uuid": b"<hookData><network><uuid>../../etc</uuid>%s</network></hookData>" % IP,
    "large": b"<hookData><network>" + b"<x/>" * 100_000 + IP + b"</network></hookData>",
    "domain": b"<domain type='kvm'><name>a</name></domain>",
    "encoding": b'<?xml version="1.0" encoding="foo"?><hookData><network>%s</network></hookData>'
    % IP,
    "unbound prefix": b"<hookData><network><foo:bar/>%s</network></hookData>" % IP,
}


def run(
    kind: str, *arguments: str, data: bytes = b"", script: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run a hook as libvirt does."""
    command = [str(script or HOOKS / kind), *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=False, env={})


def in_place_of_run(kind: str, directory: Path) -> str:
    """A hook's text, with its state in a directory of the test's own."""
    text = (HOOKS / kind).read_text()
    assert f"\nrun={hook.RUN_DIRECTORY}\n" in text
    return text.replace(f"\nrun={hook.RUN_DIRECTORY}\n", f"\nrun={directory}\n")


def network(inside: str) -> bytes:
    return (
        f"<hookData><network><name>a</name><uuid>{UUID}</uuid>{inside}"
        f"<bridge name='virbr10'/>{IP.decode()}</network></hookData>"
    ).encode()


@pytest.mark.parametrize("odd", INPUTS)
def test_the_guests_hook_never_fails(odd: str) -> None:
    for operation in (*GUEST_OPERATIONS, "no-such-operation"):
        done = run("qemu", "web", operation, "begin", "-", data=INPUTS[odd])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), operation


@pytest.mark.parametrize("arguments", [(), ("a",), ("a", "start"), ("a", "b", "c", "d", "e", "f")])
def test_odd_arguments_are_no_event(arguments: tuple[str, ...]) -> None:
    for kind in hook_names():
        done = run(kind, *arguments, data=INPUTS["no uuid"])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def hook_names() -> list[str]:
    return sorted(file.name for file in HOOKS.iterdir() if file.is_file() and file.suffix == "")


@pytest.mark.parametrize("odd", INPUTS)
def test_the_networks_hook_says_nothing_on_stdout(odd: str) -> None:
    """Where the thing has happened already, or is no event of ours, it cannot fail either."""
    for operation, when in [
        ("updated", "begin"),
        ("stopped", "end"),
        ("stopped", "begin"),
        ("start", "end"),
        ("port-created", "begin"),
        ("port-deleted", "begin"),
        ("plugged", "begin"),
        ("no-such-operation", "begin"),
    ]:
        done = run("network", "a", operation, when, "-", data=INPUTS[odd])
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), operation


@pytest.mark.parametrize("odd", INPUTS)
def test_a_network_without_sense_is_refused_in_a_line(odd: str) -> None:
    """libvirt never sends such a thing; should it, the network must not start unnoticed."""
    done = run("network", "a", "start", "begin", "-", data=INPUTS[odd])
    assert done.returncode == 1
    assert done.stdout == b""
    assert done.stderr.startswith(b"libvirt-natns: ")
    assert b"internal error" not in done.stderr
    assert done.stderr.count(b"\n") == 1


NOT_OURS = {
    "forward": "<forward mode='nat'/>",
    "disabled": f"<metadata>{DISABLED}</metadata>",
    "odd names": f"<metadata>{DISABLED}</metadata><domain name='my lab'/><bridge name='lab#1'/>",
    "unbound prefix": f"<metadata>{DISABLED}<foo:bar/></metadata>",
    "name that expat does not know": f"<metadata>{DISABLED}<pre\u021b/></metadata>",
    "two uuids": "<uuid>c0ffee00-0000-4000-8000-000000000002</uuid><forward/>",
    "large": "<forward/><x>" + "x" * 9_000_000 + "</x>",
    "deep": "<forward/>" + "<x>" * 50_000 + "</x>" * 50_000,
}


@pytest.mark.parametrize("inside", NOT_OURS.values(), ids=NOT_OURS)
@pytest.mark.parametrize("declaration", ["", "<?xml version='1.0' encoding='foo'?>"])
def test_what_is_not_ours_is_let_alone(inside: str, declaration: str) -> None:
    data = declaration.encode() + network(inside)
    for operation in NETWORK_OPERATIONS:
        when = "end" if operation == "stopped" else "begin"
        done = run("network", "a", operation, when, "-", data=data)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_is_not_ours_loads_next_to_nothing() -> None:
    """Each guest's start waits for it four times."""
    program = (
        "import sys; sys.path.append(sys.argv.pop()); from libvirt_natns.hook import main;"
        " status = main('network', sys.argv[1:]);"
        " print(status, *sorted(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-IS", "-c", program, "a", "start", "begin", "-", str(CHECKOUT)]
    done = subprocess.run(
        command, input=network("<forward mode='nat'/>"), capture_output=True, check=False
    )
    status, *modules = done.stderr.decode().split()
    assert status == "0"
    own = {name for name in modules if name.startswith("libvirt_natns")}
    assert own == {
        "libvirt_natns",
        "libvirt_natns.hook",
        "libvirt_natns.documents",
        "libvirt_natns.documents.xml_sniff",
    }
    # What the bare interpreter has loaded anyway, and a parser.
    bare = [sys.executable, "-IS", "-c", "import sys; print(*sys.modules)"]
    loaded = subprocess.run(bare, capture_output=True, check=True, text=True).stdout.split()
    assert set(modules) - set(loaded) - own <= {"pyexpat", "pyexpat.errors", "pyexpat.model"}


def test_an_event_of_ours_loads_no_more_than_it_needs() -> None:
    """Without the service all of this is loaded anew for each hook, and libvirt waits for it."""
    program = (
        "import sys; sys.path.append(sys.argv.pop()); import site; site.main();"
        " from libvirt_natns.engine import events; print(*sys.modules)"
    )
    command = [sys.executable, "-IS", "-c", program, str(CHECKOUT)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    loaded = set(done.stdout.split())
    assert "libvirt_natns.engine.engine" in loaded
    assert not loaded & {
        "argparse",
        "asyncio",
        "difflib",
        "http",
        "importlib.metadata",
        "iptc",
        "libvirt",
        "libvirt_natns.cli.commands",
        "multiprocessing",
        "platform",
        "pyroute2",
        "ssl",
        "tomllib",
        "unittest",
    }


# What the hooks decide before there is an interpreter


def spread(document: bytes) -> bytes:
    """As libvirt writes it: a line for each element."""
    return document.replace(b"><", b">\n  <")


def asks_python(kind: str, directory: Path, operation: str, when: str, data: bytes) -> bool:
    """Whether a hook leaves an event to hook.py."""
    script = directory / kind
    text = in_place_of_run(kind, directory)
    script.write_text(text.replace("\npython=/usr/bin/python3\n", "\npython=/bin/echo\n"))
    script.chmod(0o755)
    done = run(kind, "a", operation, when, "-", data=data, script=script)
    assert (done.returncode, done.stderr) == (0, b"")
    return bool(done.stdout)


@pytest.mark.parametrize("kind", ["network", "qemu", "lxc"])
def test_both_know_the_same_events(kind: str, tmp_path: Path) -> None:
    events = hook.NETWORK_EVENTS if kind == "network" else hook.GUEST_EVENTS
    for state in ("networks", "guests"):
        (tmp_path / state / UUID).mkdir(parents=True)
    port = f"<networkport><owner><uuid>{UUID}</uuid></owner></networkport></hookData>".encode()
    data = spread(network("").replace(b"</hookData>", port))
    for operation in {*NETWORK_OPERATIONS, *GUEST_OPERATIONS, "plugged", "unplugged"}:
        for when in ("begin", "end", "-"):
            expected = (operation, when) in events
            assert asks_python(kind, tmp_path, operation, when, data) == expected, operation


def test_other_guests_never_start_an_interpreter(tmp_path: Path) -> None:
    other = b"<domain type='kvm'><name>a</name><uuid>%s</uuid>%s</domain>"
    plain = spread(other % (UUID.encode(), b"<metadata><a:b xmlns:a='urn:b'/></metadata>"))
    ours = spread(other % (UUID.encode(), f"<metadata>{ENABLED}</metadata>".encode()))
    port = spread(
        network("").replace(
            b"</hookData>",
            b"<networkport><uuid>1</uuid><owner><name>a</name><uuid>%s</uuid></owner>"
            b"</networkport></hookData>" % UUID[::-1].encode(),
        )
    )
    for data in (plain, ours):
        assert not asks_python("qemu", tmp_path, "prepare", "begin", data)
    assert not asks_python("network", tmp_path, "port-created", "begin", port)
    (tmp_path / "guests" / "another").mkdir(parents=True)
    assert not asks_python("qemu", tmp_path, "prepare", "begin", plain)
    assert not asks_python("network", tmp_path, "port-created", "begin", port)
    assert asks_python("qemu", tmp_path, "prepare", "begin", ours)
    assert asks_python("qemu", tmp_path, "prepare", "begin", b"<domain><name>a</name></domain>")
    (tmp_path / "guests" / UUID).mkdir()
    assert asks_python("qemu", tmp_path, "prepare", "begin", plain)
    assert not asks_python("network", tmp_path, "port-created", "begin", port)
    (tmp_path / "guests" / UUID[::-1]).mkdir()
    assert asks_python("network", tmp_path, "port-created", "begin", port)


NICS = {
    "one": ["<source network='a'/>"],
    "two of others": ["<source network='b'/>", "<source bridge='br0'/>"],
    "one of ours": ["<source network='b'/>", "<source network='a' portid='1'/>"],
    "a bridge of ours": ["<source bridge='virbr10'/>", "<source network='b'/>"],
    "a name that is no file's": ["<source network='b'/>", "<source network='a b'/>"],
}


@pytest.mark.parametrize("case", NICS)
@pytest.mark.parametrize("operation", ["prepare", "start", "reconnect", "attach"])
def test_a_guest_with_a_choice_of_ways_out(case: str, operation: str, tmp_path: Path) -> None:
    """Guests without metadata matter with a NIC in a network of ours, beside another one."""
    for directory in ("guests", "netns/nat-a", "net/virbr10/brif/natin-1", "net/br0/brif/eth0"):
        (tmp_path / directory).mkdir(parents=True)
    interfaces = "".join(f"<interface type='network'>{nic}</interface>" for nic in NICS[case])
    data = f"<domain><name>a</name><uuid>{UUID}</uuid><devices>{interfaces}</devices></domain>"
    script = tmp_path / "qemu"
    text = in_place_of_run("qemu", tmp_path).replace(
        "\npython=/usr/bin/python3\n", "\npython=/bin/echo\n"
    )
    text = text.replace("/run/netns/", f"{tmp_path}/netns/").replace(
        "/sys/class/net/", f"{tmp_path}/net/"
    )
    script.write_text(text)
    script.chmod(0o755)
    done = run("qemu", "a", operation, "begin", "-", data=spread(data.encode()), script=script)
    expected = operation != "start" and case not in ("one", "two of others")
    assert (done.returncode, done.stderr, bool(done.stdout)) == (0, b"", expected)


def test_other_networks_never_start_an_interpreter(tmp_path: Path) -> None:
    forward = "<forward mode='nat'><nat/></forward>"
    inside = f"<metadata><x xmlns='urn:x'>{forward}</x></metadata><dns><forwarder addr='1'/></dns>"
    ours, other = spread(network(inside)), spread(network(inside + forward))
    for operation in ("start", "started"):
        assert asks_python("network", tmp_path, operation, "begin", ours)
        assert not asks_python("network", tmp_path, operation, "begin", other)
    (tmp_path / "networks").mkdir()
    for data in (ours, other):
        assert not asks_python("network", tmp_path, "updated", "begin", data)
        assert not asks_python("network", tmp_path, "stopped", "end", data)
    (tmp_path / "networks" / UUID).mkdir()
    for event in (("start", "begin"), ("updated", "begin"), ("stopped", "end")):
        assert asks_python("network", tmp_path, *event, other)


@pytest.mark.parametrize(
    ("ways", "forbids"),
    [
        ({"closed": ["br0"], "closed6": False}, True),
        ({"closed": [], "closed6": True}, True),
        ({"outward": ["br0"], "closed": [], "closed6": False}, False),
        ({}, False),
    ],
)
def test_other_networks_alter_what_the_host_forwards_where_rules_forbid_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ways: dict[str, object], forbids: bool
) -> None:
    """An interpreter takes ten times as long as the rest of the hook."""
    other, none = spread(network("<forward mode='route'/>")), spread(network(""))
    (tmp_path / "networks").mkdir()
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path)
    record.save(record.HostRecord(policy="nft", ways=ways))
    for event in (("started", "begin"), ("stopped", "end")):
        assert asks_python("network", tmp_path, *event, other) == forbids
        assert asks_python("network", tmp_path, *event, none) == (event[0] == "started")
    for event in (("start", "begin"), ("updated", "begin")):
        assert not asks_python("network", tmp_path, *event, other)
    # Without the mark, as an earlier version left the record, hook.py decides.
    (tmp_path / "host.open").unlink(missing_ok=True)
    assert asks_python("network", tmp_path, "started", "begin", other)
    record.save(record.HostRecord())
    assert list(tmp_path.glob("host.*")) == []


def test_other_networks_start_where_there_can_be_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(hook, "opens_forwarding", lambda _seen: True)
    monkeypatch.setattr(hook, "silence", lambda _descriptor: None)
    monkeypatch.setattr(posix, "fork", fork)
    other = network("<forward mode='route'/>")
    for event in hook.FORWARD_EVENTS:
        assert hook.network_event(event, other) == 0


@pytest.mark.parametrize(
    ("noted", "ip_forward", "six", "altered"),
    [
        ('{"ways": {"closed": ["br0"], "closed6": false}}', "1", False, True),
        ('{"ways": {"closed": ["br0"], "closed6": false}}', "0", True, False),
        ('{"ways": {"closed": [], "closed6": true}}', "1", False, False),
        ('{"ways": {"closed": [], "closed6": true}}', "0", True, True),
        ('{"ways": {}}', "1", True, False),
        ('{"ways": []}', "1", True, False),
        ("[]", "1", True, False),
        ("{", "1", True, False),
        ("", "1", True, False),
    ],
)
def test_what_alters_the_hosts_rules(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    noted: str,
    ip_forward: str,
    six: bool,
    altered: bool,
) -> None:
    for name, text in (("HOST_FILE", noted), ("IP_FORWARD", ip_forward)):
        (tmp_path / name).write_text(f"{text}\n")
        monkeypatch.setattr(host_forwarding, name, str(tmp_path / name))
    ip6 = "<ip family='ipv6' address='fd00::1' prefix='64'/>" if six else ""
    assert host_forwarding.is_altered(xml_sniff.at_network(network(f"<forward/>{ip6}"))) == altered
    assert not host_forwarding.is_altered(xml_sniff.at_network(network(ip6)))


@pytest.mark.parametrize("kind", ["network", "qemu"])
def test_the_document_arrives_whole(kind: str, tmp_path: Path) -> None:
    """Whatever a shell could take for its own."""
    odd = "<!-- $HOME `id` $(id) \\ \\n * ? [a-z] %s \u00e9 XML\nXML\n -->" + "<x/>" * 50_000
    data = network(ENABLED + odd)
    (tmp_path / "guests").mkdir()
    script = tmp_path / kind
    text = in_place_of_run(kind, tmp_path)
    script.write_text(text.replace("\npython=/usr/bin/python3\n", f"\npython={tmp_path}/cat\n"))
    (tmp_path / "cat").write_text("#!/bin/sh\nexec cat\n")
    for file in (script, tmp_path / "cat"):
        file.chmod(0o755)
    done = run(kind, "a", "start", "begin", "-", data=data, script=script)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == data + b"\n"


@pytest.mark.parametrize("kind", ["network", "qemu"])
def test_without_an_interpreter_the_hooks_are_harmless(kind: str, tmp_path: Path) -> None:
    script = tmp_path / kind
    text = in_place_of_run(kind, tmp_path)
    script.write_text(text.replace("\npython=/usr/bin/python3\n", "\npython=/gone\n"))
    script.chmod(0o755)
    (tmp_path / "guests").mkdir()
    done = run(kind, "a", "start", "begin", "-", data=network(ENABLED), script=script)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (0, b"", 1)


OURS, FOREIGN = network(ENABLED), network("<x/>")
FAILURES = {
    "fails": "exit 1",
    "misuse": "exit 2",
    "not executable": "exit 126",
    "killed": "kill -9 $$",
    "aborts": "kill -6 $$",
    "ends early": "exit 120",
}


def with_interpreter(kind: str, directory: Path, program: str) -> Path:
    """A hook with another interpreter, which has the given shell commands."""
    script, interpreter = directory / kind, directory / "interpreter"
    text = in_place_of_run(kind, directory)
    script.write_text(text.replace("\npython=/usr/bin/python3\n", f"\npython={interpreter}\n"))
    interpreter.write_text(f"#!/bin/sh\n{program}\n")
    for file in (script, interpreter):
        file.chmod(0o755)
    for state in ("networks", "guests"):
        (directory / state / UUID).mkdir(parents=True)
    return script


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("data", [OURS, FOREIGN], ids=["ours", "foreign"])
def test_an_interpreter_that_fails_stops_nothing(failure: str, data: bytes, tmp_path: Path) -> None:
    """libvirt would kill a guest that runs (reconnect), and refuse networks of others."""
    for kind, operations in (
        ("network", ("start", "started", "updated")),
        ("qemu", ("prepare", "start", "reconnect")),
        ("lxc", ("prepare", "start", "reconnect")),
    ):
        directory = tmp_path / kind
        directory.mkdir()
        script = with_interpreter(kind, directory, FAILURES[failure])
        for operation in operations:
            done = run(kind, "a", operation, "begin", "-", data=data, script=script)
            assert (done.returncode, done.stdout) == (0, b""), (kind, operation)
            last = done.stderr.splitlines()[-1].decode()
            assert last.startswith(f"libvirt-natns: {directory}/interpreter has ended with status")
            assert last.endswith("a goes on as it is: run virt-natns doctor, then virt-natns sync")


@pytest.mark.parametrize("kind", ["network", "qemu", "lxc"])
def test_a_python_without_its_library_stops_nothing(kind: str, tmp_path: Path) -> None:
    script = with_interpreter(kind, tmp_path, f'exec env PYTHONHOME=/gone {sys.executable} -S "$3"')
    operation = "start" if kind == "network" else "reconnect"
    done = run(kind, "a", operation, "begin", "-", data=OURS, script=script)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"No module named 'encodings'" in done.stderr


@pytest.mark.parametrize("kind", ["network", "qemu", "lxc"])
def test_a_hook_whose_shell_fails_stops_nothing(kind: str, tmp_path: Path) -> None:
    """As where no process can be started for cat."""
    script = with_interpreter(kind, tmp_path, "exit 3")
    script.write_text(script.read_text().replace("xml=$(cat 2>/dev/null)", "xml=${gone?}"))
    operation = "start" if kind == "network" else "reconnect"
    done = run(kind, "a", operation, "begin", "-", data=OURS, script=script)
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("kind", ["network", "qemu", "lxc"])
def test_a_hook_refuses_where_hook_py_does(kind: str, status: int, tmp_path: Path) -> None:
    package = tmp_path / "libvirt_natns"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hook.py").write_text(f"def main(kind, arguments):\n    return {status}\n")
    script = with_interpreter(kind, tmp_path, f'exec {sys.executable} "$@"')
    script.write_text(script.read_text().replace("\nlibrary=\n", f"\nlibrary={tmp_path}\n"))
    done = run(kind, "a", "start", "begin", "-", data=OURS, script=script)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


def test_a_network_without_address_is_not_ours() -> None:
    data = network("<domain name='my lab'/>").replace(IP, b"")
    done = run("network", "a", "start", "begin", "-", data=data)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("kind", ["network", "qemu"])
@pytest.mark.parametrize("name", ["hook", "documents/xml_sniff", "__init__"])
def test_half_a_package_is_harmless(kind: str, name: str, tmp_path: Path) -> None:
    """As a disk that was full when it was installed leaves it."""
    package = tmp_path / "libvirt_natns"
    (package / "documents").mkdir(parents=True)
    for module in ("__init__", "hook", "errors", "documents/__init__", "documents/xml_sniff"):
        shutil.copy(CHECKOUT / "libvirt_natns" / f"{module}.py", package / f"{module}.py")
    (package / f"{name}.py").write_text("def half(\n")
    (tmp_path / "hooks").mkdir()
    (tmp_path / "guests" / UUID).mkdir(parents=True)
    script = tmp_path / "hooks" / kind
    script.write_text(in_place_of_run(kind, tmp_path))
    script.chmod(0o755)
    operation = "start" if kind == "network" else "reconnect"
    done = run(kind, "a", operation, "begin", "-", data=network(ENABLED), script=script)
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.count(b"\n") <= 1


@pytest.mark.parametrize("kind", ["network", "qemu"])
def test_without_the_package_the_hooks_are_harmless(kind: str, tmp_path: Path) -> None:
    script = tmp_path / "hooks" / kind
    script.parent.mkdir()
    script.write_text(in_place_of_run(kind, tmp_path))
    script.chmod(0o755)
    (tmp_path / "guests").mkdir()
    done = run(kind, "a", "start", "begin", "-", data=network(ENABLED), script=script)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b"libvirt-natns is not installed" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_a_missing_library_is_told_in_a_line(tmp_path: Path) -> None:
    """Without lxml a network of ours cannot start, and any other can."""
    shutil.copytree(CHECKOUT / "libvirt_natns", tmp_path / "libvirt_natns")
    (tmp_path / "libvirt_natns" / "documents" / "libvirt_xml.py").write_text(
        "import no_such_library\n"
    )
    (tmp_path / "hooks").mkdir()
    script = Path(shutil.copy(HOOKS / "network", tmp_path / "hooks"))
    done = run("network", "a", "start", "begin", "-", data=network(""), script=script)
    assert done.returncode == 1
    assert done.stderr.startswith(b"libvirt-natns: cannot load no_such_library: install it for ")
    assert done.stderr.count(b"\n") == 1
    bridged = network("<forward mode='bridge'/>")
    done = run("network", "a", "start", "begin", "-", data=bridged, script=script)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("kind", ["network", "qemu"])
def test_closed_descriptors_do_no_harm(kind: str) -> None:
    script = f"exec {HOOKS / kind} a start begin - <&- >&-"
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=False)
    refused = kind == "network"
    assert (done.returncode, done.stderr.count(b"\n")) == (refused, refused)
    done = subprocess.run(["sh", "-c", f"{script} 2>&-"], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (refused, b"")


def test_what_the_service_has_taken_is_not_waited_for_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libvirt waits for a hook, whatever the hook waits for."""
    now = 1000.0

    def ask(*_: object) -> None:
        nonlocal now
        now += 45.0

    def answer(*_: object) -> None:
        left.append(locks.at_most(locks.LIMIT))

    left: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(hook, "is_a", lambda *_: True)
    monkeypatch.setattr(client, "ask", ask)
    monkeypatch.setattr(events, "answer", answer)
    monkeypatch.setattr(locks, "_ends", [])
    assert hook.handle("network", ("start", "begin"), b"", hook.never) == 0
    assert left == [15.0]
    assert hook.handle("network", ("start", "begin"), b"", hook.never) == 0
    assert left == [15.0, locks.LEAST]


# At first sight


def test_a_glance_sees_what_it_must() -> None:
    seen = xml_sniff.at_network(
        network(f"<metadata>{NAT.format('')}</metadata><mac address='52:54:00:AA:bb:cc'/>")
    )
    assert (seen.uuid, seen.name, seen.bridge) == (UUID, "a", "virbr10")
    assert seen.mac == "52:54:00:aa:bb:cc"
    assert not seen.untouched


@pytest.mark.parametrize(
    ("inside", "untouched"),
    [
        ("", False),
        ("<forward/>", True),
        ("<forward mode='none'/>", True),
        (f"<metadata>{NAT.format('')}</metadata>", False),
        (f"<metadata>{ENABLED}</metadata>", False),
        (f"<metadata>{DISABLED}</metadata>", True),
        # Not ours: another namespace, another place.
        ("<metadata><x:nat xmlns:x='urn:other' enabled='no'/></metadata>", False),
        (f"<metadata><x xmlns='urn:x'>{DISABLED}</x></metadata>", False),
        (DISABLED, False),
        ("<metadata><x:a xmlns:x='urn:x'><x:forward/></x:a></metadata>", False),
    ],
)
def test_a_glance_tells_what_is_untouched(inside: str, untouched: bool) -> None:
    data = network(inside)
    assert xml_sniff.at_network(data).untouched is untouched
    plain = data.removeprefix(b"<hookData>").removesuffix(b"</hookData>")
    assert xml_sniff.at_network(plain).untouched is untouched


def test_a_uuid_that_is_no_file_name_is_none() -> None:
    assert xml_sniff.at_network(INPUTS["odd uuid"]).uuid == ""


def test_every_event_says_whether_it_may_refuse() -> None:
    from libvirt_natns.engine.events import NETWORK

    assert hook.NETWORK_EVENTS.keys() == NETWORK.keys()
    refusing = {operation for (operation, _), refuses in hook.NETWORK_EVENTS.items() if refuses}
    assert refusing == {"start", "started"}


def test_an_end_succeeds_where_nobody_reads_what_is_told() -> None:
    broken = "; ".join(
        (
            "import os, sys",
            f"sys.path.append({str(CHECKOUT)!r})",
            "from libvirt_natns import hook",
            "os.dup2(os.open('/dev/full', os.O_WRONLY), 2)",
            "hook._report(ValueError('a'), False)",
            "hook._tell('b')",
        )
    )
    assert subprocess.run([sys.executable, "-c", broken], check=False).returncode == 0
