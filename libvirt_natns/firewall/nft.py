# SPDX-License-Identifier: LGPL-2.1-or-later
"""The program nft: started here for single commands, and by ``nft_child`` for the host's.

nft gets commands on its standard input, in one transaction: all of them, or none.
The program is a child of its own, so a fault of nft ends that child alone.  A child belongs
to the namespace of the thread that starts it.

Limits: each start costs 4 ms in an empty namespace, and 7 ms beside libvirt's rules.
``nft_child`` keeps one nft for the host.  ``nfnetlink`` asks the kernel where no program is
needed.
"""

import json
import subprocess
from subprocess import CompletedProcess
from typing import Any

from libvirt_natns.errors import FirewallError
from libvirt_natns.firewall import nfnetlink, nft_child
from libvirt_natns.kernel import netns, processes

TIME_LIMIT = 30.0
"""Seconds after which nft counts as stuck."""

MISSING = "No such file or directory"
"""nft's complaint about a table or chain that does not exist."""


def program() -> str | None:
    """Return the path of nft; None where nft is not installed."""
    return processes.program("nft")


def works() -> bool:
    """True if nft is installed, and the kernel has nftables: else there are no rules of others."""
    return program() is not None and nfnetlink.works()


def require() -> None:
    """Raise FirewallError, with a remedy, where nft is missing or the kernel has no nftables."""
    _required_program()
    # nft reads all elements of all sets for any command.
    if nfnetlink.works():
        return
    done = run(None, "list tables")
    if done.returncode != 0:
        raise FirewallError(
            f"nft does not work here ({condensed(done.stderr)})",
            'load the kernel module nf_tables, or set firewall = "iptables"',
        )


def _required_program() -> str:
    path = program()
    if path is None:
        raise FirewallError(
            "the program nft is missing", 'install nftables, or set firewall = "iptables"'
        )
    return path


def run(namespace: str | None, commands: str, *options: str) -> CompletedProcess[str]:
    """Run nft's commands in a namespace, all or none; None is the caller's own.

    The exit status is for the caller to judge.  Raises FirewallError where nft cannot be
    started or takes longer than ``TIME_LIMIT``, KernelError where the namespace is missing.
    """
    return _run(namespace, (*options, "-f", "-"), commands)


def _run(
    namespace: str | None, arguments: tuple[str, ...], commands: str = ""
) -> CompletedProcess[str]:
    path = _required_program()
    try:
        with netns.entered(namespace):
            return subprocess.run(
                [path, *arguments],
                input=commands,
                capture_output=True,
                encoding="utf-8",
                # A comment in a foreign table consists of any bytes.
                errors="surrogateescape",
                timeout=TIME_LIMIT,
                env={"PATH": processes.PATH, "LC_ALL": "C"},
                check=False,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise FirewallError("cannot run nft", str(error)) from error


def load(namespace: str | None, script: str) -> None:
    """Load a script, all of it or nothing.  Raises FirewallError and KernelError as ``run``."""
    if namespace is None:
        answer = nft_child.ask(_required_program(), script, TIME_LIMIT)
        if answer is not None:
            _check("nft refused the rules", answer.complaint)
            return
    done = run(namespace, script)
    _check("nft refused the rules", _complaint(done))


def _complaint(done: CompletedProcess[str]) -> str:
    """Return what nft said when it failed, never empty; "" if nft has not failed."""
    if done.returncode == 0:
        return ""
    return done.stderr.strip() or f"exit status {done.returncode}"


def _check(what: str, complaint: str) -> None:
    """Raise FirewallError if nft has failed; its complaint is empty otherwise."""
    if complaint:
        raise FirewallError(what, condensed(complaint))


def ruleset_json(table: str = "") -> str:
    """Return everything that nft knows of the caller's namespace, as nft's JSON text.

    With a ``table``, "family name", return that table alone.
    """
    what = "nft cannot list the rules of the host"
    words = f"list table {table}" if table else "list ruleset"
    answer = nft_child.ask(_required_program(), words, TIME_LIMIT, changes=False)
    if answer is not None and answer.listing:
        # nft also complains of foreign rules that it cannot show, and shows all others.
        return answer.listing
    # An argument: with -j, nft reads its input as JSON, and finds it empty the second time.
    done = _run(None, ("-j", "-s", "-t", words))
    _check(what, _complaint(done))
    return done.stdout


def elements(name: str) -> list[Any] | None:
    """Return the elements of a set or map, "family table name", as nft's JSON; None without it.

    An element of a map is a pair.
    """
    for kind in ("set", "map"):
        done = _run(None, ("-j", f"list {kind} {name}"))
        if done.returncode == 0:
            listed = json.loads(done.stdout)["nftables"]
            return [each for item in listed for each in item.get(kind, {}).get("elem", [])]
    return None


def list_chain(chain: str) -> str:
    """Return a chain of the caller's namespace without counters; "family table chain" names it."""
    done = run(None, f"list chain {chain}", "-s")
    if done.returncode == 0:
        return done.stdout
    raise FirewallError(f"nft cannot list the chain {chain}", condensed(done.stderr))


def condensed(stderr: str) -> str:
    """Return nft's complaint as one line, without places in a script that no user sees."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    complaint = next(
        (line for line in lines if "Error:" in line), lines[0] if lines else "no reason"
    )
    return complaint.partition("Error:")[2].strip() or complaint
