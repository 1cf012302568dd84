"""The devices of a guest, and the host's side of them, while it moves from QEMU to QEMU.

Disks are files that both QEMUs open, with locking on: shared storage. Network,
serial port and the balloon's monitor are sockets on which we listen and to
which each QEMU connects as it starts, so one command line serves both sides,
and one peer serves the guest wherever it runs. scripts/guest/devices.h has the
guest's side.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.vm.peers import Balloon, Network, Peers, SerialPort

#: Not /tmp, which may be a tmpfs: it cannot do without the page cache before Linux 6.6.
DISKS_BELOW = Path("/var/tmp")
DISK_BYTES = 8 << 20
_IO_URING_SETUP = 425
#: Operations in which a disk's every extent was read, the screen written whole, ...
ROUNDS = {"/dev/vd": 128, "screen": 256, "network": 64, "serial-port": 64}


@dataclass(frozen=True, slots=True)
class Disk:
    """How QEMU opens it, and who in QEMU does its I/O: the main loop, or a thread for it."""

    cache: str = "writeback"
    aio: str = "threads"
    iothread: bool = False


@dataclass(frozen=True, slots=True)
class Devices:
    """VGA, network, serial port, balloon, and these disks."""

    disks: tuple[Disk, ...]

    @property
    def names(self) -> list[str]:
        """As the guest names those that it works on by itself."""
        disks = [f"/dev/vd{chr(ord('a') + n)}" for n in range(len(self.disks))]
        return [*disks, "network", "serial-port", "screen"]


def rounds(name: str) -> int:
    """Operations of this device that are a whole round of its work."""
    return next(count for start, count in ROUNDS.items() if name.startswith(start))


class Host:
    """The host's side of them. Close it after the QEMUs.

    :ivar disks: where their files are.
    :ivar arguments: of both QEMUs' command lines.
    """

    def __init__(self, devices: Devices, directory: Path) -> None:
        self.devices = devices
        self.disks = Path(tempfile.mkdtemp(prefix="qpc-disks-", dir=DISKS_BELOW))
        self.network = Network(directory / "network.sock")
        self.serial_port = SerialPort(directory / "port.sock")
        self.balloon = Balloon(directory / "balloon.sock")
        self._peers = Peers(self.network, self.serial_port, self.balloon)
        self.arguments = (
            *("-device", "VGA,addr=1"),
            *("-netdev", f"stream,id=net,server=off,addr.type=unix,addr.path={self.network.path}"),
            *("-device", "virtio-net-pci,netdev=net,romfile="),
            *("-chardev", f"socket,id=port,path={self.serial_port.path}"),
            *("-device", "virtio-serial-pci", "-device", "virtserialport,chardev=port"),
            *("-chardev", f"socket,id=balloon,path={self.balloon.path}"),
            *("-mon", "chardev=balloon,mode=control", "-device", "virtio-balloon-pci"),
            *(word for n, disk in enumerate(devices.disks) for word in self._disk(n, disk)),
        )

    def _disk(self, number: int, disk: Disk) -> list[str]:
        path = self.disks / f"{number}.raw"
        with path.open("wb") as file:
            file.truncate(DISK_BYTES)
        if disk.cache == "none":
            _need_direct_io(path)
        if disk.aio == "io_uring":
            _need_io_uring()
        drive = f"id=disk{number},if=none,format=raw,file={path},file.locking=on"
        words = ["-drive", f"{drive},cache={disk.cache},aio={disk.aio}"]
        device = f"virtio-blk-pci,drive=disk{number}"
        if disk.iothread:
            words += ["-object", f"iothread,id=thread{number}"]
            device += f",iothread=thread{number}"
        return [*words, "-device", device]

    def assert_right(self) -> None:
        """What reached the host was what the guest sent."""
        for peer in (self.network, self.serial_port):
            assert not peer.wrong, peer.wrong

    def close(self) -> None:
        self._peers.close()
        shutil.rmtree(self.disks)


def _need_direct_io(path: Path) -> None:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"no O_DIRECT in {path.parent}: {error}")


def _need_io_uring() -> None:
    """io_uring_setup(2) without a ring complains of that, unless it may not be called at all."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 0, None)
    if ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        pytest.skip("no io_uring: io_uring_setup may not be called")
