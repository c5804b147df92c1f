# SPDX-License-Identifier: LGPL-2.1-or-later
"""nft's own library, in this process: the only user of libnftables.

It takes and returns the texts that the program nft does, which is a shell
around it, without the 4 ms and more that starting a program costs a process
with many threads.

The library ends the process when it cannot open its socket, so ``run`` tries
that first, and it keeps a few things in static memory, so only one thread at a
time is in it.  Each call has a context of its own: that is tied to the
namespace in which it was made, and remembers what it saw there.
"""

import ctypes
import os
import socket
from functools import cache
from threading import Lock
from typing import Any, NamedTuple

from libvirt_natns.kernel import netns

LIBRARY = "libnftables.so.1"
NETLINK_NETFILTER = 12

OPTIONS = {"-s": 1 << 2, "-j": 1 << 4, "-p": 1 << 7, "-t": 1 << 11}
"""nft's options, as the library's flags for its output."""

_ONE_AT_A_TIME = Lock()


class Answer(NamedTuple):
    """What a command came to: like a program's exit status and its output."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _library() -> Any:  # noqa: ANN401
    """The library, or None where there is none, or one that lacks what is needed."""
    try:
        library = ctypes.CDLL(LIBRARY)
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        for name in ("free", "buffer_output", "buffer_error"):
            getattr(library, f"nft_ctx_{name}").argtypes = [ctypes.c_void_p]
        for name in ("output", "error"):
            function = getattr(library, f"nft_ctx_get_{name}_buffer")
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_char_p
    except (OSError, AttributeError):
        return None
    return library


def available() -> bool:
    """Whether the library can be used."""
    return _library() is not None


def run(namespace: str | None, commands: str, *options: str) -> Answer:
    """Run nft's commands in a namespace, all or none; None is the caller's own.

    ``options`` are those of ``OPTIONS``.  Raises OSError where the kernel has no
    nftables, KernelError where the namespace is missing.
    """
    library = _library()
    with _ONE_AT_A_TIME:
        with netns.entered(namespace):
            _try_socket()
            context = library.nft_ctx_new(0)
        if not context:
            raise OSError("libnftables gives no context")
        try:
            return _run(library, context, commands, sum(OPTIONS[option] for option in options))
        finally:
            library.nft_ctx_free(context)


def _run(library: Any, context: int, commands: str, flags: int) -> Answer:  # noqa: ANN401
    library.nft_ctx_buffer_output(context)
    library.nft_ctx_buffer_error(context)
    library.nft_ctx_output_set_flags(context, flags)
    failed = library.nft_run_cmd_from_buffer(context, commands.encode())
    output, errors = (
        os.fsdecode(getattr(library, f"nft_ctx_get_{name}_buffer")(context) or b"")
        for name in ("output", "error")
    )
    return Answer(1 if failed else 0, output, errors)


def _try_socket() -> None:
    """Open what the library opens, which raises OSError where it would end the process."""
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER).close()
