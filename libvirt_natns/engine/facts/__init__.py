# SPDX-License-Identifier: LGPL-2.1-or-later
"""Facts for a plan, read from configuration, state database and kernel."""
