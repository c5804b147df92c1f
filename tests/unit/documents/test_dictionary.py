# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents that were read leave no names behind, however many there are."""

import subprocess
import sys
from pathlib import Path

import pytest

from libvirt_natns.documents import libvirt_xml, xml_dictionary
from libvirt_natns.errors import DocumentError

CHECKOUT = Path(__file__).resolve().parents[3]

MALFORMED = 3000
GROWTH = 6
"""MiB that a process may grow by; with names that stay it is 9."""

MEASURE = f"""
import random
from pathlib import Path
from libvirt_natns.documents import libvirt_xml
from libvirt_natns.errors import NatnsError

def resident():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 // 2**20

def documents(count):
    rng = random.Random(count)
    good = Path("xml/annotated.xml").read_text()
    for number in range(count):
        names = [f"e{{rng.random()}}" for _ in range(60)]
        yield "<network>" + "".join(f"<{{name}} a{{name}}='1'/>" for name in names)
        yield good.replace("portForward", names[0], rng.randint(1, 3))
        yield good[: rng.randrange(len(good))] + names[1]

def read(count):
    for text in documents(count):
        for parse in (libvirt_xml.parse_any_network, libvirt_xml.parse_domain):
            try:
                parse(text.encode())
            except NatnsError:
                pass

read(300)
before = resident()
read({MALFORMED // 3})
print(resident() - before)
"""


def test_memory_stays_flat() -> None:
    command = [sys.executable, "-c", MEASURE]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= GROWTH


def test_a_thread_that_has_read_many_names_reads_on() -> None:
    """libxml2 refuses all documents of a thread whose dictionary is full."""
    for number in range(5):
        names = "".join(f"<e{number}x{each}{'y' * 40}/>" for each in range(100_000))
        with pytest.raises(DocumentError, match="has the name ''"):
            libvirt_xml.parse_any_network(f"<network>{names}</network>".encode())
    assert libvirt_xml.parse_any_network(b"<network><name>a</name></network>").name == "a"


def test_errors_come_through_the_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml_dictionary, "BUDGET", 0)
    with pytest.raises(DocumentError, match="not well-formed"):
        libvirt_xml.parse_any_network(b"<network>")
    assert libvirt_xml.parse_domain(b"<domain><name>a</name></domain>").name == "a"
