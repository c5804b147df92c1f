# SPDX-License-Identifier: LGPL-2.1-or-later
"""Users other than root that may change the code which libvirt's hooks run as root.

The package, the interpreter and all directories above them count.  On Debian, group staff
may write below /usr/local; this is a finding only where the group has members.
"""

import grp
import pwd
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.cli import hook_files

ROOT = 0


def findings(places: Iterable[Path] | None = None) -> list[str]:
    """Return the files and directories that users other than root may write, with these users.

    By default these are the files of the package, and the interpreter that runs the hooks.
    """
    if places is None:
        package = names.library() / "libvirt_natns"
        places = (package, *package.rglob("*.py"), Path(hook_files.interpreter()))
    checked = dict.fromkeys(path for place in places for path in _with_parents(place))
    return [f"{place} is writable by {who}" for place in checked for who in _writers(place)]


def _with_parents(place: Path) -> Iterator[Path]:
    # A symbolic link may be replaced, and so may its target.
    for path in dict.fromkeys((place.absolute(), place.resolve())):
        yield from (path, *path.parents)


def _writers(place: Path) -> Iterator[str]:
    try:
        status = place.stat()
    except OSError:
        return
    if status.st_uid != ROOT:
        yield f"user {_user(status.st_uid)}"
    if status.st_mode & stat.S_IWGRP and status.st_gid != ROOT:
        members = group_members(status.st_gid)
        if members:
            yield f"group {_group(status.st_gid)} ({', '.join(members)})"
    # In a sticky directory only the owner of a file may replace the file.
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        yield "every user"


def group_members(gid: int) -> list[str]:
    """Return the users of a group, other than root."""
    named: set[str] = set()
    with suppress(KeyError):
        named.update(grp.getgrgid(gid).gr_mem)
    named.update(user.pw_name for user in pwd.getpwall() if user.pw_gid == gid)
    return sorted(named - {"root"})


def _user(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _group(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)
