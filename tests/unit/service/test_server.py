# SPDX-License-Identifier: LGPL-2.1-or-later
"""A service that meets another version's state database: it answers nothing, and ends."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from libvirt_natns.engine.engine import Engine
from libvirt_natns.errors import FormatError, StoreError
from libvirt_natns.model.configuration import Config
from libvirt_natns.service import client
from libvirt_natns.service.log import Log
from libvirt_natns.service.server import Server
from libvirt_natns.state import schema

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the service answers root alone")

LATER = FormatError("state database", "has a later format")


class Sessions:
    """Whose engine cannot be had."""

    def __init__(self) -> None:
        self.error: Exception = StoreError("state database", "is damaged")

    @contextmanager
    def engine(self, settings: Config | None = None) -> Iterator[Engine]:
        raise self.error
        yield

    def after(self, seconds: float, work: Callable[[], None]) -> None:
        """Never."""

    def expect(self, uuid: str) -> None:
        """Look at nothing."""


class Meter:
    """Counts nothing."""

    def answered(self, hook: str, operation: str, outcome: str, seconds: float) -> None:
        """See ``server.Meter``."""


class Talk:
    """A service, and its socket."""

    def __init__(self, directory: Path) -> None:
        self.path = os.fspath(directory / "s")
        self.sessions = Sessions()
        self.server = Server(self.sessions, Log(), Meter(), {})
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.thread = Thread(target=self.server.run, args=(self.listener,))

    def ask(self) -> client.Answer | None:
        return client.ask("guest", ("release", "end"), b"<domain/>", self.path)


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    found = Talk(tmp_path)
    found.thread.start()
    yield found
    found.server.stop()
    found.thread.join(5)
    assert not found.thread.is_alive()


def test_the_greeting_has_the_databases_format() -> None:
    assert client.FORMAT == schema.VERSION
    assert client.GREETING.split()[-1] == str(schema.VERSION).encode()


def test_other_errors_are_answers(talk: Talk) -> None:
    answer = talk.ask()
    assert answer is not None
    assert (answer.done, answer.text) == (False, "state database: is damaged")
    assert talk.thread.is_alive()


def test_a_later_format_is_no_answer(talk: Talk) -> None:
    talk.sessions.error = LATER
    assert talk.ask() is None
    talk.thread.join(5)
    assert not talk.thread.is_alive()


@pytest.mark.parametrize(("error", "ends"), [(LATER, True), (StoreError("a", "b"), False)])
def test_a_hook_that_does_not_like_the_greeting(talk: Talk, error: Exception, ends: bool) -> None:
    """It hangs up: a hook of another version has perhaps changed the database."""
    talk.sessions.error = error
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(talk.path)
        assert link.recv(100) == client.GREETING
    talk.thread.join(5 if ends else 0.3)
    assert talk.thread.is_alive() != ends


def test_an_answer_that_comes_in_pieces_has_one_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slowly it comes."""
    monkeypatch.setattr(client, "LIMIT", 0.3)
    path = os.fspath(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        stop = False

        def drip() -> None:
            link, _ = listener.accept()
            link.sendall(client.GREETING)
            with link:
                while not stop:
                    try:
                        link.sendall(b"d")
                    except OSError:
                        return

        thread = Thread(target=drip)
        thread.start()
        assert client.ask("guest", ("release", "end"), b"", path) is None
        stop = True
        thread.join(5)
        assert not thread.is_alive()


DEAF = """
import signal, socket, sys, threading
from libvirt_natns.service.log import Log
from libvirt_natns.service.server import Server

listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
server = Server(None, Log(), None, {})
server.handle({signal.SIGTERM: server.stop})
# A signal that another thread takes does not interrupt the main thread's wait.
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("runs", flush=True)
server.run(listener)
"""


def test_a_signal_ends_the_service_while_it_waits(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", DEAF, tmp_path / "s"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "runs\n"
            process.terminate()
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()
