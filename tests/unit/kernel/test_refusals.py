# SPDX-License-Identifier: LGPL-2.1-or-later
"""A refusal of the kernel is a KernelError for a verb, with any cause."""

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyroute2.netlink.exceptions import NetlinkError

from libvirt_natns import names
from libvirt_natns.errors import KernelError
from libvirt_natns.kernel import netns, route_socket, rtnetlink
from libvirt_natns.kernel.channel import NetlinkChannel
from libvirt_natns.kernel.session import Kernel
from libvirt_natns.kernel.veth import VethPair
from libvirt_natns.upstream.router import nic_link

PATCH = VethPair("nat-a", "inner", "0a:0", "outer", "fe:0", "natns-a", 1500)


def refusing(error: Exception) -> Callable[..., object]:
    """Return a function that raises an error."""

    def refuse(*_: object, **__: object) -> None:
        raise error

    return refuse


@pytest.fixture(autouse=True)
def missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No namespace has a name, and no link is there; sockets that are open lead somewhere."""

    def entered(_: str | None) -> AbstractContextManager[None]:
        return nullcontext()

    monkeypatch.setattr(names, "namespace_path", lambda name: str(tmp_path / name))
    monkeypatch.setattr(netns, "entered", entered)
    monkeypatch.setattr(
        rtnetlink, "Session", lambda: SimpleNamespace(link=lambda _: None, close=lambda: None)
    )
    monkeypatch.setattr(NetlinkChannel, "index", lambda *_: 1)
    writer = SimpleNamespace(link=refusing(NetlinkError(errno.EPERM)), close=lambda: None)
    monkeypatch.setattr(route_socket, "IPRoute", lambda: writer)


@pytest.mark.parametrize(
    "error",
    [NetlinkError(errno.EPERM), OSError(errno.ENOBUFS, "no space")],
    ids=["kernel", "socket"],
)
def test_a_namespace_that_takes_no_tag(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SimpleNamespace(link=refusing(error), close=lambda: None)
    monkeypatch.setattr(route_socket, "IPRoute", lambda: writer)
    monkeypatch.setattr(netns, "make", lambda: os.open(os.devnull, os.O_RDONLY))
    monkeypatch.setattr(netns, "bind", lambda *_: None)
    with Kernel() as kernel, pytest.raises(KernelError, match="a tag for namespace nat-a"):
        kernel.create_namespace("nat-a", "uuid-a")


def test_a_socket_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SimpleNamespace(link=refusing(OSError(errno.ENOBUFS, "full")), close=lambda: None)
    monkeypatch.setattr(route_socket, "IPRoute", lambda: writer)
    with Kernel() as kernel, pytest.raises(KernelError, match="refuses to set lo up"):
        kernel.host.links.set_up("lo")


@pytest.mark.parametrize(("namespace", "where"), [("nat-a", "nat-a"), (None, "the host")])
def test_a_socket_that_cannot_be_opened(
    namespace: str | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = refusing(OSError(errno.EMFILE, "Too many open files"))
    monkeypatch.setattr(rtnetlink, "Session", refuse)
    monkeypatch.setattr(route_socket, "IPRoute", refuse)
    with Kernel() as kernel:
        for use in (kernel.at(namespace).links.get, kernel.at(namespace).links.set_up):
            with pytest.raises(KernelError, match=f"cannot open a socket in {where}: .*Too many"):
                use("lo")


@pytest.mark.parametrize(("namespace", "where"), [("nat-a", "nat-a"), (None, "the host")])
def test_a_socket_for_a_nic_that_cannot_be_opened(
    namespace: str | None, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = refusing(OSError(errno.EMFILE, "Too many open files"))
    monkeypatch.setattr(nic_link, "Socket", refuse)
    with (
        pytest.raises(KernelError, match=f"cannot open a socket in {where}: .*Too many"),
        nic_link.session(namespace),
    ):
        pass


MAKERS: dict[str, Callable[[Kernel], object]] = {
    "macvlan": lambda kernel: kernel.at("nat-a").macvlans.create("upstream", "0a:0", "eth0", 1500),
    "patch": lambda kernel: kernel.patches.create(PATCH),
    "NIC": lambda _: nic_link.move("eth0", None, "nat-a"),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_link_for_a_namespace_that_has_gone(maker: str) -> None:
    with Kernel() as kernel, pytest.raises(KernelError, match="namespace nat-a is missing"):
        MAKERS[maker](kernel)


@pytest.mark.parametrize("maker", MAKERS)
def test_a_link_for_a_namespace_that_cannot_be_opened(maker: str, tmp_path: Path) -> None:
    (tmp_path / "nat-a").symlink_to("nat-a")
    with (
        Kernel() as kernel,
        pytest.raises(KernelError, match="cannot open network namespace nat-a"),
    ):
        MAKERS[maker](kernel)


def test_a_namespace_that_cannot_be_opened_is_not_entered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(names, "namespace_path", lambda name: str(tmp_path / name))
    (tmp_path / "nat-a").symlink_to("nat-a")
    with (
        pytest.raises(KernelError, match="cannot open network namespace nat-a"),
        netns.entered("nat-a"),
    ):
        pass


def test_a_setting_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", refusing(OSError(errno.EIO, "I/O error")))
    with Kernel() as kernel, pytest.raises(KernelError, match="cannot read net/ipv4/ip_forward"):
        kernel.host.sysctls.get("net/ipv4/ip_forward")


def test_a_bridge_that_goes_while_its_ports_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Path, "is_dir", lambda _: True)
    with Kernel() as kernel, pytest.raises(KernelError, match="there is no link virbr-gone"):
        kernel.host.bridges.port_count("virbr-gone")
