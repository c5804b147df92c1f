# SPDX-License-Identifier: LGPL-2.1-or-later
"""How another process is to run ``attend``: this interpreter, this very library."""

import sys

from libvirt_natns import install


def line(*arguments: str) -> tuple[str, ...]:
    """The command line that attends to a router, whatever PATH and directory are by then."""
    program = (
        f"import sys; sys.path.append({str(install.library())!r});"
        " from libvirt_natns.router.attend import main; sys.exit(main(sys.argv[1:]))"
    )
    return (sys.executable, "-I", "-c", program, *arguments)
