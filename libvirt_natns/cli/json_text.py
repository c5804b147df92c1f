# SPDX-License-Identifier: LGPL-2.1-or-later
"""Output of commands for programs: an object with the version of its form.

docs/reference/json.md describes the objects, and ``xml/natns-json.schema.json`` is their schema.
Later versions of the program may add keys.  A change of a key's name or meaning changes
``VERSION``.
"""

import json
from collections.abc import Mapping

VERSION = 1


def dumped(document: Mapping[str, object], *, line: bool = False) -> str:
    """Return an object as JSON with its version; ``line``: without line breaks."""
    versioned = {"version": VERSION, **document}
    if line:
        return json.dumps(versioned, separators=(", ", ": "))
    return json.dumps(versioned, indent=2)
