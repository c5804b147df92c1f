# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether this process runs in a chroot: below the root directory of a machine that is not its own.

There a command may change files.  Networks, services and daemons are the machine's.
"""

import os
from pathlib import Path

FIRST_ROOT = Path("/proc/1/root")
"""The root directory of the first process."""

IGNORED = "SYSTEMD_IGNORE_CHROOT"
"""The variable by which systemctl, too, takes a chroot for a machine."""

SAID = "runs in a chroot: networks, daemons and the service stay as they are"


def is_chroot() -> bool:
    """True if the first process has another root directory, or /proc is not mounted."""
    if os.environ.get(IGNORED) == "1":
        return False
    try:
        return not FIRST_ROOT.samefile("/")
    except FileNotFoundError:
        return True
    except OSError:
        # A user namespace hides the first process of the machine.
        return False
