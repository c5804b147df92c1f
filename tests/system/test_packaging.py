# SPDX-License-Identifier: LGPL-2.1-or-later
"""What gets installed works without the checkout: by pip alone, and by contrib/install.

Each test runs a script in a sandbox of its own, within this one: /usr and libvirt's hooks are
nobody else's there.  There is no network, so pip and dpkg build with what the machine has.
"""

import os
import re
import shutil
from pathlib import Path

import pytest
from lab import CHECKOUT, PYTHON, run
from lab_package import SOURCES, WRITABLE, built, inside

CLONE = f"""
    mkdir /run/clone
    (cd {CHECKOUT} && cp -R {" ".join(SOURCES)} /run/clone)
    find /run/clone -name __pycache__ -prune -exec rm -r {{}} +
"""

STRAYS = """
    mkdir -p /run/clone/hooks/__pycache__ /run/clone/xml/__pycache__
    for stray in hooks/__pycache__/network.pyc hooks/network.orig xml/__pycache__/x.pyc \\
        xml/isolated.xml~ libvirt_natns/firewall/rule.py.rej; do
        echo stray >/run/clone/$stray
    done
"""

SYSTEMD, MANUAL = CHECKOUT / "contrib" / "systemd", CHECKOUT / "man"
SHELLS = CHECKOUT / "contrib" / "completion"
COMPLETION = {
    "virt-natns": "share/bash-completion/completions/virt-natns",
    "_virt-natns": "share/zsh/site-functions/_virt-natns",
    "virt-natns.fish": "share/fish/vendor_completions.d/virt-natns.fish",
}

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
        echo "== data"
        (cd /run/prefix/local && find share lib/systemd -type f)
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
    units = {f"lib/systemd/system/{file.name}" for file in SYSTEMD.iterdir()}
    pages = {f"share/man/man{file.suffix[1:]}/{file.name}" for file in MANUAL.iterdir()}
    completion = {place for name, place in COMPLETION.items() if (SHELLS / name).exists()}
    assert set(said["data"].split()) == units | pages | completion
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


OURS = "find /usr/ -path '*natns*' -not -path '/usr/local/*' | sort"


def test_contrib_install_and_uninstall() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        (cd /run/clone && find . | sort >/run/files)
        rm -rf /usr/local/bin/* # as on a fresh machine
        chmod 2775 /usr/local/bin
        find /usr/local -printf '%p %m\\n' | sort >/run/before
        {OURS} >/run/ours
        cd /
        /run/clone/contrib/install --scope annotated
        (cd /run/clone && find . | sort | diff /run/files -)
        echo "== again"
        /run/clone/contrib/install --package {built()} --scope=isolated
        mv /run/clone /run/clone.moved
        echo "== version"
        virt-natns --version
        echo "== package"
        dpkg-query -W -f '${{db:Status-Status}}\\n' libvirt-natns
        dpkg -L libvirt-natns | grep /man
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
        {OURS} | diff /run/ours - || :
        ls /run | grep libvirt-natns || :
        echo "== left"
        find /etc/libvirt/hooks /etc/libvirt-natns /var/lib/libvirt-natns -type f
        ip netns list
        dpkg-query -W libvirt-natns 2>/dev/null || :
        echo "== bridge"
        ip -br -4 address show virbr10
        echo "== nothing to uninstall"
        /run/clone/contrib/install --uninstall
    """)
    first = said["start"].splitlines()
    assert first[:2] == [
        "building the package",
        "wrote /etc/libvirt-natns/config.toml: scope = annotated",
    ]
    assert re.fullmatch(r"installing the package, version \d+\.\d+\.\d+", first[2])
    assert "systemd does not run here: start the service with virt-natns serve" in first
    assert "scope = isolated\n" in said["again"]
    assert "building" not in said["again"]
    assert said["version"].startswith("virt-natns ")
    package = said["package"].splitlines()
    assert package[0] == "installed"
    for page in (CHECKOUT / "man").iterdir():
        assert f"/usr/share/man/man{page.suffix[1:]}/{page.name}.gz" in package
    assert said["status"].count(" ok\n") == 2
    assert "broken" not in said["doctor"]
    assert said["uninstall"].endswith("removed the package\n")
    assert said["local"] == ""
    assert said["left"] == ""
    assert "10.0.0.1/24" in said["bridge"]
    assert said["nothing to uninstall"] == ""


def test_contrib_install_keeps_a_configuration_and_says_no_to_a_wrong_one() -> None:
    said = inside(f"""
        {WRITABLE}
        file=/etc/libvirt-natns/config.toml
        echo 'scope = "all"' >$file
        {CHECKOUT}/contrib/install --package {built()} 2>&1 || echo "status $?"
        echo "== hooks"
        find /etc/libvirt/hooks -type f
        echo "== kept"
        echo '# mine' >$file
        {CHECKOUT}/contrib/install --package {built()} --scope annotated >/dev/null
        {CHECKOUT}/contrib/install --uninstall >/dev/null
        cat $file
        find /var/lib/libvirt-natns -type f
    """)
    assert re.fullmatch(
        r"install: /etc/libvirt-natns/config.toml: scope: is 'all'.*\nstatus 1\n", said["start"]
    )
    assert said["hooks"] == ""
    assert said["kept"] == 'scope = "annotated"\n# mine\n'


# -- systemd -------------------------------------------------------------------

SYSTEMCTL = """
    mkdir -p /run/systemd/system
    # The machine may forbid packages to start services.
    rm -f /usr/bin/systemctl /usr/sbin/policy-rc.d
    cat >/usr/bin/systemctl <<'END'
#!/bin/sh
while case $1 in --*) true ;; *) false ;; esac; do shift; done
echo "$*" >>/run/asked
case $1 in
cat) test -e /lib/systemd/system/"$2" ;;
is-enabled) echo enabled ;;
show) echo loaded ;;
esac
END
    chmod +x /usr/bin/systemctl
"""
BOTH = "libvirt-natns.socket libvirt-natns.service"


def asked(said: str) -> list[str]:
    """What systemctl was asked to do with units, without questions about them."""
    others = "(cat|show|preset|daemon-reload|is-)"
    return [line for line in said.splitlines() if not re.match(others, line)]


def test_contrib_install_has_systemd_run_the_service() -> None:
    said = inside(f"""
        {WRITABLE}
        {SYSTEMCTL}
        echo "== install"
        {CHECKOUT}/contrib/install --package {built()}
        echo "== units"
        (cd /lib/systemd/system && for unit in libvirt-natns*; do
            stat -c "%n %a" $unit
            diff $unit {CHECKOUT}/contrib/systemd/$unit
        done)
        echo "== asked"
        cat /run/asked
        : >/run/asked
        {CHECKOUT}/contrib/install --package {built()} >/dev/null
        echo "== asked again"
        cat /run/asked
        : >/run/asked
        echo "== uninstall"
        {CHECKOUT}/contrib/install --uninstall
        echo "== then asked"
        cat /run/asked
        echo "== left"
        ls -d /lib/systemd/system/libvirt-natns* /etc/systemd/system/*/libvirt-natns* || :
    """)
    assert f"systemd runs {BOTH.replace(' ', ' and ')}\n" in said["install"]
    units = sorted(file.name for file in (CHECKOUT / "contrib" / "systemd").iterdir())
    assert said["units"].splitlines() == [f"{unit} 644" for unit in units]
    assert asked(said["asked"]) == [
        "start libvirt-natns.socket",
        "start libvirt-natns.service",
        f"enable --now {BOTH}",
    ]
    # A newer version takes over at once, and the socket is not touched.
    again = asked(said["asked again"])
    assert "restart libvirt-natns.service" in again
    assert not {"stop libvirt-natns.socket", "restart libvirt-natns.socket"} & set(again)
    assert f"stopped {BOTH.replace(' ', ' and ')}\n" in said["uninstall"]
    then = asked(said["then asked"])
    assert then[0] == f"disable --now {BOTH}"
    assert said["then asked"].endswith("daemon-reload\n")
    assert said["left"] == ""


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_units() -> None:
    said = inside(f"""
        {WRITABLE}
        {CHECKOUT}/contrib/install --package {built()} >/dev/null
        for file in /lib/systemd/system/libvirt-natns*; do
            # Its complaints are about other units, too.
            systemd-analyze verify --man=no $file 2>&1 | grep libvirt-natns || :
        done
    """)
    assert said["start"] == ""


# -- an installation without the package -----------------------------------------

FORMER = f"""
    rm -rf /usr/local/bin/* # as on a fresh machine
    find /usr/local | sort >/run/before
    {PIP} install {OPTIONS} --force-reinstall /run/clone
    # Earlier versions had the path in the units.
    sed -i 's|virt-natns |/usr/local/bin/virt-natns |' /usr/local/lib/systemd/system/*
    /usr/local/bin/virt-natns install >/dev/null
    mkdir -p /etc/systemd/system/multi-user.target.wants
    for unit in libvirt-natns.service libvirt-natns-router@.service; do
        ln -s /usr/local/lib/systemd/system/$unit \\
            /etc/systemd/system/multi-user.target.wants/$(echo $unit | sed s/@/@wan/)
    done
"""


def test_an_installation_below_usr_local_becomes_the_package() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        {FORMER}
        {TWINS}
        ip -n nat-twin-a -o link | sort >/run/links
        cat /run/libvirt-natns/networks/*/dnsmasq.pid | sort >/run/pids
        old=/usr/local/lib/python3.2/dist-packages
        mkdir -p $old/libvirt_natns $old/libvirt_natns-0.0.1.dist-info $old/other
        mkdir -p /etc/network/interfaces.d
        echo '  post-up /usr/local/bin/virt-natns router up --boot wan' \
            >/etc/network/interfaces.d/ens3
        # A hook at each moment finds a whole program.
        (echo '<hookData>'; virsh -q net-dumpxml twin-a; echo '</hookData>') >/run/twin-a.xml
        (while [ ! -e /run/done ]; do
            /etc/libvirt/hooks/network twin-a updated begin - </run/twin-a.xml 2>&1
        done) >/run/hooks &
        echo "== move"
        {CHECKOUT}/contrib/install --package {built()}
        touch /run/done
        wait $!
        echo "== hooks"
        cat /run/hooks
        grep -c '^library=/usr/lib/python3/dist-packages$' /etc/libvirt/hooks/network
        echo "== networks"
        ip -n nat-twin-a -o link | sort | diff /run/links -
        cat /run/libvirt-natns/networks/*/dnsmasq.pid | sort | diff /run/pids -
        virt-natns check
        echo "== links"
        readlink -e /etc/systemd/system/multi-user.target.wants/libvirt-natns*
        readlink /usr/local/bin/virt-natns
        ls $old
        echo "== uninstall"
        {CHECKOUT}/contrib/install --uninstall
        echo "== local"
        rm -r $old && rmdir /usr/local/lib/python3.2
        find /usr/local | sort | diff /run/before - || :
    """)
    assert "kept /usr/local/bin/virt-natns, a link to /usr/bin/virt-natns now" in said["move"]
    assert "for /etc/network/interfaces.d/ens3\n" in said["move"]
    assert said["hooks"] == "1\n"
    assert said["networks"] == ""
    assert said["links"].splitlines() == [
        "/usr/lib/systemd/system/libvirt-natns-router@.service",
        "/usr/lib/systemd/system/libvirt-natns.service",
        "/usr/bin/virt-natns",
        "other",
    ]
    assert said["local"] == ""


def test_a_package_that_is_refused_leaves_the_former_installation() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        {FORMER}
        {TWINS}
        virt-natns check
        find /usr/local/ -path '*natns*' -not -name '*.pyc' | sort >/run/ours
        {PYTHON} -c 'import sqlite3
database = sqlite3.connect("/var/lib/libvirt-natns/state.db")
database.execute("PRAGMA user_version = 99")'
        echo "== refused"
        {CHECKOUT}/contrib/install --package {built()} 2>&1 || echo "status $?"
        echo "== left"
        find /usr/local/ -path '*natns*' -not -name '*.pyc' | sort | diff /run/ours -
        grep -c '^library=/usr/local/lib/python3' /etc/libvirt/hooks/network
        dpkg-query -W -f '${{db:Status-Status}}\\n' libvirt-natns 2>/dev/null || :
    """)
    assert "has format 99, written by a later version" in said["refused"]
    assert said["refused"].endswith("install: apt-get failed\nstatus 1\n")
    assert said["left"].splitlines() in (["1"], ["1", "not-installed"])


def test_contrib_install_removes_a_former_installation() -> None:
    said = inside(f"""
        {CLONE}
        {WRITABLE}
        {FORMER}
        {TWINS}
        echo "== uninstall"
        {CHECKOUT}/contrib/install --uninstall
        echo "== local"
        find /usr/local | sort | diff /run/before - || :
        find /etc/libvirt/hooks -type f
        ip netns list
    """)
    assert "twin-a: given back to libvirt\n" in said["uninstall"]
    assert said["local"] == ""


@pytest.mark.parametrize(
    "arguments",
    [
        "--scope everything",
        "--scope",
        "--uninstall now",
        "x",
        "--package",
        "--package=",
        "--uninstall --scope annotated",
    ],
)
def test_contrib_install_refuses_what_it_does_not_know(arguments: str) -> None:
    done = run(CHECKOUT / "contrib" / "install", *arguments.split(), check=False)
    assert done.returncode == 2
    assert "contrib/install [--scope isolated|annotated] [--package FILE]" in done.stderr
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
