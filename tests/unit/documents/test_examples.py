# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every file in xml/ is right, and every word of the schemas is used in one."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lxml import etree

from libvirt_natns import names
from libvirt_natns.documents import config, config_upstream, libvirt_xml, xml_schema_errors
from libvirt_natns.model.network import Domain, LibvirtNetwork

DIRECTORY = names.resource("xml")
NAT = "{urn:libvirt-natns:1}nat"
SCHEMAS = {"network": "natns-network.rng", "domain": "natns-domain.rng"}

EXAMPLES = sorted(DIRECTORY.glob("*.xml"))
NETWORKS = [path for path in EXAMPLES if etree.parse(str(path)).getroot().tag == "network"]
DOMAINS = [path for path in EXAMPLES if path not in NETWORKS]


def network(name: str) -> LibvirtNetwork:
    return libvirt_xml.parse_any_network((DIRECTORY / name).read_bytes(), name)


def domain(name: str) -> Domain:
    return libvirt_xml.parse_domain((DIRECTORY / name).read_bytes(), name)


def read_schema(path: Path) -> etree._Element:
    return etree.parse(str(path)).getroot()


def test_there_are_examples() -> None:
    assert len(NETWORKS) >= 6
    assert len(DOMAINS) >= 2


def test_no_other_files() -> None:
    known = {".xml", ".rng", ".toml"}
    others = [path.name for path in DIRECTORY.iterdir() if path.suffix not in known]
    assert set(others) <= {"__init__.py", "__pycache__", "natns-json.schema.json"}


@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.name)
def test_network(path: Path) -> None:
    found = network(path.name)
    # A network of two hosts has one name and two documents.
    assert found.name == path.stem.removesuffix("-host-b")
    assert found.forward_mode is None
    assert found.subnets or (found.nat and not found.nat.enabled)


@pytest.mark.parametrize("path", DOMAINS, ids=lambda path: path.name)
def test_domain(path: Path) -> None:
    found = domain(path.name)
    assert found.nat is not None
    assert found.nat.forwards or found.nat.addresses
    assert len(found.nics) == 2


def test_domains_are_in_networks_that_are_here() -> None:
    networks = [network(path.name) for path in NETWORKS]
    known = {None, *(each.name for each in networks)}
    bridges = {None, *(each.bridge for each in networks)}
    for path in DOMAINS:
        found = domain(path.name)
        assert {nic.network for nic in found.nics} <= known
        assert {nic.bridge for nic in found.nics} <= bridges
        assert found.nat is not None
        assert {each.network for each in found.nat.forwards + found.nat.addresses} <= known


def test_twins_differ_in_name_and_bridge_only() -> None:
    first, second = network("twin-a.xml"), network("twin-b.xml")
    assert first.subnets == second.subnets
    assert first.subnets[0].hosts
    assert first.name != second.name
    assert first.bridge != second.bridge


def test_disabled() -> None:
    nat = network("disabled.xml").nat
    assert nat is not None
    assert not nat.enabled


def test_stock_network_carries_nothing_of_ours() -> None:
    assert network("isolated.xml").nat is None


def test_annotated_upstream_is_in_the_configuration() -> None:
    nat = network("annotated.xml").nat
    assert nat is not None
    upstream = config.load(DIRECTORY / "config.toml").upstreams[str(nat.upstream)]
    assert upstream.subnet is not None
    assert nat.address in upstream.subnet


def test_configuration() -> None:
    found = config.load(DIRECTORY / "config.toml")
    assert {upstream.kind for upstream in found.upstreams.values()} == {"bridge", "host", "router"}
    text = (DIRECTORY / "config.toml").read_text()
    for key in {
        *config.KEYS,
        *(key for keys in config_upstream.KEYS_OF_KIND.values() for key in keys),
    }:
        assert key in text, f"config.toml does not show {key}"


# Coverage of the schemas


def declared(
    grammar: xml_schema_errors.Grammar, pattern: etree._Element, path: str
) -> Iterator[str]:
    """Each element and attribute that the pattern allows, as a path."""
    for rule in grammar.rules(pattern):
        if rule.kind == "attribute":
            for value in [leaf.text for leaf in grammar.leaves(rule.pattern)]:
                # A listed value counts for itself, a pattern does not.
                yield f"{path}/@{rule.name}" + (f"={value}" if value and value.strip() else "")
        else:
            yield f"{path}/{rule.name}"
            yield from declared(grammar, rule.pattern, f"{path}/{rule.name}")


def used(element: etree._Element, path: str) -> Iterator[str]:
    name = f"{path}/{etree.QName(element).localname}"
    yield name
    for attribute, value in element.attrib.items():
        yield f"{name}/@{attribute}"
        yield f"{name}/@{attribute}={value}"
    for child in element.iterchildren(tag=etree.Element):
        yield from used(child, name)


@pytest.mark.parametrize("kind", SCHEMAS)
def test_every_word_of_the_schema_is_used(kind: str) -> None:
    grammar = xml_schema_errors.load(DIRECTORY / SCHEMAS[kind], read_schema)
    words = set(declared(grammar, grammar.start, ""))
    assert "/nat/portForward/range/@start" in words
    found: set[str] = set()
    for path in NETWORKS if kind == "network" else DOMAINS:
        for nat in etree.parse(str(path)).getroot().iter(NAT):
            found |= set(used(nat, ""))
    assert words - found == set()


def test_every_definition_is_used() -> None:
    for file in SCHEMAS.values():
        grammar = xml_schema_errors.load(DIRECTORY / file, read_schema)
        patterns = [grammar.start, *grammar.defines.values()]
        refs = {
            ref.attrib["name"]
            for each in patterns
            for ref in each.iter(f"{xml_schema_errors.RNG}ref")
        }
        assert set(grammar.defines) == refs


# The schemas by themselves


def extracted(path: Path) -> list[bytes]:
    """The natns:nat elements of an example, each as a document."""
    return [
        etree.tostring(nat, with_tail=False) for nat in etree.parse(str(path)).getroot().iter(NAT)
    ]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_schema_takes_the_bare_element(path: Path) -> None:
    kind = etree.parse(str(path)).getroot().tag
    validator = etree.RelaxNG(file=str(DIRECTORY / SCHEMAS[kind]))
    for nat in extracted(path):
        assert validator.validate(etree.fromstring(nat)), validator.error_log


@pytest.mark.skipif(not shutil.which("xmllint"), reason="xmllint is not installed")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_schema_with_xmllint(path: Path) -> None:
    kind = etree.parse(str(path)).getroot().tag
    for nat in extracted(path):
        command = ["xmllint", "--noout", "--relaxng", str(DIRECTORY / SCHEMAS[kind]), "-"]
        subprocess.run(command, input=nat, check=True, capture_output=True)
