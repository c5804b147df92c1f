# SPDX-License-Identifier: LGPL-2.1-or-later
"""The neighbour discovery proxy of a network (ndppd): its process and its configuration.

The provider's link asks for guests with addresses in the provider's own prefix. ndppd hears the
question, and asks it again on the guests' side. ndppd answers only if a guest answers.  So guests
may choose their addresses themselves, and a free address gets no answer.

Stations that are known to be outside are cut out of the prefixes.  Otherwise a guest could
claim the address of the provider's router.  ndppd's sockets belong to links, not to names.
So the configuration bears the indexes of the links: a link that was made again shows.

Known limits of ndppd 0.2.5: it does not answer the question by which another
station finds out whether an address is free (RFC 4862).  It goes on answering
for up to half a minute for a guest that has gone.
"""

import re
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, IPv6Network, summarize_address_range
from pathlib import Path

from libvirt_natns import names
from libvirt_natns.addresses import AddressRange
from libvirt_natns.daemons.text_files import text_if_any
from libvirt_natns.errors import ProxyError
from libvirt_natns.kernel import netns, processes
from libvirt_natns.kernel.locks import make_directory
from libvirt_natns.spans import remaining

START_LIMIT = 10.0
STOP_LIMIT = 3.0
POLL = 0.002

CAPABILITIES = ("net_admin", "net_raw")
"""The needs of ndppd: links that receive all multicast, and packet sockets."""

WAIT = 500
"""Milliseconds that a guest may take to answer."""

KEPT = 30000
"""Milliseconds for which an answer is good for more questions."""

SOCKET = re.compile(r"socket:\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An ndppd, which answers on ``link`` for stations behind ``inner``.

    ``namespace`` None is the host; it may also be a router's.  ndppd answers for ``prefixes``
    but not for ``without``.  Without any prefix, it must not run.
    """

    uuid: str
    namespace: str | None
    link: str
    inner: str
    prefixes: tuple[IPv6Network, ...]
    without: tuple[AddressRange, ...] = ()

    def describe(self) -> str:
        where = f"on {self.link} in {self.namespace or 'the host'}"
        if not self.prefixes:
            return f"no ndppd {where}"
        return f"ndppd {where} for {', '.join(map(str, self.prefixes))} behind {self.inner}"

    @property
    def in_host(self) -> bool:
        return is_beyond(self.namespace)

    def file(self, suffix: str) -> Path:
        """Return the path of its configuration ("conf"), or of its pid file ("pid")."""
        return _file(self.uuid, suffix, in_host=self.in_host)

    @property
    def answered(self) -> tuple[IPv6Network, ...]:
        """The prefixes without the addresses that are known to be outside."""
        return tuple(part for prefix in self.prefixes for part in _parts(prefix, self.without))


def is_beyond(namespace: str | None) -> bool:
    """True if a namespace routes a transit bridge: the host, or a router."""
    return namespace is None or namespace.startswith(names.ROUTER_PREFIX)


def _parts(prefix: IPv6Network, without: Iterable[AddressRange]) -> Iterator[IPv6Network]:
    """Yield the parts of a prefix that remain without some ranges."""
    whole = int(prefix.network_address), int(prefix.broadcast_address)
    excluded = [(int(span.first), int(span.last)) for span in without if span.first.version == 6]
    for first, last in remaining(whole, excluded):
        yield from summarize_address_range(IPv6Address(first), IPv6Address(last))


def configuration(proxy: Proxy, indexes: tuple[int, int]) -> str:
    """Return the text of the configuration; ``indexes`` are those of ``link`` and ``inner``."""
    rules = "".join(
        f"    rule {part} {{\n        iface {proxy.inner}\n    }}\n" for part in proxy.answered
    )
    return (
        f"# {proxy.link} is link {indexes[0]}, {proxy.inner} is link {indexes[1]}\n"
        f"proxy {proxy.link} {{\n"
        # Guests are no routers to the stations of the provider's link.
        f"    router no\n    timeout {WAIT}\n    ttl {KEPT}\n{rules}}}\n"
    )


# -- process -----------------------------------------------------------------


def program() -> str:
    """Return the path of ndppd.  Raises ProxyError where it is not installed."""
    missing = ProxyError(
        "ndppd is not installed, and guests in a provider's own IPv6 prefix need it",
        "install the package ndppd",
    )
    return processes.required("ndppd", missing)


def _file(uuid: str, suffix: str, *, in_host: bool) -> Path:
    """Return a file of a network's ndppd, in its namespace or beyond the transit bridge."""
    return names.network_directory(uuid) / f"ndppd{'-host' if in_host else ''}.{suffix}"


def differences(proxy: Proxy, indexes: tuple[int, int]) -> list[str]:
    """Return, in words, each difference of a network's ndppd; none where all is well."""
    where = proxy.namespace or "the host"
    alive = running(proxy.uuid, proxy.namespace) is not None
    if not proxy.prefixes:
        return [f"ndppd in {where} should not run"] if alive else []
    if not alive:
        return [f"ndppd on {proxy.link} in {where} is not running"]
    if text_if_any(proxy.file("conf")) != configuration(proxy, indexes):
        return [f"ndppd on {proxy.link} in {where} runs with an outdated configuration"]
    return []


def running(uuid: str, namespace: str | None) -> int | None:
    """Return the process id of a network's ndppd in its namespace, or in the host, if it runs."""
    pid = _known(uuid, in_host=is_beyond(namespace))
    return pid if pid is not None and processes.lives_in(pid, namespace) else None


def is_wanted(uuid: str, namespace: str | None) -> bool:
    """True if a network was given an ndppd there that has not been stopped since."""
    return _file(uuid, "conf", in_host=is_beyond(namespace)).exists()


def _known(uuid: str, *, in_host: bool) -> int | None:
    """Return the process id in the pid file, if that process is this ndppd."""
    word = str(_file(uuid, "conf", in_host=in_host))
    return processes.from_pid_file(_file(uuid, "pid", in_host=in_host), word)


def _processes(uuid: str, *, in_host: bool) -> list[int]:
    """Return the processes of an ndppd, in any namespace.

    All processes are searched where the pid file does not name it: on a full disk it is empty.
    """
    pid, file = _known(uuid, in_host=in_host), _file(uuid, "conf", in_host=in_host)
    if pid is not None:
        return [pid]
    return processes.with_word(str(file)) if file.exists() else []


def ensure(proxy: Proxy, indexes: tuple[int, int]) -> None:
    """Have a network's ndppd run as it should.  ndppd reads its configuration only once.

    Raises ProxyError where it does not run.
    """
    if not differences(proxy, indexes):
        return
    _stop(proxy.uuid, in_host=proxy.in_host)
    if proxy.prefixes:
        file = proxy.file("conf")
        make_directory(file.parent)
        file.write_text(configuration(proxy, indexes))
        _start(proxy)


def _start(proxy: Proxy) -> None:
    where = f"on {proxy.link} in {proxy.namespace or 'the host'}"
    command = [*processes.confined(*CAPABILITIES), program(), "-d"]
    for option, suffix in (("-c", "conf"), ("-p", "pid")):
        command += [option, str(proxy.file(suffix))]
    try:
        with netns.entered(proxy.namespace):
            status = subprocess.run(
                command,
                env={"PATH": processes.PATH},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                start_new_session=True,
                timeout=START_LIMIT,
                check=False,
            ).returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProxyError(f"cannot start ndppd {where}", str(error)) from error
    if status or not _await_sockets(proxy):
        raise ProxyError(f"ndppd does not start {where}", "see the system log")


def _await_sockets(proxy: Proxy) -> bool:
    """Wait until ndppd listens: it goes into the background before it opens a socket."""
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        pid = _known(proxy.uuid, in_host=proxy.in_host)
        if pid is not None and _listens(pid):
            return True
        time.sleep(POLL)
    return False


def _listens(pid: int) -> bool:
    """True if a process has a packet socket."""
    try:
        lines = Path(f"/proc/{pid}/net/packet").read_text().splitlines()[1:]
        opened = [str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:
        return False
    own = {socket[1] for target in opened if (socket := SOCKET.fullmatch(target))}
    return any(line.split()[-1] in own for line in lines)


def stop(uuid: str) -> None:
    """End a network's ndppd, in its namespace and in the host; missing is success.

    Raises ProxyError where an ndppd does not end.
    """
    for in_host in (False, True):
        _stop(uuid, in_host=in_host)


def stop_in(namespace: str) -> None:
    """End the ndppd of every network in a router's namespace.  Raises ProxyError.

    This works also for a namespace that has lost its name and lives only by its processes.
    """
    routers = names.NETNS_DIRECTORY.glob(f"{names.ROUTER_PREFIX}*")
    others = (None, *(router.name for router in routers if router.name != namespace))
    for file in names.RUN_DIRECTORY.glob("networks/*/ndppd-host.conf"):
        uuid = file.parent.name
        for pid in _processes(uuid, in_host=True):
            if not any(processes.lives_in(pid, other) for other in others):
                _stop(uuid, in_host=True)
                break


def _stop(uuid: str, *, in_host: bool) -> None:
    file = _file(uuid, "conf", in_host=in_host)
    if not processes.end(_processes(uuid, in_host=in_host), str(file), STOP_LIMIT):
        raise ProxyError(f"ndppd with {file} does not end", "end it by hand")
    for suffix in ("pid", "conf"):
        _file(uuid, suffix, in_host=in_host).unlink(missing_ok=True)
