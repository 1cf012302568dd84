"""QMP: QEMU's monitors, the endpoints that we offer ourselves, and their clients.

The protocol itself is qemu.qmp's; this package adds what a migration needs on
top: a time limit on every command, "outcome unknown" as an error of its own,
events without unbounded memory, several sessions on one socket.
"""

import logging

# qemu.qmp logs each lost connection as an error, with a page of traceback behind
# it. We turn all of them into typed errors and report those, once.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
