# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the hooks go, what is overwritten (nothing foreign), and the scope's line."""

import os
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from libvirt_natns import names
from libvirt_natns.cli import (
    access,
    check,
    doctor,
    firewalld_files,
    hook_files,
    install,
    scope,
    service_control,
)
from libvirt_natns.daemons import firewalld, libvirt, libvirtd_reload
from libvirt_natns.errors import InstallError
from libvirt_natns.firewall import backends
from libvirt_natns.model.configuration import Config

FOREIGN = "#!/bin/sh\n# a wrapper\n\n\n\n# libvirt-natns: is called from here\n"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of the test's own, below ``tmp_path``."""
    monkeypatch.setattr(hook_files, "HOOKS_DIRECTORY", tmp_path / "hooks")
    monkeypatch.setattr(firewalld_files, "DIRECTORY", tmp_path / "firewalld")
    monkeypatch.setattr(firewalld, "RUN", tmp_path / "run-of-firewalld")
    monkeypatch.setattr(names, "CONFIG_FILE", tmp_path / "etc" / "config.toml")
    monkeypatch.setattr(names, "STATE_DIRECTORY", tmp_path / "lib")
    monkeypatch.setattr(names, "RUN_DIRECTORY", tmp_path / "run")
    return tmp_path


def tree(directory: Path) -> dict[str, str]:
    return {
        str(file.relative_to(directory)): file.read_text() if file.is_file() else "/"
        for file in directory.rglob("*")
    }


# Hooks


def test_hooks_come_and_go(machine: Path) -> None:
    (machine / "hooks").mkdir()
    before = tree(machine)
    written = hook_files.install()
    assert [file.name for file in written] == ["network", "qemu", "lxc"]
    assert hook_files.installed() == written
    for file in written:
        assert os.access(file, os.X_OK)
        assert hook_files.is_current(file)
        assert f"\nlibrary={names.library()}\n" in file.read_text()
        assert f"\npython={hook_files.interpreter()}\n" in file.read_text()
        subprocess.run([file], stdin=subprocess.DEVNULL, check=True)
    after = tree(machine)
    assert hook_files.install() == written
    assert tree(machine) == after
    assert hook_files.remove() == written
    assert tree(machine) == before
    assert hook_files.remove() == ()


def test_an_older_hook_of_ours_is_replaced(machine: Path) -> None:
    hook = hook_files.install()[0]
    hook.write_text(hook.read_text() + "# older\n")
    assert not hook_files.is_current(hook)
    hook_files.install()
    assert hook_files.is_current(hook)


def test_a_foreign_hook_is_never_touched(machine: Path) -> None:
    foreign = machine / "hooks" / "network"
    foreign.parent.mkdir()
    foreign.write_text(FOREIGN)
    assert not hook_files.is_ours(foreign)
    written = hook_files.install()
    assert written[0] == machine / "hooks" / "network.d" / "libvirt-natns"
    assert foreign.read_text() == FOREIGN
    assert hook_files.remove() == written
    assert tree(machine / "hooks") == {"network": FOREIGN}


def test_somebody_elses_drop_ins_stay(machine: Path) -> None:
    other = machine / "hooks" / "network.d" / "other"
    other.parent.mkdir(parents=True)
    other.write_text("#!/bin/sh\n")
    (machine / "hooks" / "network").write_text(FOREIGN)
    hook_files.install()
    hook_files.remove()
    assert other.exists()


def test_a_link_that_leads_nowhere_is_somebodys(machine: Path) -> None:
    link = machine / "hooks" / "network"
    link.parent.mkdir()
    link.symlink_to("/somewhere/not/mounted/now")
    assert hook_files.install()[0].parent.name == "network.d"
    assert link.is_symlink()


def test_ours_moves_to_the_main_place_once_it_is_free(machine: Path) -> None:
    foreign = machine / "hooks" / "network"
    foreign.parent.mkdir()
    foreign.write_text(FOREIGN)
    hook_files.install()
    foreign.unlink()
    assert hook_files.install()[0] == foreign
    assert not (machine / "hooks" / "network.d").exists()


def leave_half_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install, with a kill just ahead of the step that puts the last file in its place."""

    def killed(file: Path, _to: Path) -> Path:
        raise KeyboardInterrupt(str(file))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        hook_files.install()


def test_a_killed_install_leaves_nothing_that_libvirt_runs(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libvirt runs every executable file in network.d."""
    drop_ins = machine / "hooks" / "network.d"
    for foreign in (True, False):
        drop_ins.mkdir(parents=True, exist_ok=True)
        if foreign:
            (machine / "hooks" / "network").write_text(FOREIGN)
        leave_half_a_hook(monkeypatch)
        assert list(drop_ins.iterdir()) == []
        hook_files.install()
        hook_files.remove()
        (machine / "hooks" / "network").unlink(missing_ok=True)
        assert set(tree(machine / "hooks")) <= {"network.d"}


@pytest.mark.parametrize("step", [hook_files.install, hook_files.remove])
@pytest.mark.parametrize("content", ["", "#!/bin/sh\n# libvirt-natns: half a hook\n"])
def test_leftovers_of_a_killed_install_are_removed(
    step: Callable[[], object], content: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions wrote drop-ins in the directory from which libvirt runs them."""
    (machine / "hooks" / "network.d").mkdir(parents=True)
    (machine / "hooks" / "network").write_text(FOREIGN)
    for name in ("network.d/.libvirt-natns.new", ".qemu.new"):
        (machine / "hooks" / name).write_text(content)
    step()
    assert not [name for name in tree(machine / "hooks") if name.endswith(".new")]
    assert hook_files.remove() == () or step is hook_files.install
    assert tree(machine / "hooks") == {"network": FOREIGN}


def test_a_network_from_before_a_reboot_has_no_router_to_keep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [SimpleNamespace(name=name, this_boot=name == "runs") for name in ("runs", "ran")]
    networks = SimpleNamespace(all=lambda *_: records)
    engine = SimpleNamespace(config=Config(), store=SimpleNamespace(networks=networks))
    forwarded = b"<network><name>%s</name><uuid>%s</uuid><forward mode='bridge'/></network>"
    monkeypatch.setattr(access, "require_root", lambda: None)
    monkeypatch.setattr(access, "engine", lambda: nullcontext(engine))
    monkeypatch.setattr(backends, "choose", lambda _: None)
    monkeypatch.setattr(doctor, "trusted", lambda: SimpleNamespace(state="ok"))
    monkeypatch.setattr(libvirtd_reload, "reload", lambda: ())
    monkeypatch.setattr(service_control, "start", lambda: "started")
    monkeypatch.setattr(check, "rebuild_state", lambda: None)
    monkeypatch.setattr(check, "repair", lambda _: 0)
    uuid = b"c0ffee00-0000-4000-8000-000000000001"
    active = {name: forwarded % (name.encode(), uuid) for name in ("runs", "ran")}
    monkeypatch.setattr(libvirt, "networks", lambda: active)
    assert install.run(Namespace(scope=None, package=False)) == 0
    said = capsys.readouterr().out
    assert "  runs: has <forward mode='bridge'>; keeps its router until it stops\n" in said
    assert "  ran: has <forward mode='bridge'>\n" in said


def test_what_cannot_be_written_is_told(machine: Path) -> None:
    (machine / "hooks").write_text("a file in the directory's place")
    with pytest.raises(InstallError, match=r"cannot write .*hooks"):
        hook_files.install()


# Scope


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 'scope = "annotated"\n'),
        ("# mine\n", 'scope = "annotated"\n# mine\n'),
        ('scope = "isolated"\n', 'scope = "annotated"\n'),
        ("  scope='isolated'#c\n", '  scope="annotated"#c\n'),
        ('# scope = "isolated"\n', 'scope = "annotated"\n# scope = "isolated"\n'),
        (
            'firewall = "auto"\n\n[upstreams.host]\ndns = []\n',
            'scope = "annotated"\nfirewall = "auto"\n\n[upstreams.host]\ndns = []\n',
        ),
        ('scope = "annotated"', 'scope = "annotated"'),
    ],
)
def test_only_the_scope_changes(text: str, expected: str) -> None:
    assert scope.with_scope(text, "annotated") == expected


def test_without_a_file_one_is_written_that_goes_again(machine: Path) -> None:
    file = scope.write("annotated")
    assert file.read_text() == scope.SCOPE_FILE_HEAD + 'scope = "annotated"\n'
    assert scope.write("isolated").read_text().endswith('scope = "isolated"\n')
    scope.remove_written()
    assert not file.parent.exists()


def test_a_users_file_stays_also_where_we_changed_it(machine: Path) -> None:
    file = names.CONFIG_FILE
    file.parent.mkdir()
    file.write_text("# mine\n")
    file.chmod(0o640)
    scope.write("annotated")
    assert file.stat().st_mode & 0o777 == 0o640
    scope.remove_written()
    assert file.read_text() == 'scope = "annotated"\n# mine\n'


def test_a_linked_file_stays_linked(machine: Path) -> None:
    file = names.CONFIG_FILE
    file.parent.mkdir()
    real = machine / "real.toml"
    real.write_text("# mine\n")
    file.symlink_to(real)
    scope.write("annotated")
    assert file.is_symlink()
    assert "annotated" in real.read_text()


@pytest.mark.parametrize(
    "text", ['"scope" = "isolated"\n', 'scope = """\nisolated"""\n', "firewall = 1\n", "?\n"]
)
def test_the_unusual_is_left_to_its_author(text: str) -> None:
    names.CONFIG_FILE.parent.mkdir()
    names.CONFIG_FILE.write_text(text)
    with pytest.raises(InstallError, match='write scope = "annotated"'):
        scope.write("annotated")
    assert names.CONFIG_FILE.read_text() == text


# Daemons


def test_daemons_are_told_from_their_like() -> None:
    """None of the processes here is libvirt's, or it is one that is told by its name."""
    assert all(daemon.name in libvirtd_reload.DAEMONS for daemon in libvirtd_reload.running())


def test_daemons_are_found_beside_processes_with_odd_names() -> None:
    """Any user may give a process a name that is not UTF-8."""
    program = "import ctypes; ctypes.CDLL(None).prctl(15, b'\\xff) (', 0, 0, 0); print(flush=True)"
    odd = subprocess.Popen(
        [sys.executable, "-c", f"{program}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with odd:
        assert odd.stdout is not None
        odd.stdout.readline()
        assert b"\xff" in Path(f"/proc/{odd.pid}/stat").read_bytes()
        assert odd.pid not in [daemon.pid for daemon in libvirtd_reload.running()]
        odd.kill()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b"7", b"{}", b'{"told": 7}'])
def test_a_damaged_note_tells_of_no_daemon(content: bytes, machine: Path) -> None:
    (machine / "lib").mkdir()
    (machine / "lib" / "told.json").write_bytes(content)
    assert libvirtd_reload.blind(0.0) == ()


def test_a_hook_that_is_no_text_is_not_current(machine: Path) -> None:
    hook = hook_files.install()[0]
    hook.write_bytes(hook.read_bytes() + b"# \xff\n")
    assert hook_files.is_ours(hook)
    assert not hook_files.is_current(hook)


def test_a_configuration_that_is_no_text_stays(machine: Path) -> None:
    names.CONFIG_FILE.parent.mkdir()
    names.CONFIG_FILE.write_bytes(b"# \xff\n")
    with pytest.raises(InstallError, match="save it as UTF-8"):
        scope.write("annotated")
    assert names.CONFIG_FILE.read_bytes() == b"# \xff\n"


def test_a_daemon_is_blind_until_it_is_told(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As nohup(1) has it, which the sleeper would inherit.
    heeded = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sleeper = subprocess.Popen(["sleep", "60"])
    signal.signal(signal.SIGHUP, heeded)
    monkeypatch.setattr(libvirtd_reload, "DAEMONS", ("sleep",))
    try:
        hooks = hook_files.install()
        mine = next(d for d in libvirtd_reload.running() if d.pid == sleeper.pid)
        monkeypatch.setattr(libvirtd_reload, "running", lambda: [mine])
        for hook in hooks:
            os.utime(hook, (mine.start_time - 60, mine.start_time - 60))
        assert libvirtd_reload.blind(hook_files.newest()) == ()
        os.utime(hooks[0], (mine.start_time + 60, mine.start_time + 60))
        assert libvirtd_reload.blind(hook_files.newest()) == ("sleep",)
        assert libvirtd_reload.reload() == ("sleep",)
        assert libvirtd_reload.blind(hook_files.newest()) == ()
        assert sleeper.wait() == -1  # SIGHUP, which ends a sleep
    finally:
        sleeper.kill()
        sleeper.wait()


def test_one_hook_that_stays_keeps_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unlink = Path.unlink

    def remove(file: Path, missing_ok: bool = False) -> None:
        if file.name == "network":
            raise PermissionError(1, "Operation not permitted", str(file))
        unlink(file, missing_ok)

    hook_files.install()
    monkeypatch.setattr(Path, "unlink", remove)
    with pytest.raises(InstallError, match=r"cannot remove .*/network \(Operation not permitted\)"):
        hook_files.remove()
    assert [file.name for file in hook_files.installed()] == ["network"]


def test_a_note_that_cannot_be_written_ends_no_reload(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(libvirtd_reload, "running", list)
    monkeypatch.setattr(names, "STATE_DIRECTORY", Path("/dev/null/state"))
    assert libvirtd_reload.reload() == ()
