# SPDX-License-Identifier: LGPL-2.1-or-later
"""The service's socket where systemd passes none."""

import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

from libvirt_natns.errors import ServiceError
from libvirt_natns.kernel.locks import OURS, make_directory
from libvirt_natns.service.client import SOCKET


def own_socket(cleanup: ExitStack) -> socket.socket:
    """Listen on the socket that hooks connect to; ``cleanup`` deletes the socket.

    Raises ServiceError where another service listens already.
    """
    path = Path(SOCKET)
    if _answers(path):
        raise ServiceError(f"a service listens on {path} already", "end that service first")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        make_directory(path.parent)
        # A directory that an earlier version has made may be open to all.
        path.parent.chmod(OURS)
        # A service that was killed has left its socket.
        path.unlink(missing_ok=True)
        # Only root can connect, from the first moment on.
        mask = os.umask(0o177)
        listener.bind(os.fspath(path))
        os.umask(mask)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise ServiceError(f"cannot listen on {path}", error.strerror or str(error)) from error
    cleanup.callback(_remove_socket, path, path.stat().st_ino)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(os.fspath(path))
        except OSError:
            return False
    return True


def _remove_socket(path: Path, inode: int) -> None:
    """Delete the socket, unless another service has put its own there."""
    with suppress(OSError):
        if path.stat().st_ino == inode:
            path.unlink()
            # The directory is empty only where no network runs.
            path.parent.rmdir()
