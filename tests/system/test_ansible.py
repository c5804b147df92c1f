# SPDX-License-Identifier: LGPL-2.1-or-later
"""The Ansible role, run by Ansible on a machine that has libvirt and nothing of ours.

In a sandbox within this one, where /usr and libvirt's hooks are its own.
"""

import json
import re
from pathlib import Path
from typing import Any

from lab import CHECKOUT, Libvirtd, isolated, natns, run, start_network, virsh
from lab_package import WRITABLE
from lab_vps import ADDRESS, ROUTER, Vps

ROLE = CHECKOUT / "contrib" / "ansible"

# Nothing is left in the home of whoever runs the tests.
HOME = (
    "export ANSIBLE_HOME=/run/home ANSIBLE_REMOTE_TEMP=/run/home/tmp"
    " ANSIBLE_ASYNC_DIR=/run/home/async ANSIBLE_PIPELINING=True HOME=/run/home"
    " ANSIBLE_LOCALHOST_WARNING=False LC_ALL=C.UTF-8; mkdir -p /run/home"
)
PLAY = "ansible-playbook -i localhost, -c local -e @/run/vars.json"

VARS: dict[str, Any] = {
    "natns_config": {
        "upstream": "host",
        "auto_ports": "21000-21999",
        "upstreams": {"host": {"kind": "host", "subnet": "198.18.7.0/24"}},
    },
    "natns_forwards": [
        {"guest": "web", "forward": "8080:80"},
        {"guest": "web", "forward": "2222:22", "source": "192.0.2.0/24"},
        {"guest": "web", "forward": "auto:443"},
    ],
}

GUEST = """\
<domain type='qemu'><name>web</name><memory unit='MiB'>64</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os>
<metadata><other:note xmlns:other="urn:other">kept</other:note></metadata>
<devices><interface type='network'><mac address='52:54:00:00:00:05'/><source network='a'/>
</interface></devices></domain>
"""


def machine(script: str) -> dict[str, str]:
    """Run a shell script beside a libvirt; what it printed, by its "== WORD" lines."""
    sandbox = CHECKOUT / "contrib" / "sandbox"
    done = run(sandbox, "--libvirt", "--", "sh", "-euc", script, timeout=300)
    parts = re.split(r"(?m)^== (.*)\n", "== start\n" + done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def play(name: str, variables: dict[str, Any]) -> str:
    """Lines of a script that run the role, and print what it did under a name."""
    return f"""
        cat >/run/vars.json <<'VARS'
{json.dumps(variables)}
VARS
        echo "== {name}"
        {PLAY} site.yml || true
    """


def changed(said: str) -> int:
    """How many tasks changed something; every one must have gone well."""
    found = re.search(r"ok=\d+ +changed=(\d+) +unreachable=0 +failed=0", said)
    assert found, said
    return int(found[1])


def test_the_role_installs_configures_and_changes_nothing_the_second_time() -> None:
    gone = {**VARS["natns_forwards"][1], "state": "absent"}
    fewer = {**VARS, "natns_forwards": [{"guest": "web", "forward": "8080:8000"}, gone]}
    wrong = {**VARS, "natns_config": {"upstream": "nowhere"}}
    said = machine(f"""
        {WRITABLE}
        cp -R {ROLE} /run/ansible
        {HOME}
        cat >/run/web.xml <<'XML'
{GUEST}
XML
        sed 's/virbr[0-9]*/virbr10/' {CHECKOUT}/xml/isolated.xml >/run/a.xml
        virsh -q net-define {CHECKOUT}/xml/isolated.xml
        name=$(virsh -q net-list --all --name | head -n1)
        sed -i "s/network='a'/network='$name'/" /run/web.xml
        virsh -q net-start $name
        virsh -q define /run/web.xml
        cd /run/ansible
        export natns_source={CHECKOUT}
        {play("first", {**VARS, "natns_source": str(CHECKOUT)})}
        {play("second", {**VARS, "natns_source": str(CHECKOUT)})}
        echo "== status"
        virt-natns status --json
        echo "== guest"
        virsh -q dumpxml --inactive web
        {play("fewer", {**fewer, "natns_source": str(CHECKOUT)})}
        echo "== less"
        virsh -q dumpxml --inactive web
        {play("wrong", {**wrong, "natns_source": str(CHECKOUT)})}
        echo "== configuration"
        cat /etc/libvirt-natns/config.toml
        virt-natns uninstall
    """)
    assert changed(said["first"]) > 0
    assert changed(said["second"]) == 0, said["second"]
    (network,) = json.loads(said["status"])["networks"]
    assert (network["health"], network["address"]) == ("ok", "198.18.7.2")
    assert 'auto_ports = "21000-21999"' in said["configuration"]

    # Each port as it was asked for, beside what was there; then one moved, one gone.
    assert published(said["guest"]) == {"8080:80", "2222:22", "auto:443"}
    assert "<other:note" in said["guest"]
    assert changed(said["fewer"]) > 0
    assert published(said["less"]) == {"8080:8000", "auto:443"}

    # What the program would refuse does not get to its place.
    assert "failed=1" in said["wrong"]
    assert "nowhere" in said["wrong"]
    assert "nowhere" not in said["configuration"]


def published(xml: str) -> set[str]:
    found = re.findall(r"""<natns:range start=['"](\w+)['"] to=['"](\d+)['"]/>""", xml)
    return {f"{start}:{to}" for start, to in found}


def test_the_role_brings_up_a_router(libvirtd: Libvirtd) -> None:
    """In this sandbox itself, whose only NIC moves under Ansible's feet."""
    run("sh", "-euc", WRITABLE)
    wanted = {
        "natns_source": str(CHECKOUT),
        "natns_config": {
            "upstream": "wan",
            "upstreams": {"wan": {"kind": "router", "nic": "ens3", "host_ports": ["tcp/22"]}},
        },
        "natns_router": "wan",
        "natns_router_confirm_within": 60,
    }
    Path("/run/vars.json").write_text(json.dumps(wanted))
    with Vps():
        # It waits for the router; the role must not.
        start_network(isolated("a", "virbr10"))
        first, second, trial = (
            run("sh", "-c", f"{HOME}; cd {ROLE}; {PLAY} {options} site.yml", timeout=200).stdout
            for options in ("", "", "--check")
        )
        try:
            assert changed(first) > 0
            assert changed(second) == 0, second
            assert changed(trial) == 0, trial
            (network,) = json.loads(natns("status", "--json").stdout)["networks"]
            assert (network["network"], network["health"]) == ("a", "ok")
            (router,) = json.loads(natns("router", "status", "--json").stdout)["routers"]
            assert (router["state"], router["confirmed"]) == ("up", True)
            assert f"{ADDRESS}/24" in run("ip", "-n", ROUTER, "address").stdout
        finally:
            virsh("net-destroy", "a")
            virsh("net-undefine", "a")
            natns("router", "down", "wan")
            run(CHECKOUT / "contrib" / "install", "--uninstall")
            Path("/etc/libvirt-natns/config.toml").unlink()


def test_every_variable_is_described() -> None:
    """In the defaults, with the argument specification, and in the page."""
    role = ROLE / "roles" / "libvirt_natns"
    described = Path(role, "meta", "argument_specs.yml").read_text()
    page = Path(CHECKOUT, "docs", "how-to", "ansible.md").read_text()
    for name in re.findall(r"(?m)^(natns_\w+):", Path(role, "defaults", "main.yml").read_text()):
        assert f"      {name}:" in described
        assert f"`{name}`" in page
