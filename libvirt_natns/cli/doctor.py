# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command doctor: examine whether this machine has what libvirt-natns needs.

An examination changes nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from libvirt_natns import names
from libvirt_natns.cli import json_text, libvirt_checks, machine_checks, service_control, trust
from libvirt_natns.cli.access import Engines
from libvirt_natns.daemons import dnsmasq_process
from libvirt_natns.documents import config
from libvirt_natns.engine import names_health
from libvirt_natns.engine.reconcile import comparison
from libvirt_natns.errors import ConfigError, NatnsError, describe, log
from libvirt_natns.firewall import neighbour_tables
from libvirt_natns.model.configuration import Config

Examination = Callable[[], str]
"""Returns a line about what is well.  Raises NatnsError with the fault and its fix.

Another error is a fault as well: a damaged file may have any content.
"""

BY_CONFIGURATION = frozenset(
    (
        "namespaces and links",
        "firewall",
        "upstream",
        "IPv6",
        "host's firewall",
        "networks",
        "guests",
        "ways out",
        "foreign chains",
        "neighbour tables",
    )
)
"""Subjects that are judged by the configuration.

By the defaults, networks on an upstream of a broken configuration would seem to be damaged."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A line: the subject of an examination, and its result."""

    what: str
    state: Literal["ok", "warn", "broken"]
    said: str


def examine(engine: Engines) -> list[Diagnosis]:
    """Run all examinations, in the order in which an administrator would fix their faults."""
    settings, diagnosis = _configuration()
    subjects: dict[str, Callable[[], list[Diagnosis]]] = {
        what: partial(_examined, what, examination)
        for what, examination in examinations(engine, settings)
    }
    subjects |= {
        "foreign chains": lambda: _obstacles(engine, settings),
        "names": _names,
        "neighbour tables": lambda: neighbour_warnings(engine, settings),
        "code": lambda: [trusted()],
    }
    diagnoses, skipped = [diagnosis], list[str]()
    for what, examine_one in subjects.items():
        if diagnosis.state == "broken" and what in BY_CONFIGURATION:
            skipped.append(what)
            continue
        try:
            diagnoses += examine_one()
        except Exception as error:  # an error must not keep the other examinations
            diagnoses.append(_broken(what, error))
    if skipped:
        said = f"not examined, as the configuration is broken: {', '.join(skipped)}"
        diagnoses.append(Diagnosis("others", "warn", said))
    return diagnoses


def _examined(what: str, examination: Examination) -> list[Diagnosis]:
    return [Diagnosis(what, "ok", examination())]


def _broken(what: str, error: Exception) -> Diagnosis:
    line, more = describe(error)
    log(more)
    return Diagnosis(what, "broken", line)


def trusted() -> Diagnosis:
    """Examine whether the code that hooks run as root is root's alone."""
    findings = trust.findings()
    if not findings:
        return Diagnosis("code", "ok", "only root may write the package and the interpreter")
    more = f" (and {len(findings) - 1} more)" if len(findings) > 1 else ""
    return Diagnosis(
        "code",
        "warn",
        f"{findings[0]}{more}, and hooks run this code as root:"
        " install libvirt-natns where only root may write",
    )


def text(diagnoses: Iterable[Diagnosis]) -> str:
    """Return the diagnoses, a line each."""
    return "\n".join(f"{line.state:<6}  {line.what}: {line.said}" for line in diagnoses)


def as_json(diagnoses: Iterable[Diagnosis]) -> str:
    """Return the diagnoses for programs."""
    listed = [{"check": line.what, "state": line.state, "text": line.said} for line in diagnoses]
    return json_text.dumped({"checks": listed})


def _configuration() -> tuple[Config, Diagnosis]:
    """Return the configuration, or the defaults where it is wrong, and its diagnosis."""
    try:
        settings = config.load()
    except ConfigError as error:
        return Config(), Diagnosis("configuration", "broken", str(error))
    there = names.CONFIG_FILE if names.CONFIG_FILE.exists() else "no file, the defaults apply"
    said = f"{there}; scope {settings.scope}, upstream {settings.upstream}"
    return settings, Diagnosis("configuration", "ok", said)


def examinations(engine: Engines, settings: Config) -> list[tuple[str, Examination]]:
    """Return the examinations, each with its subject."""
    return [
        ("program dnsmasq", dnsmasq_process.program),
        ("Python modules", machine_checks.python_modules),
        ("namespaces and links", lambda: machine_checks.links(settings)),
        ("firewall", lambda: machine_checks.firewall_backend(settings)),
        ("upstream", lambda: machine_checks.default_upstream(settings)),
        ("IPv6", lambda: machine_checks.ipv6(settings)),
        ("state database", machine_checks.state_database),
        ("hooks", libvirt_checks.hooks),
        ("service", service_control.examine),
        ("libvirt", libvirt_checks.connection),
        ("hooks in libvirt", libvirt_checks.hooks_seen),
        ("firewalld", machine_checks.firewalld_zone),
        ("host's firewall", lambda: libvirt_checks.host_rules(engine, settings)),
        ("networks", lambda: libvirt_checks.networks(engine, settings)),
        ("guests", lambda: libvirt_checks.guests(engine, settings)),
        ("ways out", lambda: libvirt_checks.ways_out(engine, settings)),
    ]


def _obstacles(engine: Engines, settings: Config) -> list[Diagnosis]:
    """Warn of chains of others that stop the networks' packets."""
    try:
        with engine(settings) as verbs:
            notes = comparison.host_stops(verbs).lines
    except NatnsError:
        # Another examination reports the reason.
        return []
    return [Diagnosis("foreign chains", "warn", note) for note in notes]


def _names() -> list[Diagnosis]:
    """Examine whether the DNS relays serve, and whether the host's servers answer."""
    notes = names_health.notes()
    silent = "" if notes else machine_checks.silent_resolvers()
    if silent:
        notes = [f"no resolver of the host answers ({silent})"]
    if notes:
        return [Diagnosis("names", "warn", note) for note in notes]
    return [Diagnosis("names", "ok", "the host's resolvers answer")]


def neighbour_warnings(engine: Engines, settings: Config) -> list[Diagnosis]:
    """Warn of neighbour tables without room for the networks that there are."""
    try:
        with engine(settings) as verbs:
            networks = len(verbs.store.host.users())
    except NatnsError:
        # Another examination reports the reason.
        return []
    room = neighbour_tables.examine(networks)
    return [Diagnosis("neighbour tables", "warn" if room.tight else "ok", room.said)]
