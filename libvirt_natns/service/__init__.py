# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service: hooks ask it, libvirt and the kernel tell it, it repairs damage.

Nothing needs it: a hook that gets no answer does the work itself.
"""
