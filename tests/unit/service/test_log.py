# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's log: its lines, and a stream that takes none."""

import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from libvirt_natns.service.log import Log

FULL = Path("/dev/full")


@pytest.fixture
def stream(tmp_path: Path) -> Iterator[TextIO]:
    """A file that is written to, as standard error is."""
    with (tmp_path / "log").open("w") as opened:
        yield opened


def lead_to(stream: TextIO, path: Path) -> None:
    """Have a stream's descriptor lead to another file."""
    other = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.dup2(other, stream.fileno())
    os.close(other)


def test_lines(stream: TextIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JOURNAL_STREAM", raising=False)
    Log(stream).say("info", "up", network="lab", changed="a b", seconds=0.5, name=None)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    Log(stream).say("warning", "refused", error='a "b" = c')
    assert (tmp_path / "log").read_text().splitlines() == [
        'level=info event=up network=lab changed="a b" seconds=0.5000',
        '<4>level=warning event=refused error="a \\"b\\" = c"',
    ]


def test_without_a_descriptor() -> None:
    stream = io.StringIO()
    journal = Log(stream)
    journal.say("info", "up")
    assert stream.getvalue() == "level=info event=up\n"
    stream.close()
    journal.say("info", "up")


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full")
def test_a_full_disk_loses_lines_and_their_number_is_told(stream: TextIO, tmp_path: Path) -> None:
    journal = Log(stream)
    journal.say("info", "before")
    lead_to(stream, FULL)
    for _ in range(3):
        journal.say("error", "lost one")
    lead_to(stream, tmp_path / "log")
    journal.say("info", "after")
    journal.say("info", "last")
    assert (tmp_path / "log").read_text().splitlines() == [
        "level=info event=before",
        "level=warning event=lost lines=3",
        "level=info event=after",
        "level=info event=last",
    ]


def test_a_line_that_was_cut_off_ends_before_the_next(
    stream: TextIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    journal = Log(stream)
    written = os.write

    def short(descriptor: int, octets: bytes) -> int:
        # The disk has room for this much.
        if written(descriptor, octets[:9]) == 9:
            monkeypatch.setattr(os, "write", full)
        return 9

    def full(descriptor: int, octets: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", short)
    journal.say("info", "up")
    monkeypatch.setattr(os, "write", written)
    journal.say("info", "down")
    assert (tmp_path / "log").read_text().splitlines() == [
        "level=inf",
        "level=warning event=lost lines=1",
        "level=info event=down",
    ]


def test_a_reader_that_has_ended() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        Log(stream).say("info", "up")


def test_a_reader_that_does_not_read_delays_nothing_for_long() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb", buffering=0) as log, os.fdopen(writer, "w") as stream:
        journal = Log(stream)
        begin = time.monotonic()
        for number in range(2000):
            journal.say("info", "up", number=number, filler="x" * 100)
        assert time.monotonic() - begin < 5
        told = b""
        while b"filler" in (part := log.read(1 << 16)):
            told += part
            if len(part) < 1 << 16:
                break
        journal.say("info", "now")
        assert b"event=lost lines=" in log.read(1 << 16)
        assert told.startswith(b"level=info event=up number=0 ")


def test_closed_standard_error() -> None:
    Log(None).say("error", "up")
    stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    os.close(stream.fileno())
    Log(stream).say("error", "up")
    # Else closing it would fail, or close what has the number by now.
    os.dup2(0, stream.fileno())
    stream.close()
