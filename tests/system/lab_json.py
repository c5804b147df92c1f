# SPDX-License-Identifier: LGPL-2.1-or-later
"""Output for programs, held against the schema that is shipped; and users who may look, or not."""

import grp
import json
from collections.abc import Iterator
from queue import Empty, Queue
from threading import Thread
from typing import Any, Self

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from lab import CHECKOUT, PYTHON, Result, run, spawn, wait_for
from lab_base import Closing

SCHEMA: dict[str, Any] = json.loads((CHECKOUT / "xml/natns-json.schema.json").read_text())

NOBODY = 65534
GROUP = grp.getgrnam("libvirt").gr_gid
MEMBER = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", f"--groups={GROUP}")
OTHER_MEMBER = ("setpriv", "--reuid=65533", f"--regid={GROUP}", "--clear-groups")
STRANGER = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
LINE_LIMIT = 60.0
"""Seconds in which the stream has another line, on a machine that is busy."""

COMMAND = (PYTHON, "-m", "libvirt_natns")


def closed(schema: Any) -> Any:  # noqa: ANN401
    """A schema that allows no key beyond those it names: the documentation lacks none."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {key: closed(part) for key, part in schema.items()}
    if isinstance(schema.get("properties"), dict) and "type" in schema:
        inner.setdefault("additionalProperties", False)
    return inner


CLOSED = closed(SCHEMA)


def valid(kind: str, text: str) -> dict[str, Any]:
    """The object in an output, which must be as the schema has it, and nothing more."""
    __tracebackhide__ = True
    document: dict[str, Any] = json.loads(text)
    validator = Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": CLOSED["$defs"]})
    faults = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in validator.iter_errors(document)
    ]
    assert not faults, "\n".join(faults)
    return document


def as_user(user: tuple[str, ...], *words: str) -> Result:
    """Run ``virt-natns`` as a user, in an interpreter of its own."""
    return run(*user, *COMMAND, *words, check=False)


def as_python(user: tuple[str, ...], program: str, *words: str) -> Result:
    """Run a program of Python as a user."""
    return run(*user, PYTHON, "-c", program, *words, check=False)


class Watcher(Closing):
    """``virt-natns watch --json`` as a user, and the state that its lines amount to."""

    def __init__(self, user: tuple[str, ...] = ()) -> None:
        self.lines: list[dict[str, Any]] = []
        self.state: dict[str, Any] = {}
        self._process = spawn(*user, *COMMAND, "watch", "--json")

        self._output: Queue[str] = Queue()
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._output.put(line)

    def __enter__(self) -> Self:
        self.next("state")
        return self

    def down(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(10)
        self._reader.join(10)
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def next(self, event: str = "change") -> dict[str, Any]:
        """The next line, which must be of that event."""
        __tracebackhide__ = True
        try:
            text = self._output.get(timeout=LINE_LIMIT)
        except Empty:
            raise AssertionError(f"no line comes after {self.lines[-1:]}") from None
        line = valid("watch_line", text)
        assert line["event"] == event, text
        self.lines.append(line)
        if event == "state":
            self.state = line["state"]
        elif event == "change":
            self.state = applied(self.state, line)
        return line

    def until(self, part: str, key: str, **values: object) -> dict[str, Any]:
        """Follow changes until an entry of a part has these values; return the entry."""
        __tracebackhide__ = True
        for _ in range(50):
            for entry in self.state[part]:
                if key in entry.values() and values.items() <= entry.items():
                    return dict(entry)
            self.next()
        raise AssertionError(f"{part} {key} has never had {values}")


def entries(state: dict[str, Any], part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a part by their key, as the documentation says."""
    key = "name" if part == "upstreams" else "uuid"
    return ((entry[key], entry) for entry in state[part] or ())


def applied(state: dict[str, Any], line: dict[str, Any]) -> dict[str, Any]:
    """The state after a change, by the rules of the documentation alone."""
    after = dict(state)
    for part, value in line["set"].items():
        if part in ("networks", "domains", "upstreams", "libvirt_networks") and value is not None:
            kept = dict(entries(state, part)) | dict(entries({part: value}, part))
            after[part] = list(kept.values())
        else:
            after[part] = value
    for part, keys in line["removed"].items():
        after[part] = [entry for key, entry in entries(after, part) if key not in keys]
    return after


def processes_of_look() -> list[str]:
    """The processes that serve the socket for those who look: the server and its forks."""
    return run("pgrep", "-f", "look_server", check=False).stdout.split()


def no_process_of_look() -> None:
    """Wait until none serves it."""
    wait_for(lambda: not processes_of_look(), timeout=10, what="the end of the look server")
