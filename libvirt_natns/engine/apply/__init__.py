# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plans are carried out here, and compared with the kernel."""
