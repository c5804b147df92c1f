# SPDX-License-Identifier: LGPL-2.1-or-later
"""The output of commands: a reader that has gone, or a full disk, interrupts no work.

A terminal gets colours.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO, cast

from libvirt_natns.errors import NatnsError


class Lenient:
    """A text stream that keeps its first error instead of raising it.

    Everything but writing is left to the wrapped stream.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or do nothing after an error."""
        if self.error is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing after an error."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.error = error
        # Otherwise Python fails at its end, when it flushes the rest.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def lenient(command: str = "") -> Iterator[None]:
    """Print leniently in the body; a terminal gets the colours of the ``command``.

    Raises NatnsError after the body where standard output could not be written.  A reader that
    has gone, such as head(1), is no error.
    """
    with ExitStack() as opened:
        # A process may start without standard output or error; Python sets None then.
        nowhere = opened.enter_context(Path(os.devnull).open("w"))
        stdout = _coloured(sys.stdout, command) if sys.stdout else nowhere
        out, err = Lenient(stdout), Lenient(sys.stderr or nowhere)
        opened.enter_context(redirect_stdout(cast("TextIO", out)))
        opened.enter_context(redirect_stderr(cast("TextIO", err)))
        opened.callback(err.flush)
        opened.callback(out.flush)
        yield
    if out.error is not None and not isinstance(out.error, BrokenPipeError):
        raise NatnsError("cannot write the output", out.error.strerror or str(out.error))


def _coloured(stream: TextIO, command: str) -> TextIO:
    """Return a stream that paints for a terminal; any other stream as it is."""
    if not stream.isatty():
        return stream
    # Needless for all programs that read the output.
    from libvirt_natns.cli import colour

    brush = colour.brush_of(command)
    if brush is None or not colour.is_wanted(stream):
        return stream
    return cast("TextIO", colour.Painted(stream, brush))
