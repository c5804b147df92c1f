# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of the helper process of a router.

``helper`` imports the modules that start it, so its command line has a module of its own.
"""

from libvirt_natns import names

PROGRAM = "from libvirt_natns.upstream.router.helper import main; sys.exit(main(sys.argv[1:]))"


def line(*arguments: str) -> tuple[str, ...]:
    """Return the command line of the helper with its arguments."""
    return names.python_command(PROGRAM, *arguments)
