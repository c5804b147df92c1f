# SPDX-License-Identifier: LGPL-2.1-or-later
"""What doctor says of an upstream that no network could use."""

from typing import cast

import pytest

from libvirt_natns.cli import access, doctor
from libvirt_natns.errors import NatnsError
from libvirt_natns.model.configuration import Config
from libvirt_natns.model.upstream import HOST_UPSTREAM, RouterUpstream, Upstream


@pytest.mark.parametrize(
    ("upstream", "said"),
    [(RouterUpstream(name="wan", nic="ens3"), "the router of upstream wan is down")],
)
def test_upstreams_that_this_version_does_not_serve(upstream: Upstream, said: str) -> None:
    settings = Config(upstream="wan", upstreams={"host": HOST_UPSTREAM, "wan": upstream})
    no_engine = cast("access.Engines", None)
    examination = dict(doctor.examinations(no_engine, settings))["upstream"]
    with pytest.raises(NatnsError, match=said):
        examination()
