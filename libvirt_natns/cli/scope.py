# SPDX-License-Identifier: LGPL-2.1-or-later
"""The key ``scope`` of the configuration file, as ``virt-natns install --scope`` sets it.

The rest of the file stays as its author wrote it.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.documents import config
from libvirt_natns.errors import ConfigError, InstallError

SCOPE_FILE_HEAD = '# Written by "virt-natns install"; see virt-natns(8).\n'
TABLE_HEAD = re.compile(r"^[ \t]*\[", re.MULTILINE)
SCOPE_LINE = re.compile(r"""^([ \t]*scope[ \t]*=[ \t]*)("[^"\n]*"|'[^'\n]*')""", re.MULTILINE)


def write(scope: str) -> Path:
    """Set ``scope`` in the configuration file, and nothing else of it.  Return its path.

    Raises InstallError where the file cannot be written, or is so unusual that only its
    author should change it.
    """
    file = names.CONFIG_FILE
    try:
        old = file.read_text() if file.exists() else None
        new = with_scope(old, scope)
        if new != old:
            file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            _replace(file, new)
    except OSError as error:
        raise InstallError(f"cannot write {file}", str(error.strerror)) from error
    except UnicodeDecodeError as error:
        raise InstallError(f"{file} is not UTF-8", "save it as UTF-8") from error
    return file


def with_scope(text: str | None, scope: str) -> str:
    """Return the configuration's text with this scope; ``None`` stands for no file."""
    line = f'scope = "{scope}"\n'
    if text is None:
        return SCOPE_FILE_HEAD + line
    table = TABLE_HEAD.search(text)
    top, rest = (text[: table.start()], text[table.start() :]) if table else (text, "")
    # Top-level keys must stand ahead of the first table.
    changed, count = SCOPE_LINE.subn(lambda line: f'{line[1]}"{scope}"', top, count=1)
    new = changed + rest if count else line + text
    try:
        understood = config.parse(new, str(names.CONFIG_FILE)).scope == scope
    except ConfigError:
        understood = False
    if not understood:
        raise InstallError(f"cannot set the scope in {names.CONFIG_FILE}", f"write {line.strip()}")
    return new


def _replace(file: Path, text: str) -> None:
    """Write a file in a single step, also through a symbolic link; keep its mode."""
    real = file.resolve()
    fresh = real.with_name(f".{real.name}.new")
    fresh.write_text(text)
    if real.exists():
        shutil.copymode(real, fresh)
    fresh.replace(real)


def remove_written() -> None:
    """Remove a configuration that ``write`` has made, and its directory if it is empty then."""
    file = names.CONFIG_FILE
    ours = re.escape(SCOPE_FILE_HEAD) + r'scope = "\w+"\n'
    # An administrator's file may be in any encoding, and share its directory with others.
    with suppress(OSError):
        if re.fullmatch(ours, file.read_text(errors="replace")):
            file.unlink()
            file.parent.rmdir()
