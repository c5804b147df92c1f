# SPDX-License-Identifier: LGPL-2.1-or-later
"""pyroute2's route socket, and as little else of pyroute2 as possible.

A hook is a fresh process that libvirt waits for.  ``import pyroute2`` loads all that the library
can do (its database, ethtool, an HTTP server ...), which costs a hook more than all of its own
work.  Here its package stays empty until a caller asks it for a name.  Modules that it does not
need are empty while it loads.  If another version of pyroute2 fails that way, it is imported as
usual.
"""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

LIBRARY = "pyroute2"


def _stand_in(name: str, **content: object) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


STAND_INS = (
    # Every socket can be replaced by a unittest.mock, which brings asyncio.
    _stand_in("pyroute2.lab", LAB_API=type("LAB_API", (), {}), registry=[], use_mock=False),
    # Traffic control, with 30 modules of disciplines.
    _stand_in("pyroute2.netlink.rtnl.tcmsg", tcmsg=type("tcmsg", (), {}), plugins={}),
    _stand_in("multiprocessing", Pipe=None, Queue=None, Process=None),
    # The real module runs two programs for values that are not used.
    _stand_in(
        "platform",
        uname=os.uname,
        machine=lambda: os.uname().machine,
        architecture=lambda: ("64bit" if sys.maxsize > 2**32 else "32bit", "ELF"),
    ),
)


def _postpone_package() -> None:
    """Put the package in place without running it.  Raises ImportError if it is missing."""
    spec = PathFinder.find_spec(LIBRARY)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {LIBRARY!r}", name=LIBRARY)
    package, loader = module_from_spec(spec), spec.loader

    def find(name: str) -> Any:  # noqa: ANN401
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return importlib.import_module(f"{LIBRARY}.{name}")
        except ModuleNotFoundError:
            # No module: one of the names that the package itself has.
            del package.__dict__["__getattr__"]
            loader.exec_module(package)
            return getattr(package, name)

    package.__dict__["__getattr__"] = find
    sys.modules[LIBRARY] = package


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Put empty modules in the place of those that pyroute2 imports for other uses."""
    missing = {each.__name__: each for each in STAND_INS if each.__name__ not in sys.modules}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            sys.modules.pop(name, None)


def _load_little() -> None:
    """Load the modules named below into a package that does nothing by itself."""
    _postpone_package()
    try:
        with _stand_ins():
            importlib.import_module("pyroute2.iproute.linux")
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.split(".")[0] == LIBRARY]:
            del sys.modules[name]


if LIBRARY not in sys.modules:
    _load_little()

from pyroute2.iproute.linux import IPRoute  # noqa: E402
from pyroute2.netlink.exceptions import NetlinkError  # noqa: E402

__all__ = ["IPRoute", "NetlinkError"]
