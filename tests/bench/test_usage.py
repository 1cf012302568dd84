"""CPU time and memory of processes that are gone when they are asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qpostcopy.bench.usage import process_cpu_seconds, stolen_and_all_ticks, thread_cpu_seconds

#: A command that waits for its controller, or not; the controller leaves a handler behind.
#: All of them work for a while, and the one who looks is not their parent.
PLAY = """
import json, os, resource, subprocess, sys
from pathlib import Path
from qpostcopy.bench import usage as module
from qpostcopy.process import Process
from qpostcopy.state import StateDirectory

BURN = "import time\\nend = time.process_time() + {seconds}\\n"
BURN += "while time.process_time() < end: pass\\n"
run, waits = Path(sys.argv[1]), sys.argv[2] == "waits"
os.environ["QPOSTCOPY_RUN_DIR"] = str(run)
module.become_reaper()
sides = {"source_qmp": "s", "destination_qmp": "d"}
directory = StateDirectory.create("t", plan_text="", profile="p", **sides)
usage = module.MigrationUsage(run)
go_read, go_write = os.pipe()
tell_read, tell_write = os.pipe()
command = (
    "import os, subprocess, sys\\n"
    f"child = subprocess.Popen([sys.executable, '-c', 'import os\\\\nos.read({go_read}, 1)\\\\n'"
    f" + {BURN.format(seconds=0.3)!r}], pass_fds=[{go_read}])\\n"
    f"os.write({tell_write}, str(child.pid).encode())\\n"
    + BURN.format(seconds=0.2)
    + ("child.wait()\\n" if waits else "")
)
process = subprocess.Popen([sys.executable, "-c", command], pass_fds=[go_read, tell_write])
usage.started(process.pid)
controller = Process.of(int(os.read(tell_read, 20)))
directory.update(controller=controller)
usage.look()
os.write(go_write, b"!")
_, _, rusage = os.wait4(process.pid, 0)
process.returncode = 0
found = usage.collect(rusage)
print(json.dumps({role: used.model_dump() for role, used in found.items()}))
"""


@pytest.mark.parametrize("waits", ["waits", "does not wait"])
def test_the_sum_is_exact_whoever_waited(tmp_path: Path, waits: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAY, str(tmp_path), waits],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"cli", "controller"}
    total = sum(used["cpu_seconds"] for used in found.values())
    # What was burnt, and Python's own start twice; never counted twice.
    assert 0.5 <= total < 0.95
    assert all(1 << 20 < used["peak_rss_bytes"] < 1 << 30 for used in found.values())
    if waits == "does not wait":
        assert found["controller"]["cpu_seconds"] >= 0.3
        assert 0.2 <= found["cli"]["cpu_seconds"] < 0.3 + 0.15


def test_a_thread_and_its_process() -> None:
    pid = os.getpid()
    before = thread_cpu_seconds(pid, pid)
    deadline = time.process_time() + 0.1
    while time.process_time() < deadline:
        pass
    assert thread_cpu_seconds(pid, pid) - before >= 0.05
    assert process_cpu_seconds(pid) >= 0.1


def test_the_machines_ticks_grow() -> None:
    stolen, ticks = stolen_and_all_ticks()
    assert 0 <= stolen < ticks
