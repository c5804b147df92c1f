# SPDX-License-Identifier: LGPL-2.1-or-later
"""The resident service: answers hooks, hears libvirt and the kernel, and repairs damage.

The service is optional: a hook that gets no answer does the work itself.
"""
