"""Set-ups that must be refused, a row each; tests/vm/test_wrong.py plays every one.

A row starts two real QEMUs, rightly but for one thing (spoil.py), and says what
preflight must find, and nothing else. Two findings no QEMU of ours can cause, and
tests/test_preflight.py has them alone: `no-ram-block` (a PC has some RAM) and
`capability-missing` (5.2 and later know x-ignore-shared).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from qpostcopy.lab.vm import Backend, Vm, VmSpec
from tests.vm import spoil
from tests.vm.scene import Scene
from tests.vm.setups import NOBODY, SANDBOX
from tests.vm.spoil import MIB, RAM, RAM1, RAM_BYTES, Before, Meanwhile, Through, Values

GOOD = VmSpec((RAM,), paused=True)


@dataclass(frozen=True, slots=True)
class Wrong:
    """One row.

    :ivar found: `SIDE CODE` of every finding.
    :ivar says: a part of a finding's message: what is wrong, by its name or value.
    :ivar here: fields of both sides' VmSpec; `source` and `destination`: of one side's.
        `{directory}` in a word of `more` is where the sockets are.
    :ivar sockets: of the plan, by role, where they are not the usual ones.
    :ivar migrate: what `migrate` says is looked at, too: where it takes a way of its own to
        the same findings, or would do the most harm. Takes longer.
    :ivar place: where the VM is said to be.
    """

    name: str
    found: tuple[str, ...]
    says: str
    here: Values = field(default_factory=dict)
    source: Values = field(default_factory=dict)
    destination: Values = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    before: Before = lambda _: nullcontext({})
    meanwhile: Meanwhile = lambda _: nullcontext()
    through: Through = lambda _: []
    migrate: bool = False
    place: str = "source"

    @contextmanager
    def played(self, directory: Path) -> Iterator[Scene]:
        """Both QEMUs run, and all is as wrong as it should be."""
        with ExitStack() as stack:
            more = stack.enter_context(self.before(directory))
            scene = WrongScene(directory, self, more)
            stack.enter_context(scene)
            stack.enter_context(self.meanwhile(scene))
            yield scene


class WrongScene(Scene):
    """Two QEMUs that are started as a row says."""

    def __init__(self, directory: Path, wrong: Wrong, more: Values) -> None:
        super().__init__(directory, sizes=(RAM_BYTES,), running=False)
        both = replace(GOOD, **wrong.here)
        waiting = replace(both, incoming=True, paused=False)
        self.source = self._vm("source", replace(both, **wrong.source))
        self.destination = self._vm("destination", replace(waiting, **wrong.destination | more))
        self._write_plan("keep")
        for role, name in wrong.sockets.items():
            text = self.plan.read_text()
            old = str((self.source if role == "source" else self.destination).qmp_path)
            self.plan.write_text(text.replace(old, str(directory / name)))

    def _vm(self, name: str, spec: VmSpec) -> Vm:
        words = tuple(word.replace("{directory}", str(self.directory)) for word in spec.more)
        return super()._vm(name, replace(spec, more=words))


# --- the table ----------------------------------------------------------------------------

PRIVATE = Backend("ram0", RAM_BYTES, kind="memory-backend-ram", share=False)
NOT_SHARED = {"backends": (replace(RAM, share=False),)}
OFFSET = replace(RAM, mem_path=spoil.SAME_FILE, more="offset=65536")
ON_DISK = {"backends": (replace(RAM, mem_path=Path("/var/tmp")),)}
#: All of QEMU is locked: with KVM, if there is one, for TCG has a buffer of 1 GiB.
LOCKED: Values = {"more": ("-overcommit", "mem-lock=on"), "accelerator": "kvm:tcg"}
IVSHMEM = (
    *("-object", "memory-backend-file,id=shared,size=1M,mem-path=/dev/shm,share=on"),
    *("-device", "ivshmem-plain,memdev=shared,master=on"),
)
NVME = ("-blockdev", "null-co,node-name=d,read-zeroes=on", "-device", "nvme,serial=1,drive=d")
CRYPTO = (
    *("-chardev", "socket,id=c,path=/nowhere,reconnect=60"),
    *("-object", "cryptodev-vhost-user,id=crypto,chardev=c"),
)
HINTING = (
    *("-object", "iothread,id=io"),
    *("-device", "virtio-balloon-pci,free-page-hint=on,iothread=io"),
)
SECOND_MONITOR = ("-qmp", "unix:{directory}/second.qmp,server=on,wait=off")
RIGHTS_MISSING = ("source rights-missing", "destination rights-missing")


def on_both(code: str) -> tuple[str, str]:
    return f"source {code}", f"destination {code}"


ROWS: tuple[Wrong, ...] = (
    # RAM
    Wrong("private-here", ("source ram-not-shared",), "share is off", source=NOT_SHARED),
    Wrong("private-there", ("destination ram-not-shared",), "share is off",
          destination=NOT_SHARED),
    Wrong("not-a-file", on_both("ram-not-shared"), "memory-backend-ram",
          here={"backends": (PRIVATE,)}),
    Wrong("on-disk-here", ("source ram-not-on-tmpfs",), "/var/tmp", source=ON_DISK),
    Wrong("on-disk-there", ("destination ram-not-on-tmpfs",), "/var/tmp", destination=ON_DISK),
    Wrong("other-pid", ("source ram-file-not-found",), "no mapping of process",
          meanwhile=spoil.other_pid_in_plan),
    Wrong("hugetlb", on_both("huge-pages"), "2097152",
          here={"backends": (replace(RAM, kind="memory-backend-memfd", more="hugetlb=on"),)},
          before=spoil.huge_page_pool),
    Wrong("thp-always", ("destination shared-huge-pages",), "ram0",
          before=lambda path: spoil.on_tmpfs(path, "size=64m,huge=always", "align=2M")),
    Wrong("thp-advise", ("destination shared-huge-pages",), "ram0",
          before=lambda path: spoil.on_tmpfs(path, "size=64m,huge=advise", "align=2M")),
    Wrong("fork", ("destination fork-may-copy",), "MADV_DONTFORK",
          meanwhile=lambda scene: spoil.inherited_by_children(scene.destination)),
    Wrong("mem-lock", ("destination memory-locked",), "locks its memory",
          destination=LOCKED),
    Wrong("one-file-for-two", ("destination blocks-share-a-file",) * 2, "same file",
          here={"backends": (RAM, RAM1)}, before=lambda path: spoil.one_file(path, 2)),
    Wrong("same-file", ("both same-file",), "destroy the running guest",
          here={"backends": (replace(RAM, mem_path=spoil.SAME_FILE),)}, before=spoil.same_file,
          migrate=True),
    # QEMU 10.0: it would copy what is no named file
    Wrong("memfd-of-10.0", ("destination backend-not-skipped",), "memory-backend-memfd",
          before=lambda path: spoil.of_trixie(path, replace(RAM, kind="memory-backend-memfd"))),
    Wrong("shm-of-10.0", ("destination backend-not-skipped",), "memory-backend-shm",
          before=lambda path: spoil.of_trixie(path, replace(RAM, kind="memory-backend-shm"))),
    Wrong("part-of-a-file", ("destination mapping-incomplete",), "not 0..",
          before=lambda path: spoil.of_trixie(path, OFFSET)),
    # both sides are to be alike
    Wrong("other-name", ("both blocks-differ",) * 2, "ram0",
          destination={"backends": (RAM1,)}),
    Wrong("other-size", ("both blocks-differ",), str(RAM_BYTES + 2 * MIB),
          destination={"backends": (replace(RAM, size_bytes=RAM_BYTES + 2 * MIB),)}),
    Wrong("other-place", ("both blocks-differ",) * 2, hex(RAM_BYTES),
          here={"backends": (RAM, RAM1)}, destination={"backends": (RAM1, RAM)}),
    Wrong("one-more", ("both blocks-differ",), "ram1 is at the source",
          source={"backends": (RAM, RAM1)}),
    Wrong("other-machine", ("both machine-differs",), "pc-q35-6.0",
          destination={"more": ("-machine", "pc-q35-6.0")}),
    # others have a hand in it
    Wrong("mapped-here", ("source other-mapper",), "python",
          meanwhile=lambda scene: spoil.mapped_by_another(scene.source)),
    Wrong("mapped-there", ("destination other-mapper",), "python",
          meanwhile=lambda scene: spoil.mapped_by_another(scene.destination), migrate=True),
    Wrong("userfaultfd-here", ("source userfaultfd-present",), "ram0",
          meanwhile=lambda scene: spoil.in_another_userfaultfd(scene.source)),
    Wrong("userfaultfd-there", ("destination userfaultfd-present",), "ram0",
          meanwhile=lambda scene: spoil.in_another_userfaultfd(scene.destination)),
    Wrong("traced", ("destination traced",), "python",
          meanwhile=lambda scene: spoil.traced(scene.destination)),
    Wrong("vfio", ("destination device-pins-ram",), "vfio", before=spoil.an_open_vfio_group),
    Wrong("vhost-user", ("destination device-outside-qemu",), "vhost-user-blk-pci",
          before=spoil.block_device_server),
    Wrong("vhost-user-object", on_both("device-outside-qemu"), "cryptodev-vhost-user",
          here={"more": CRYPTO}),
    Wrong("ivshmem", on_both("device-outside-qemu"), "ivshmem-plain", here={"more": IVSHMEM}),
    Wrong("free-page-hint", ("source free-page-hint",), "virtio-balloon-pci",
          here={"more": HINTING}),
    # the state that they are in
    Wrong("no-incoming", ("destination destination-not-waiting",), "prelaunch",
          destination={"incoming": False, "paused": True}),
    Wrong("running", ("destination destination-not-waiting",), "running",
          destination={"incoming": False}),
    Wrong("swapped", ("source source-not-movable", "destination destination-not-waiting"),
          "inmigrate", source={"incoming": True}, destination={"incoming": False},
          migrate=True, place="unknown"),
    Wrong("migrated", ("source source-not-movable", "destination destination-not-waiting"),
          "postmigrate", meanwhile=spoil.migrated_already, migrate=True, place="unknown"),
    Wrong("listening", ("destination migration-under-way",), "setup",
          meanwhile=spoil.told_where_to_listen),
    Wrong("saving", ("source migration-under-way",), "active", meanwhile=spoil.saving),
    Wrong("not-migratable", on_both("migration-blocked"), "nvme", here={"more": NVME}),
    Wrong("one-qemu", ("destination destination-not-waiting", "both same-qemu"), "prelaunch",
          source={"more": SECOND_MONITOR}, sockets={"destination": "second.qmp"}),
    Wrong("held", on_both("monitor-held"), "held by another client",
          meanwhile=spoil.both_held, migrate=True),
    Wrong("absent", on_both("monitor-absent"), "nowhere-a",
          sockets={"source": "nowhere-a", "destination": "nowhere-b"}, migrate=True),
    Wrong("absent-and-wrong", ("source monitor-absent", "destination memory-locked"), "nowhere-a",
          destination=LOCKED, sockets={"source": "nowhere-a"}, migrate=True),
    Wrong("netns-absent", ("destination netns-absent",), "nowhere-c",
          meanwhile=lambda scene: spoil.netns_in_plan(scene, "nowhere-c"), migrate=True),
    # what we may do, and how much room there is
    Wrong("netns-closed", ("destination netns-closed",), "Operation not permitted",
          meanwhile=spoil.netns_of_another, through=spoil.without("sys_admin"), migrate=True),
    Wrong("no-ptrace", RIGHTS_MISSING, "CAP_SYS_PTRACE", through=spoil.without("sys_ptrace")),
    Wrong("no-rights", RIGHTS_MISSING, "CAP_SYS_ADMIN",
          through=spoil.without("sys_ptrace", "sys_admin", "perfmon", "checkpoint_restore"),
          migrate=True),
    Wrong("user-namespace", on_both("attach-refused"), "Permission denied",
          through=spoil.in_user_namespace, migrate=True),
    Wrong("no-userfaultfd", ("destination userfaultfd-not-permitted",), f"uid {NOBODY}",
          here={"user": NOBODY}, through=spoil.without_userfaultfd_device),
    Wrong("filtered", ("destination filter-in-the-way",), "CAP_SYS_ADMIN",
          here={"more": SANDBOX}, through=spoil.without("sys_admin")),
    Wrong("small-tmpfs", ("destination tmpfs-too-small",), "4.0 MiB left",
          before=lambda path: spoil.on_tmpfs(path, "size=4m")),
    Wrong("small-cgroup", ("destination memory-limit-too-low",), "memory.",
          meanwhile=spoil.in_a_small_cgroup),
    Wrong("little-memory", ("destination memory-too-small",), "66.0 MiB",
          meanwhile=spoil.filled, through=spoil.with_little_memory),
    # all at once
    Wrong("everything", (
        "source ram-not-shared", "source migration-blocked",
        "destination destination-not-waiting", "destination memory-locked",
        "destination device-outside-qemu", "both blocks-differ", "both blocks-differ",
        "both machine-differs"),
        "share is off",
        source={"backends": (replace(RAM, share=False),), "more": NVME},
        destination=LOCKED | {"backends": (RAM1,), "incoming": False, "paused": True,
                              "more": (*LOCKED["more"], "-machine", "pc-q35-6.0", *CRYPTO)},
        migrate=True),
)  # fmt: skip
