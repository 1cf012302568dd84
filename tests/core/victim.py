"""A process whose memory is served by a userfault handler: it touches pages and tells what it saw.

Stands in for QEMU where a test is about the core alone. It maps a memfd, makes
a userfaultfd for itself, and obeys one-line commands on a socket.

    usage: victim.py SOCKET_FD MEMFD SIZE
    read PAGE COUNT      -> sha256 of these pages
    peek PAGE OFFSET     -> that byte
    write PAGE BYTE      -> ok
    discard PAGE COUNT   -> ok (the file is punched: the first half of what a balloon does)
    drop PAGE COUNT      -> ok (MADV_DONTNEED: the other half)
"""

import ctypes
import hashlib
import mmap
import os
import socket
import sys

SYS_USERFAULTFD = 323
FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    memfd, size = int(sys.argv[2]), int(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(memfd, size)
    uffd = libc.syscall(SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
    assert uffd >= 0, os.strerror(ctypes.get_errno())
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    socket.send_fds(control, [f"{address}\n".encode()], [uffd])
    for line in control.makefile():
        words = line.split()
        first, number = int(words[1]) * mmap.PAGESIZE, int(words[2])
        answer = "ok"
        if words[0] == "read":
            data = memory[first : first + number * mmap.PAGESIZE]
            answer = hashlib.sha256(data).hexdigest()
        elif words[0] == "peek":
            answer = str(memory[first + number])
        elif words[0] == "write":
            memory[first] = number
        elif words[0] == "discard":
            libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
            length = number * mmap.PAGESIZE
            assert libc.fallocate(memfd, FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, first, length) == 0
        elif words[0] == "drop":
            memory.madvise(mmap.MADV_DONTNEED, first, number * mmap.PAGESIZE)
        control.sendall(f"{answer}\n".encode())


if __name__ == "__main__":
    main()
