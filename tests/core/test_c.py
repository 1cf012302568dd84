"""The C tests, built from the sources with warnings as errors, under each sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CORE = ROOT / "qpostcopy" / "core"
WARNINGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = {
    "asan": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "tsan": ["-O1", "-g", "-fsanitize=thread"],
}
CASES = [
    ("test_wire", "asan"),
    ("test_map", "asan"),
    ("test_map", "tsan"),
    ("test_handler", "asan"),
    ("test_trace", "asan"),
    ("test_lanes", "asan"),
    ("test_lanes", "tsan"),
]


@pytest.mark.parametrize(
    ("name", "sanitizer"),
    [
        pytest.param(name, tool, marks=(pytest.mark.slow,) if tool == "tsan" else ())
        for name, tool in CASES
    ],
)
def test_c(name: str, sanitizer: str, tmp_path: Path) -> None:
    binary = tmp_path / name
    sources = [str(path) for path in sorted(CORE.glob("*.c")) if path.name != "_core.c"]
    subprocess.run(
        ["gcc", *WARNINGS, *SANITIZERS[sanitizer], f"-I{CORE}", f"-I{ROOT}/tests/c",
         f"{ROOT}/tests/c/{name}.c", *sources, "-o", str(binary), "-pthread"],
        check=True,
    )  # fmt: skip
    # TSan's shadow memory and a large address space randomisation exclude each other.
    prefix = ["setarch", "-R"] if sanitizer == "tsan" else []
    done = subprocess.run([*prefix, str(binary)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok " in done.stdout


def test_optimised_build_has_no_warnings(tmp_path: Path) -> None:
    """What -O2 sees (uninitialised values, truncation) -O1 may not."""
    for source in sorted(CORE.glob("*.c")):
        if source.name != "_core.c":
            subprocess.run(
                ["gcc", *WARNINGS, "-O2", f"-I{CORE}", "-c", str(source), "-o", tmp_path / "out.o"],
                check=True,
            )
