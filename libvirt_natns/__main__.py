# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python3 -m libvirt_natns`` is the command virt-natns."""

import sys

from libvirt_natns.cli import main

sys.exit(main())
