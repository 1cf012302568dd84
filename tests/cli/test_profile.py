"""`qpostcopy profile validate`."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from qpostcopy.cli.profile import command
from qpostcopy.config import ProfileError

CONFIGS = Path(__file__).parents[2] / "configs" / "profiles"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["validate", *arguments])


def test_good_files_get_a_line_each() -> None:
    sequential, low = str(CONFIGS / "sequential.yaml"), str(CONFIGS / "low-memory-first.yaml")
    result = run(sequential, low)
    around = "a fault brings 64KiB ahead, 0 behind, then schedule"
    assert result.exit_code == 0
    assert result.output == (
        f"{sequential}: ok: sequential, 1 step, {around}\n"
        f"{low}: ok: low-memory-first, 3 steps, {around}\n"
    )


def test_all_findings_of_all_files_are_in_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("version: 1\nname: a\nfault: {ahead: 1}\n")
    (tmp_path / "b.yaml").write_text("version: 1\nname: b\npush: [{trace: {file: x}}]\nfoo: 1\n")
    result = run(
        str(tmp_path / "a.yaml"), str(CONFIGS / "sequential.yaml"), str(tmp_path / "b.yaml")
    )
    assert "sequential.yaml: ok" in result.output
    error = result.exception
    assert isinstance(error, ProfileError)
    assert [(Path(p.file).name, p.line, p.key) for p in error.problems] == [
        ("a.yaml", 3, "fault.ahead"),
        ("b.yaml", 3, "push[0].trace.file"),
        ("b.yaml", 4, "foo"),
    ]


@pytest.mark.parametrize("arguments", [[], ["--no-such-option"]])
def test_wrong_use_is_clicks_own_error(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == 2
