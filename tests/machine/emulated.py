# SPDX-License-Identifier: LGPL-2.1-or-later
"""An emulated machine: QEMU without KVM, with the disk of contrib/machine-image.

Changes to the disk go to a temporary file, which ends with the process.  The machine
keeps them over a reboot.  Nothing connects it to the network of this machine.
"""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from guest_agent import AgentError, Done, GuestAgent

CHECKOUT = Path(__file__).resolve().parents[2]
IMAGES = CHECKOUT / ".cache" / "machine"
PRODUCT = "libvirt-natns test machine"
"""By this name of the hardware, the lab knows that it may change the machine."""
REPORT = "/dev/virtio-ports/report"
"""Bytes that the machine writes here arrive at once in the report."""
BOOT = 900.0
"""Seconds for a boot on busy cores."""
POLL = 0.5
MEMORY = 3072
"""MiB."""


class MachineError(Exception):
    """The machine did not start, or ended."""


class Machine:
    """A machine that runs; ``directory`` has its console, its report and its socket."""

    def __init__(self, release: str, directory: Path, share: Path) -> None:
        self.directory = directory
        self.console = directory / "console"
        self.report = directory / "report"
        self._printed = 0
        self._process = subprocess.Popen(
            # The machine ends with this process, even if that is killed.
            ["setpriv", "--pdeathsig", "KILL", "--", *command(IMAGES / release, directory, share)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(directory / "qemu").open("w"),
        )
        self._agent = GuestAgent(directory / "agent")

    def wait_booted(self) -> None:
        """Wait until systemd has started what it starts.  Raises MachineError."""
        self._wait(self._agent.answers, BOOT, "the machine to boot")
        self.run("systemctl is-system-running --wait", timeout=BOOT)

    def run(self, command: str, *, timeout: float = 60.0) -> Done:
        """Run a line of shell to its end.  Raises MachineError after ``timeout`` seconds."""
        return self._run(command, timeout, lambda: None)

    def follow(self, command: str, *, timeout: float) -> Done:
        """Run a line of shell whose streams go to the report; print the report meanwhile."""
        done = self._run(f"exec >{REPORT} 2>&1; {command}", timeout, self._print_report)
        self._print_report()
        return done

    def reboot(self) -> None:
        """Reboot in an orderly way, and wait until the machine is up again."""
        before = self._boot_id()
        self._agent.start("systemctl reboot")
        self._wait(lambda: self._boot_id() not in ("", before), BOOT, "another boot")
        self.wait_booted()

    def end(self) -> None:
        """Pull the plug."""
        self._agent.close()
        self._process.kill()
        self._process.wait()

    def _boot_id(self) -> str:
        try:
            if not self._agent.answers():
                return ""
            return self._agent.run("cat /proc/sys/kernel/random/boot_id").output
        except (AgentError, OSError):
            return ""

    def _run(self, command: str, timeout: float, meanwhile: Callable[[], None]) -> Done:
        try:
            pid = self._agent.start(command)
            deadline = time.monotonic() + timeout
            while (done := self._agent.ended(pid)) is None:
                meanwhile()
                if time.monotonic() > deadline:
                    raise MachineError(f"{command}: not done after {timeout:.0f} s")
                time.sleep(POLL)
        except (AgentError, OSError) as error:
            raise MachineError(f"{command}: {error}") from error
        return done

    def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if self._process.poll() is not None:
                raise MachineError(f"QEMU ended: {(self.directory / 'qemu').read_text().strip()}")
            if time.monotonic() > deadline:
                raise MachineError(f"waited {timeout:.0f} s in vain for {what}")
            time.sleep(POLL)

    def _print_report(self) -> None:
        with self.report.open("rb") as file:
            file.seek(self._printed)
            data = file.read()
        self._printed += len(data)
        print(data.decode(errors="replace"), end="", flush=True)


def command(image: Path, directory: Path, share: Path) -> list[str]:
    """Return the command line of QEMU."""
    # The limit of printk would hide denials of AppArmor's.
    limits = "sysctl.kernel.printk_ratelimit=0 loglevel=4"
    kernel = f"root=/dev/vda rw console=ttyS0 mitigations=off panic=-1 {limits}"
    options = [
        ("machine", "pc"),
        # Never KVM: on some machines /dev/kvm exists, and hangs.
        ("accel", "tcg,thread=multi"),
        ("smp", "2"),
        ("m", str(MEMORY)),
        ("smbios", f"type=1,product={PRODUCT}"),
        ("kernel", str(image / "vmlinuz")),
        ("initrd", str(image / "initrd")),
        ("append", kernel),
        # Ahead of devices that take the next free slot.
        *nic("own", 3, wire=(directory / "own", directory / "outside")),
        *nic("outside", 4, wire=(directory / "outside", directory / "own")),
        ("drive", f"file={image / 'disk'},format=raw,if=virtio,snapshot=on,cache=unsafe"),
        ("virtfs", f"local,path={share},mount_tag=share,security_model=none,readonly=on"),
        ("device", "virtio-rng-pci"),
        ("display", "none"),
        ("serial", f"file:{directory / 'console'}"),
        ("device", "virtio-serial-pci"),
        *port("agent", f"socket,path={directory / 'agent'},server=on,wait=off",
              "org.qemu.guest_agent.0"),
        *port("report", f"file,path={directory / 'report'}", "report"),
    ]  # fmt: skip
    words = [word for name, value in options for word in (f"-{name}", value)]
    return ["qemu-system-x86_64", "-nodefaults", "-no-user-config", *words]


def port(name: str, backend: str, title: str) -> list[tuple[str, str]]:
    """Return the options of a port of the virtual serial bus."""
    kind, _, more = backend.partition(",")
    return [
        ("chardev", f"{kind},id={name},{more}"),
        ("device", f"virtserialport,chardev={name},name={title}"),
    ]


def nic(name: str, slot: int, *, wire: tuple[Path, Path]) -> list[tuple[str, str]]:
    """Return the options of a NIC, which Linux calls ``ensSLOT``; ``wire`` are its two ends.

    Frames are datagrams: a NIC that does not listen stops no other, as with a real wire.
    """
    mac = f"52:54:00:00:0f:{slot:02x}"
    near, far = (
        f"{end}.type=unix,{end}.path={path}"
        for end, path in zip(("local", "remote"), wire, strict=True)
    )
    return [
        ("netdev", f"dgram,id={name},{near},{far}"),
        ("device", f"virtio-net-pci,netdev={name},mac={mac},addr={slot}"),
    ]
