# SPDX-License-Identifier: LGPL-2.1-or-later
"""The process that serves members of group libvirt: it runs for clients, and with the service."""

import signal

from lab import (
    Provider,
    Service,
    define_network,
    isolated,
    natns,
    remove_config,
    virsh,
    write_config,
)
from lab_json import MEMBER, Watcher, as_user, no_process_of_look, processes_of_look
from test_look import LOOK


def test_it_runs_for_clients_alone(installed: None, provider: Provider) -> None:
    write_config(provider.config())
    try:
        with Service() as service:
            define_network(isolated("b", "virbr30"))
            virsh("net-start", "b")
            assert processes_of_look() == []
            with Watcher(MEMBER) as watcher:
                assert len(processes_of_look()) >= 1
                virsh("net-destroy", "b")
                watcher.until("networks", "b", state="down")
            service.stop()
            no_process_of_look()
            assert not LOOK.exists()
            service.start()
            with Watcher(MEMBER):
                service.signal(signal.SIGKILL)
                no_process_of_look()
                service.start()
    finally:
        remove_config()


def test_without_the_service(installed: None) -> None:
    for words in (("status",), ("forward", "list"), ("watch",)):
        done = as_user(MEMBER, *words)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == (
            "virt-natns: only root can do this while the service does not run:"
            " use sudo, or start the service: systemctl start libvirt-natns\n"
        )
    root = natns("watch", "--json", check=False)
    assert root.stderr == (
        "virt-natns: the service does not run: start the service: systemctl start libvirt-natns\n"
    )
