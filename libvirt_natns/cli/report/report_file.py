# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command report: write all that a bug report needs into one text file.

The file is plain text, so that its reader can see all of it before it is sent.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from libvirt_natns import __version__
from libvirt_natns.cli import access
from libvirt_natns.cli.report import report_parts
from libvirt_natns.cli.report.masks import HIDDEN, Masks, without_keys
from libvirt_natns.cli.report.report_parts import Part
from libvirt_natns.errors import NatnsError, describe

TIME_LIMIT = 120.0
"""Seconds after which no part is begun any more."""

AT_ONCE = 4
"""Parts that are made side by side: a libvirt that hangs holds up several of them."""

PART_LIMIT = 192 * 1024
SIZE_LIMIT = 4 * 1024 * 1024
"""Characters of a part, and of all parts."""

HEAD = f"""\
Report of libvirt-natns {__version__}, {{when}}

Masked in all parts: values of keys such as "password" and "token", private keys, users in URLs
as {HIDDEN}. Public addresses keep their last part: public1.7 and public1.9 are of one subnet.
Hardware addresses keep their vendor. Private addresses, names of networks and guests, and
their uuids are not masked.
Left out: comments of the configuration; of guests all but their names, NICs and our metadata;
metadata of other programs; hooks of others, except for their names; rules of others that
forwarded packets do not meet, and their comments; log lines of other programs.

Please read the report before you send it.
"""


def run(options: argparse.Namespace) -> int:
    """Write a report, and print the name of its file."""
    access.require_root()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    file = Path(options.file or f"virt-natns-report-{stamp}.txt")
    descriptor = _create(file)
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as out:
        out.write(HEAD.format(when=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())))
        masks, size = Masks(), 0
        for heading, said in _made(options.network):
            text = _text(said, masks, SIZE_LIMIT - size)
            size += len(text)
            out.write(f"\n== {masks.masked(heading)}\n{text}\n")
    print(file)
    return 0


def _made(network: str | None) -> Iterator[tuple[str, str]]:
    """Yield the headings and texts of all parts, which are made side by side."""
    deadline = time.monotonic() + TIME_LIMIT
    with ThreadPoolExecutor(AT_ONCE) as pool:
        begun = [
            (part[0], pool.submit(_said, part, deadline)) for part in report_parts.parts(network)
        ]
        for heading, future in begun:
            if sys.stderr.isatty():
                print(f"\r\033[K{heading} ...", end="", file=sys.stderr, flush=True)
            yield heading, future.result()
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _said(part: Part, deadline: float) -> str:
    """Return what a part tells; a part that fails says so."""
    if time.monotonic() > deadline:
        return f"(left out: the report has taken {TIME_LIMIT:.0f} s)"
    try:
        return part[1]() or "(nothing)"
    except Exception as error:  # a broken part must not keep the others
        return f"(failed: {describe(error)[0]})"


def _create(file: Path) -> int:
    """Create a file for its owner alone; a file or link that is there stays as it is."""
    try:
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise NatnsError(f"{file} exists already", "remove the file, or name another") from error
    except OSError as error:
        raise NatnsError(f"cannot write {file} ({error.strerror})", "name another file") from error


def _text(said: str, masks: Masks, room: int) -> str:
    """Return the text of a part as it goes into the report."""
    if room <= 0:
        return f"(left out: the report has {SIZE_LIMIT // 1024} KiB)"
    # Cut first, for masks look at each character: whole lines, and no part of a private key.
    return masks.masked(_shown(cut(without_keys(said), min(PART_LIMIT, room))))


def _shown(text: str) -> str:
    """Return a text without characters that would command a terminal."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text
    )


def cut(text: str, most: int) -> str:
    """Return a text that is not longer than ``most``: whole lines of its beginning and its end."""
    if len(text) <= most:
        return text
    head, tail = text[: most // 2].rpartition("\n")[0], text[-most // 2 :].partition("\n")[2]
    return f"{head}\n(... {len(text) - len(head) - len(tail)} characters are left out ...)\n{tail}"
