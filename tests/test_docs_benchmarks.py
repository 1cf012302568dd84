"""docs/benchmarks.md names every key of bench.json, every figure, and no other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest

from qpostcopy.bench import judge, run
from qpostcopy.bench.figures import FIGURES
from qpostcopy.bench.model import VERSION, Book, Cell, Engine, Figures, Link, Outcome
from qpostcopy.bench.portrait import _EVERY_SECONDS
from qpostcopy.bench.qemu_engine import QemuEngine
from qpostcopy.bench.series import BIN_MS
from qpostcopy.bench.sheet import BAD_WORDS, ENOUGH_RUNS
from qpostcopy.qmp.schema import Model

TEXT = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()


def section(title: str) -> str:
    """What stands below a heading, up to the next of any level."""
    (found,) = re.findall(rf"^##+ {re.escape(title)}\n(.*?)(?=^##|\Z)", TEXT, re.S | re.M)
    return str(found)


def rows(text: str) -> dict[str, list[str]]:
    """Each name in a first cell -> the other cells of its row."""
    found: dict[str, list[str]] = {}
    for first, others in re.findall(r"^\| (`.*?) \|(.*)\|$", text, re.M):
        for name in re.findall(r"`([\w-]+)`", first):
            assert name not in found, f"twice: {name}"
            found[name] = [cell.strip() for cell in others.split("|")]
    return found


def names(text: str) -> set[str]:
    return set(re.findall(r"`([\w-]+)`", text))


def models_in(annotation: Any) -> set[type[Model]]:
    """The models that a field's type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, Model):
        return {annotation}
    return {model for part in get_args(annotation) for model in models_in(part)}


def reachable(model: type[Model]) -> dict[str, type[Model]]:
    """A model and all that it holds, by name."""
    found, left = {}, {model}
    while left:
        one = left.pop()
        found[one.__name__] = one
        inner = {m for field in one.model_fields.values() for m in models_in(field.annotation)}
        left |= inner - set(found.values())
    return found


MODELS = reachable(Book)


def test_every_model_has_a_section_and_no_other_has() -> None:
    part = TEXT[TEXT.index("\n## `bench.json`\n") :]
    assert len(MODELS) > 10
    assert sorted(re.findall(r"^### `(\w+)`$", part, re.M)) == sorted(MODELS)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"Figures"}))
def test_every_key_of_bench_json(name: str) -> None:
    table = rows(section(f"`{name}`"))
    assert table.keys() == MODELS[name].model_fields.keys()
    for key, field in MODELS[name].model_fields.items():
        named = {model.__name__ for model in models_in(field.annotation)}
        assert named <= names(" ".join(table[key])), key


def test_the_values_that_a_key_may_have() -> None:
    cells = rows(section("`Cell`"))
    assert names(cells["engine"][0]) == set(Engine)
    assert names(cells["link"][0]) == set(Link)
    assert cells.keys() == Cell.model_fields.keys()
    assert names(rows(section("`Run`"))["outcome"][0]) == set(Outcome)
    assert rows(section("`Book`"))["v"] == [str(VERSION)]


def test_every_figure() -> None:
    table = rows(section("The figures"))
    assert table.keys() == Figures.model_fields.keys()
    for figure in FIGURES:
        title, resolution, how = table[figure.name]
        assert title == figure.title
        assert resolution == (figure.text(figure.resolution) if figure.resolution else "")
        assert how


def test_every_engine_and_link() -> None:
    part = section("What is compared")
    engines = re.findall(r"^\| `?(\S.*?)`? \|", part, re.M)
    assert set(engines) >= {*Engine, *Link, "qpostcopy with precopy"}


def test_the_rules_are_those_of_the_code() -> None:
    one, sure = section("One run"), section("How sure")
    assert f"more than {judge.MOVED_SHARE:.0%} off the median" in one
    assert f"**Baseline**: {run.BASELINE_SECONDS:g} quiet seconds" in one
    assert f"a second at least, {run._SETTLE_AT_MOST_SECONDS:g} s at most" in one
    assert all(f"`{words}`" in one for words in BAD_WORDS.values())
    assert f"fewer than {judge._P99_FAULTS} faults" in sure
    assert ENOUGH_RUNS == 5
    assert "fewer than five values" in sure
    given = QemuEngine(postcopy=False).give_up_seconds
    assert f"It is given {given:g} s" in section("What is compared")
    plots = section("The plots")
    assert f"in bins of {BIN_MS:g} ms" in plots
    assert f"every {_EVERY_SECONDS * 1e3:g} ms" in plots
