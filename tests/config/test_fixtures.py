"""Each broken plan and profile in tests/data gives exactly the error beside it.

`NAME.error` holds the type, the message and the remedy. They are read by people
too: this is how the errors look.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qpostcopy.config import ConfigError, load_plan, load_profile
from qpostcopy.errors import ExitCode

DATA = Path(__file__).parent.parent / "data"
BROKEN = sorted([*DATA.glob("plans/*.yaml"), *DATA.glob("profiles/*.yaml")])


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_broken_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    load = load_plan if path.parent.name == "plans" else load_profile
    with pytest.raises(ConfigError) as caught:
        load(Path(path.name))
    error = caught.value
    said = f"{type(error).__name__}\n{error}\nremedy: {error.remedy}\n"
    assert said == path.with_suffix(".error").read_text()
    assert error.exit_code == ExitCode.USAGE


def test_every_fixture_has_both_halves() -> None:
    assert len(BROKEN) > 70
    assert sorted(DATA.glob("p*/*.error")) == [path.with_suffix(".error") for path in BROKEN]
