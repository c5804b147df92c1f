# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command report: all that a bug report needs, in one file without secrets."""
