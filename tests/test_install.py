"""`pip install .` into a bare virtual environment, and what it says when it cannot build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = 300


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What a user has: the files of the checkout, without anything built."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, tmp_path / "tree" / name
        if source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return tmp_path / "tree"


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.slow
def test_a_bare_environment_gets_a_working_command(tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", str(bare)], check=True)
    installed = run(bare / "bin/pip", "-q", "install", ".", cwd=tree)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    shutil.rmtree(tree)  # nothing of it may be needed any more
    command = bare / "bin/qpostcopy"
    assert run(command, "--version", cwd=tmp_path).stdout.startswith("qpostcopy, version 0.1.0")
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "version: 1\nname: x\nsource: {qmp: /nowhere/a}\ndestination: {qmp: /nowhere/b}\n"
        "profile: low-memory-first\n"
    )
    checked = run(command, "check", plan, cwd=tmp_path, QPOSTCOPY_RUN_DIR=str(tmp_path / "run"))
    assert checked.returncode == 3, checked.stdout + checked.stderr  # the shipped profile was found
    assert "/nowhere/a" in checked.stdout + checked.stderr


def test_without_a_compiler_it_says_what_to_install(tree: Path, tmp_path: Path) -> None:
    empty = tmp_path / "no-programs"
    empty.mkdir()
    built = run(sys.executable, "setup.py", "build_ext", cwd=tree, PATH=str(empty), CC="")
    assert built.returncode != 0
    assert "no C compiler" in built.stderr
    assert "apt-get install gcc" in built.stderr


def test_without_headers_it_says_what_to_install(tree: Path) -> None:
    without_headers = (
        "import runpy, sys, sysconfig\n"
        "real = sysconfig.get_paths\n"
        "sysconfig.get_paths = lambda *a, **k: real(*a, **k) | {'include': '/nonexistent'}\n"
        "sys.argv = ['setup.py', 'build_ext']\n"
        "runpy.run_path('setup.py', run_name='__main__')\n"
    )
    built = run(sys.executable, "-c", without_headers, cwd=tree)
    assert built.returncode != 0
    assert "Python's C headers are missing (/nonexistent/Python.h)" in built.stderr
    assert "python3-dev" in built.stderr
