# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command virt-natns, and ``python3 -m libvirt_natns``.

Where a library is missing, ``uninstall`` still removes what needs none.
"""

import os
import sys


def main() -> int:
    """Run one command; returns the exit status."""
    try:
        from libvirt_natns.cli import commands
    except ImportError as error:
        return _without_libraries(error)
    return commands.main()


def _without_libraries(error: ImportError) -> int:
    from libvirt_natns.cli import uninstall
    from libvirt_natns.errors import describe, log

    told = describe(error)[0]
    package = sys.argv[2:] == ["--package"]
    if sys.argv[1:2] == ["uninstall"] and (package or not sys.argv[2:]) and os.geteuid() == 0:
        try:
            uninstall.run(lambda: None, package=package)
            return 0
        except Exception as failure:  # a person is shown one line here as well
            told, more = describe(failure)
            log(more)
    print(f"virt-natns: {told}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
