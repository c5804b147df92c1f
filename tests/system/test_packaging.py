# SPDX-License-Identifier: LGPL-2.1-or-later
"""What gets installed works without the checkout: by pip alone, and by contrib/install.

Each test runs a script in a sandbox of its own, within this one: /usr/local and
libvirt's hooks are nobody else's there.  There is no network, so pip builds with
what the machine has.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from lab import CHECKOUT, PYTHON, run

SOURCES = "setup.cfg pyproject.toml README.md LICENSE libvirt_natns hooks xml contrib man"

CLONE = f"""
    mkdir /run/clone
    (cd {CHECKOUT} && cp -R {SOURCES} /run/clone)
    find /run/clone -name __pycache__ -prune -exec rm -r {{}} +
"""

STRAYS = """
    mkdir -p /run/clone/hooks/__pycache__ /run/clone/xml/__pycache__
    for stray in hooks/__pycache__/network.pyc hooks/network.orig xml/__pycache__/x.pyc \\
        xml/isolated.xml~ libvirt_natns/firewall/rule.py.rej; do
        echo stray >/run/clone/$stray
    done
"""

PIP = f"{PYTHON} -I -m pip --isolated -q"
OPTIONS = (
    "--no-index --no-deps --no-build-isolation --break-system-packages --root-user-action=ignore"
)

TWINS = f"""
    for twin in a b; do
        virsh -q net-define {CHECKOUT}/xml/twin-$twin.xml
        virsh -q net-start twin-$twin
    done
"""

WRITABLE = """
    mkdir -p /run/local/upper /run/local/work
    mount -t overlay -o lowerdir=/usr/local,upperdir=/run/local/upper,workdir=/run/local/work \\
        sandbox /usr/local
"""


def inside(script: str) -> dict[str, str]:
    """Run a shell script in a sandbox with a fresh libvirt; the output by its "== WORD" lines."""
    sandbox = CHECKOUT / "contrib" / "sandbox"
    done = run(sandbox, "--libvirt", "--", "sh", "-euc", script, timeout=120)
    parts = re.split(r"(?m)^== (.*)\n", "== start\n" + done.stdout)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def files_below(directory: Path) -> set[str]:
    return {os.fspath(f.relative_to(directory)) for f in directory.rglob("*") if f.is_file()}


def test_pip_installs_all_that_is_needed() -> None:
    said = inside(f"""
        {CLONE}
        {STRAYS}
        {PIP} install {OPTIONS} --no-compile --prefix /run/prefix /run/clone
        rm -r /run/clone
        cd /
        export PYTHONPATH=$(echo /run/prefix/local/lib/python3*/dist-packages)
        echo "== files"
        (cd $PYTHONPATH/libvirt_natns && find . -type f)
        echo "== version"
        /run/prefix/local/bin/virt-natns --version
        echo "== plan"
        /run/prefix/local/bin/virt-natns plan {CHECKOUT}/xml/isolated.xml
        echo "== schema"
        /run/prefix/local/bin/virt-natns plan {CHECKOUT}/xml/natns-ip.xml
        echo "== install"
        /run/prefix/local/bin/virt-natns install
        echo "== library"
        grep "^library=$PYTHONPATH$" /etc/libvirt/hooks/network
        unset PYTHONPATH
        {TWINS}
        echo "== namespaces"
        ip netns list
    """)
    check_content(set(said["files"].split()))
    assert re.fullmatch(r"virt-natns \d+\.\d+\.\d+\n", said["version"])
    assert "namespace nat-isolated\n" in said["plan"]
    assert "namespace nat-natns-ip\n" in said["schema"]
    assert "installed /etc/libvirt/hooks/network\n" in said["install"]
    spaces = {line.split()[0] for line in said["namespaces"].splitlines()}
    assert spaces == {"nat-twin-a", "nat-twin-b"}


def check_content(found: set[str]) -> None:
    """All modules, hooks, schemas and examples, and nothing else."""
    modules = {f"./{f}" for f in files_below(CHECKOUT / "libvirt_natns") if f.endswith(".py")}
    data = {f"./xml/{f}" for f in files_below(CHECKOUT / "xml") if "__pycache__" not in f}
    assert found == modules | data | {
        "./hooks/network",
        "./hooks/qemu",
        "./hooks/lxc",
        "./py.typed",
    }


def test_contrib_install_and_uninstall() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        (cd /run/clone && find . | sort >/run/files)
        rm -rf /usr/local/bin/* # as on a fresh machine
        chmod 2775 /usr/local/bin
        find /usr/local -printf '%p %m\\n' | sort >/run/before
        cd /
        /run/clone/contrib/install --scope annotated
        (cd /run/clone && find . | sort | diff /run/files -)
        echo "== again"
        /run/clone/contrib/install --scope isolated
        mv /run/clone /run/clone.moved
        echo "== version"
        virt-natns --version
        echo "== manual"
        (cd /usr/local/share/man && find . -name '*natns*' | sort)
        {TWINS}
        echo "== status"
        virt-natns status
        echo "== doctor"
        virt-natns doctor
        mv /run/clone.moved /run/clone
        virsh -q net-destroy twin-b
        echo "== uninstall"
        /run/clone/contrib/install --uninstall
        echo "== local"
        find /usr/local -printf '%p %m\\n' | sort | diff /run/before - || :
        echo "== left"
        find /etc/libvirt/hooks /etc/libvirt-natns /var/lib/libvirt-natns -type f
        ip netns list
        echo "== bridge"
        ip -br -4 address show virbr10
        echo "== nothing to uninstall"
        /run/clone/contrib/install --uninstall
    """)
    assert "installed /usr/local/bin/virt-natns\n" in said["start"]
    assert "scope = annotated\n" in said["start"]
    assert "systemd does not run here: start the service with virt-natns serve\n" in said["start"]
    assert "scope = isolated\n" in said["again"]
    assert said["version"].startswith("virt-natns ")
    pages = sorted(f"./man{page.suffix[1:]}/{page.name}" for page in (CHECKOUT / "man").iterdir())
    assert said["manual"].splitlines() == pages
    assert said["status"].count(" ok\n") == 2
    assert "broken" not in said["doctor"]
    assert "removed /usr/local/bin/virt-natns\n" in said["uninstall"]
    assert said["local"] == ""
    assert said["left"] == ""
    assert "10.0.0.1/24" in said["bridge"]
    assert said["nothing to uninstall"] == ""


SYSTEMCTL = """
    mkdir -p /run/systemd/system /usr/local/sbin
    cat >/usr/local/sbin/systemctl <<'END'
#!/bin/sh
while case $1 in --*) true ;; *) false ;; esac; do shift; done
echo "$*" >>/run/asked
[ "$1" != cat ] || test -e /usr/local/lib/systemd/system/"$2"
END
    chmod +x /usr/local/sbin/systemctl
    # The first place of root's PATH, and of ours.
    PATH=/usr/local/sbin:$PATH
"""
BOTH = "libvirt-natns.socket libvirt-natns.service"


def test_contrib_install_has_systemd_run_the_service() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        {SYSTEMCTL}
        rm -rf /usr/local/lib/systemd
        echo "== install"
        /run/clone/contrib/install
        echo "== units"
        (cd /usr/local/lib/systemd/system && for unit in *; do
            stat -c "%n %a" $unit
            diff $unit {CHECKOUT}/contrib/systemd/$unit
        done)
        echo "== asked"
        grep -v ^cat /run/asked
        rm /run/asked
        echo "== uninstall"
        /run/clone/contrib/install --uninstall
        echo "== then asked"
        grep -v ^cat /run/asked
        echo "== left"
        ls -d /usr/local/lib/systemd 2>/dev/null || :
    """)
    assert f"systemd runs {BOTH.replace(' ', ' and ')}\n" in said["install"]
    units = ("libvirt-natns-router@.service", "libvirt-natns.service", "libvirt-natns.socket")
    assert said["units"].splitlines() == [f"{unit} 644" for unit in units]
    assert said["asked"].splitlines() == [
        "daemon-reload",
        # A newer version takes over at once.
        "try-restart libvirt-natns.service",
        f"enable --now {BOTH}",
    ]
    assert f"stopped {BOTH.replace(' ', ' and ')}\n" in said["uninstall"]
    assert said["then asked"].splitlines() == [f"disable --now {BOTH}", "daemon-reload"]
    assert said["left"] == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_units() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        /run/clone/contrib/install >/dev/null
        for file in /usr/local/lib/systemd/system/libvirt-natns.* {CHECKOUT}/contrib/systemd/*; do
            # Its complaints are about other units, too.
            systemd-analyze verify --man=no $file 2>&1 | grep libvirt-natns || :
        done
    """)
    assert said["start"] == ""


def test_contrib_install_removes_what_an_older_python_had() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        old=/usr/local/lib/python3.2/dist-packages
        mkdir -p $old/libvirt_natns $old/libvirt_natns-0.0.1.dist-info $old/other
        /run/clone/contrib/install >/dev/null
        echo "== left"
        ls $old
    """)
    assert said["left"] == "other\n"


@pytest.mark.parametrize("arguments", ["--scope everything", "--scope", "--uninstall now", "x"])
def test_contrib_install_refuses_what_it_does_not_know(arguments: str) -> None:
    done = run(CHECKOUT / "contrib" / "install", *arguments.split(), check=False)
    assert done.returncode == 2
    assert "contrib/install [--scope isolated|annotated]" in done.stderr
    assert done.stdout == ""


def test_directory_xml_does_not_hide_pythons_own() -> None:
    assert not (CHECKOUT / "xml" / "__init__.py").exists()
    program = "import xml.dom, sys; print(xml.__file__)"
    environment = {"PYTHONPATH": os.fspath(CHECKOUT)}
    found = run(PYTHON, "-c", program, env=environment).stdout
    assert not found.startswith(os.fspath(CHECKOUT))


def test_first_network_of_a_fresh_libvirt_may_be_one_of_ours() -> None:
    """libvirt makes the directory of its leases only when it starts a dnsmasq itself."""
    said = inside(f"""
        cd {CHECKOUT}
        test ! -e /var/lib/libvirt/dnsmasq
        {PYTHON} -m libvirt_natns install
        virsh -q net-define xml/natns-ip.xml
        virsh -q net-start natns-ip
        echo "== status"
        {PYTHON} -m libvirt_natns status
    """)
    assert re.search(r"(?m)^natns-ip .* ok$", said["status"])
