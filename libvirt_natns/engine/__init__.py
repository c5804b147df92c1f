# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine: events become verbs; a verb reads facts, makes a plan, applies and records it."""
