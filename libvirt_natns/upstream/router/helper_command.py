# SPDX-License-Identifier: LGPL-2.1-or-later
"""Command line of the process that attends to a router.

``attend`` imports what starts that process, so the line stands in a module of its own.
"""

from libvirt_natns import names

PROGRAM = "from libvirt_natns.upstream.router.helper import main; sys.exit(main(sys.argv[1:]))"


def line(*arguments: str) -> tuple[str, ...]:
    """Return the command line of ``attend`` with its arguments."""
    return names.python_command(PROGRAM, *arguments)
