"""The destination's side: a userfaultfd of QEMU's address space, and who serves it."""
