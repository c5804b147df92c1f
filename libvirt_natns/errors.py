# SPDX-License-Identifier: LGPL-2.1-or-later
"""Types of errors.

Every error states a fact and, if possible, a remedy.  Together they are the single line that virsh
or the shell shows.  The module that owns a library or a program converts its errors, so that no
module above sees them.
"""

import sys

NO_ROOM = (28, 30, 122)
"""ENOSPC, EROFS and EDQUOT: the file system has no room, or is read-only."""

LONGEST = 900
"""Characters of a fact, and of a remedy: both quote names of any length."""


def printable(text: str) -> str:
    """Return ``text`` as one line without control or format characters.

    Runs of blanks and line breaks become one blank.  Other characters that do not print are
    escaped: control characters would command the terminal, and bidirectional ones would reorder the
    line.  A text longer than ``LONGEST`` loses its middle.
    """
    line = " ".join(text.split())
    if not line.isprintable():
        line = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)
    if len(line) <= LONGEST:
        return line
    half = (LONGEST - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


class NatnsError(Exception):
    """Base of all errors that a person is meant to read.

    ``fact`` says what is wrong and where, ``remedy`` what to do about it.
    """

    def __init__(self, fact: str, remedy: str = "") -> None:
        super().__init__(fact, remedy)
        self.fact = printable(fact)
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{self.fact}: {self.remedy}" if self.remedy else self.fact


class DocumentError(NatnsError):
    """XML that is not acceptable: ill-formed, unsafe, or against the schema."""


class ConfigError(NatnsError):
    """A wrong key, type or value in the configuration file."""


class LeaseError(NatnsError):
    """No upstream address can be had, or not the wanted one."""


class UpstreamError(NatnsError):
    """The upstream that a network names is missing or unusable."""


class RouterError(NatnsError):
    """A router namespace cannot be made, or not as things are."""


class ConflictError(NatnsError):
    """Two networks, or a network and something foreign, claim the same thing."""


class StoreError(NatnsError):
    """The state database, or run-time state, cannot be read or written."""


class DamagedError(StoreError):
    """The state database is damaged, or missing although networks run."""


class FormatError(StoreError):
    """The state database is whole, but of a later version's format."""


class AddressTakenError(NatnsError):
    """Another station has an upstream address that was leased to a network.

    ``namespace`` is the network's, ``address`` as text.
    """

    def __init__(self, namespace: str, address: str) -> None:
        super().__init__(f"address {address} of {namespace} is in use by another machine")
        self.namespace = namespace
        self.address = address


class LockError(NatnsError):
    """Another process holds a lock and does not end."""


class ServiceError(NatnsError):
    """The resident service cannot run, or does not answer."""


class KernelError(NatnsError):
    """The kernel refused a namespace, link, address, route or sysctl."""


class FirewallError(NatnsError):
    """A rule set could not be loaded or read."""


class DnsmasqError(NatnsError):
    """dnsmasq could not be started, reached or ended."""


class DhcpError(NatnsError):
    """A DHCP client could not be started or ended, or gets no answer."""


class ProxyError(NatnsError):
    """ndppd could not be started or ended."""


class LibvirtError(NatnsError):
    """libvirt could not be reached, or refused a request."""


class InstallError(NatnsError):
    """Installing or removing the hooks failed."""


class RouterFileError(StoreError):
    """A router's file has a content that this version cannot read."""


def describe(error: Exception) -> tuple[str, list[str]]:
    """Return an error in one line, and further lines for the log alone.

    The log's lines are a traceback where the error is none that a person is meant to read.
    """
    line = str(error)
    if isinstance(error, NatnsError):
        return line, []
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        file = error.filename or "a file"
        return f"cannot write {file} ({error.strerror}): free some space", []
    if isinstance(error, ImportError):
        missing = f"cannot load {error.name or 'a module'}: install it for {sys.executable}"
        return missing, [f"{missing} ({error})"]
    import traceback

    cause = f"{type(error).__name__}: {printable(line)}"
    lines = "".join(traceback.format_exception(error)).splitlines()
    return f"internal error ({cause}): see the system log and report it", lines


def named(name: str, error: Exception) -> str:
    """Return an error in one line that has ``name``; the lines for the log go to the system log."""
    line, more = describe(error)
    log(more)
    return line if name in line else f"{name}: {line}"


def log(lines: list[str]) -> None:
    """Write lines to the system log, for processes without a log of their own."""
    if not lines:
        return
    import syslog

    syslog.openlog("libvirt-natns", syslog.LOG_PID, syslog.LOG_DAEMON)
    for line in lines:
        syslog.syslog(syslog.LOG_ERR, line)
