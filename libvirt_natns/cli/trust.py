# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which users other than root may change the code that libvirt's hooks run as root.

The package, the interpreter and all directories above them count.  On Debian, group staff
may write below /usr/local; that is a finding only where the group has members.
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
    """The files and directories that users other than root may write, and these users.

    By default those of the package and of the interpreter that runs the hooks.
    """
    if places is None:
        package = names.library() / "libvirt_natns"
        places = (package, *package.rglob("*.py"), Path(hook_files.interpreter()))
    checked = dict.fromkeys(each for place in places for each in _with_parents(place))
    return [f"{place} can be written by {who}" for place in checked for who in _writers(place)]


def _with_parents(place: Path) -> Iterator[Path]:
    # A link may be replaced where it is, and so may what it leads to.
    for each in dict.fromkeys((place.absolute(), place.resolve())):
        yield from (each, *each.parents)


def _writers(place: Path) -> Iterator[str]:
    try:
        found = place.stat()
    except OSError:
        return
    if found.st_uid != ROOT:
        yield f"user {_user(found.st_uid)}"
    if found.st_mode & stat.S_IWGRP and found.st_gid != ROOT:
        members = _members(found.st_gid)
        if members:
            yield f"group {_group(found.st_gid)} ({', '.join(members)})"
    # Of a sticky directory only the owner of a file may replace it.
    if found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
        yield "every user"


def _members(gid: int) -> list[str]:
    named: set[str] = set()
    with suppress(KeyError):
        named.update(grp.getgrgid(gid).gr_mem)
    named.update(each.pw_name for each in pwd.getpwall() if each.pw_gid == gid)
    return sorted(named - {"root"})


def _user(uid: int) -> str:
    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_name
    return str(uid)


def _group(gid: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(gid).gr_name
    return str(gid)
