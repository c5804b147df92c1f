# SPDX-License-Identifier: LGPL-2.1-or-later
"""Network settings below /proc/sys of one namespace."""

from collections.abc import Iterable
from pathlib import Path

from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns


class Sysctls:
    """The values below /proc/sys of one namespace; ``namespace`` None is the host."""

    __slots__ = ("_namespace",)

    def __init__(self, namespace: str | None) -> None:
        self._namespace = namespace

    def get(self, key: str) -> str | None:
        """Return a value; None if this kernel has no such setting."""
        return self.values([key]).get(key)

    def values(self, keys: Iterable[str]) -> dict[str, str]:
        """Return values by their keys, without settings that this kernel lacks.

        Raises KernelError.
        """
        values = {}
        with netns.entered(self._namespace):
            for key in keys:
                try:
                    values[key] = Path("/proc/sys", key).read_text().strip()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise KernelError(f"cannot read {key}", str(error)) from error
        return values

    def set(self, key: str, value: str) -> None:
        """Set a value; a setting that this kernel lacks is left out.  Raises KernelError."""
        self.set_all([(key, value)])

    def set_all(self, settings: Iterable[tuple[str, str]]) -> None:
        """Set several values, in this order.  Raises KernelError."""
        with netns.entered(self._namespace):
            for key, value in settings:
                try:
                    Path("/proc/sys", key).write_text(value)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise KernelError(f"cannot set {key} to {value}", str(error)) from error
