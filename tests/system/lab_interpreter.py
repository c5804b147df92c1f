# SPDX-License-Identifier: LGPL-2.1-or-later
"""An interpreter for the hooks that has loaded everything: a fork of the command server.

Without the service each event starts an interpreter, which loads the same modules again.
That is most of an event's cost, and thousands of events do not test it anew.  So the hooks
are installed with another interpreter: a program of a few lines.  It asks the command server
to run its command line in a fork, with its own files, environment and directory.
Where no server runs, the program becomes the real interpreter.

Limits: modules are loaded already, so a library that is missing is not missed.  Such tests
take ``starting``, or ``REAL_INTERPRETER = True`` for a whole file.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from lab_commands import NOT_SERVED, CommandServer

from libvirt_natns.cli import hook_files

PROGRAM = Path("/etc/natns-python")
"""Below directories that root alone may write, as ``doctor`` examines, and not in /run, which
a test mounts so that nothing in it can be run."""

REAL = hook_files.DISTRIBUTION_PYTHON

ASKING = f"""#!/usr/bin/perl
if (socket(S, 1, 5, 0) && connect(S, pack("S a*", 1, "{{socket}}")) && syswrite(S, $$)
    && sysread(S, $status, 16) && $status ne "{NOT_SERVED}") {{{{
    # Until all of it is gone: a test looks at the processes next.
    while (sysread(S, $end, 16)) {{{{ }}}}
    kill abs $status, $$ if $status < 0;
    exit $status;
}}}}
exec "{REAL}", @ARGV;
"""
STARTING = f'#!/bin/sh\nexec {REAL} "$@"\n'


def _write(text: str) -> None:
    # libvirt may run a hook at any moment, so the file is never half written, nor open.
    fresh = PROGRAM.with_suffix(".new")
    fresh.write_text(text)
    fresh.chmod(0o755)
    fresh.replace(PROGRAM)


@contextmanager
def loaded(server: CommandServer) -> Iterator[None]:
    """Have ``virt-natns install`` choose this interpreter, here and in the server."""
    _write(ASKING.format(socket=server.path))
    server.interpreter = os.fspath(PROGRAM)
    real = hook_files.interpreter
    hook_files.interpreter = lambda: os.fspath(PROGRAM)  # type: ignore[assignment]
    try:
        yield
    finally:
        hook_files.interpreter = real
        server.interpreter = ""


def starting() -> AbstractContextManager[None]:
    """Have each event start an interpreter while the body runs, as it does outside the lab."""
    return _replaced(STARTING) if PROGRAM.exists() else nullcontext()


def failing() -> AbstractContextManager[None]:
    """Have each interpreter end as one that the kernel kills while the body runs."""
    return _replaced("#!/bin/sh\nexit 137\n")


@contextmanager
def _replaced(text: str) -> Iterator[None]:
    kept = PROGRAM.read_text()
    _write(text)
    try:
        yield
    finally:
        _write(kept)
