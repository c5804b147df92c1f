# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs all parts, or the named parts; bench/run starts this program in the sandbox.

    bench/run [OPTION...] [PART...]

Prints a table when a part is done, and writes report.json, report.md and
report.svg into bench/results/.
"""

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import data_path
import foreign
import lab
import net_start
import pasta
import peers
import plot
import scale
import set_up
from report import Part, Report, markdown_of, read, summary, text_of
from world import Hooks, Options, has_service

from libvirt_natns.errors import NatnsError

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
PAGE = lab.CHECKOUT / "docs" / "reference" / "benchmarks.md"
PICTURE = PAGE.with_suffix(".svg")
BEGIN, END = "<!-- begin: bench/run --docs -->", "<!-- end -->"

PARTS: dict[str, Callable[[Options, Hooks], Part]] = {
    "set-up": set_up.measure,
    "net-start": net_start.measure,
    "foreign": foreign.measure,
    "scale": scale.measure,
    "data-path": data_path.measure,
    "pasta": pasta.measure,
}

USUAL = Options(rounds=None, networks=100, forwards=10_000, seconds=1)
QUICK = Options(rounds=3, networks=20, forwards=1_000, seconds=1)

PACKAGES = (
    "libvirt-daemon", "python3-pyroute2", "nftables", "dnsmasq-base", "iproute2",
    "containernetworking-plugins", "netavark", "passt", "iperf3", "sockperf",
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench/run", description="How fast it is, and others.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="few rounds: does it run at all?")
    parser.add_argument("--rounds", type=int, help="of each part (usually 5 to 11)")
    parser.add_argument("--networks", type=int, help="of the part scale, 10 to 1000 (100)")
    parser.add_argument("--forwards", type=int, help="of the part data-path (10000)")
    parser.add_argument("--seconds", type=int, help="of each measure of the data path (1)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the results")
    parser.add_argument("--markdown", action="store_true", help="print the last run's tables")
    parser.add_argument("--docs", action="store_true", help=f"put them into {PAGE.name}")
    found = parser.parse_args()
    unknown = [part for part in found.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]}: {', '.join(PARTS)}")
    return found


def options_of(given: argparse.Namespace) -> Options:
    usual = QUICK if given.quick else USUAL
    return Options(
        rounds=given.rounds or usual.rounds,
        networks=min(max(given.networks or usual.networks, 10), 1000),
        forwards=given.forwards or usual.forwards,
        seconds=given.seconds or usual.seconds,
    )


def machine() -> dict[str, str]:
    """Return the machine and the versions that the figures hold for."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    release = platform.freedesktop_os_release()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "CPU": f"{os.cpu_count()} of {cpu()}",
        "kernel": platform.release(),
        "system": f"{release['NAME']} {release['VERSION_ID']}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "service": "yes" if has_service() else "no",
    }


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def version(package: str) -> str:
    words = ("dpkg-query", "-W", "-f", "${Version}", package)
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout or "?"


def run(options: Options, parts: list[str]) -> Report:
    """Measure the parts, and print each result at once."""
    begin = time.monotonic()
    lab.require_sandbox()
    daemon = lab.Libvirtd()
    daemon.start()
    daemon.prime()
    hooks = Hooks()
    asked = {key: value for key, value in asdict(options).items() if value is not None}
    report = Report(machine(), asked, peers=peers.shown())
    for name in parts:
        print(f"... {name}", file=sys.stderr, flush=True)
        start = time.monotonic()
        part = _measured(name, options, hooks)
        part.seconds = time.monotonic() - start
        report.parts.append(part)
        print(f"{text_of(part)}\n", flush=True)
    report.seconds = time.monotonic() - begin
    return report


def _measured(name: str, options: Options, hooks: Hooks) -> Part:
    """Measure a part; a failure is reported, and the other parts go on."""
    try:
        return PARTS[name](options, hooks)
    except (lab.LabError, NatnsError) as error:
        hooks.use("none")
        print(f"bench/run: {name}: {error}", file=sys.stderr, flush=True)
        return Part(name, name, failed=str(error).strip().splitlines()[0])


def tell(report: Report, directory: Path) -> None:
    """Print the summary, and write the files."""
    print("What the peers run:\n")
    for name, commands in report.peers.items():
        print(f"{name}:\n    " + commands.replace("\n", "\n    ") + "\n")
    print(f"{summary(report)} {report.seconds:.0f} s; see {directory}/report.*")
    directory.mkdir(parents=True, exist_ok=True)
    report.write(directory / "report.json")
    plot.draw(report, directory / "report.svg")
    (directory / "report.md").write_text(markdown_of(report))


def write_page(report: Report) -> None:
    """Put the last run's tables and picture into the documentation."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{markdown_of(report)}{END}{tail}")
    plot.draw(report, PICTURE)


def main() -> int:
    given = arguments()
    if given.markdown or given.docs:
        try:
            report = read(given.output / "report.json")
        except (OSError, ValueError) as error:
            print(f"bench/run: no results to tell of: {error}", file=sys.stderr)
            return 1
        if given.docs:
            write_page(report)
        if given.markdown:
            print(markdown_of(report), end="")
        return 0
    report = run(options_of(given), given.parts or list(PARTS))
    tell(report, given.output)
    return 1 if any(part.failed for part in report.parts) else 0


if __name__ == "__main__":
    sys.exit(main())
