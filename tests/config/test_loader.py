"""The loader keeps places, and hostile files end in a ConfigError, quickly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qpostcopy.config import Plan, PlanError, load_plan
from qpostcopy.config.loader import MAX_FILE_BYTES, Mark, Trap, load_document
from qpostcopy.config.problems import MAX_LINES


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "plan.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_every_key_path_has_its_place(tmp_path: Path) -> None:
    text = "a: 1\nb:\n  - x\n  - {c: 2,\n     d: 3}\n'e f': {}\n"
    document = load_document(write(tmp_path, text), PlanError)
    assert document.root == {"a": 1, "b": ["x", {"c": 2, "d": 3}], "e f": {}}
    assert document.marks == {
        (): Mark(1, 1),
        ("a",): Mark(1, 1),
        ("b",): Mark(2, 1),
        ("b", 0): Mark(3, 5),
        ("b", 1): Mark(4, 5),
        ("b", 1, "c"): Mark(4, 6),
        ("b", 1, "d"): Mark(5, 6),
        ("e f",): Mark(6, 1),
    }


def test_a_missing_key_is_placed_at_its_nearest_parent(tmp_path: Path) -> None:
    document = load_document(write(tmp_path, "a: 1\nb:\n  c: {d: 1}\n"), PlanError)
    problem = document.problem(("b", "c", "e", 0, "f"), "is missing")
    assert (problem.line, problem.key) == (3, "b.c.e[0].f")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("7", 7),
        ("-7", -7),
        ("0x10", 16),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("'off'", "off"),
        ('"010"', "010"),
        ("1e3", "1e3"),
        ("089", "089"),
        ("::1", "::1"),
        ("off", Trap("off", "the boolean False")),
        ("Yes", Trap("Yes", "the boolean True")),
        ("010", Trap("010", "8, in base 8")),
        ("1:30", Trap("1:30", "90, in base 60")),
        ("1:30:00", Trap("1:30:00", "5400, in base 60")),
        ("0b11", Trap("0b11", "a number in an odd spelling")),
        ("1_000", Trap("1_000", "a number in an odd spelling")),
        ("+1", Trap("+1", "a number in an odd spelling")),
        ("1.5", Trap("1.5", "a number with a fraction")),
        (".nan", Trap(".nan", "a number with a fraction")),
        ("1:30.5", Trap("1:30.5", "a number in base 60")),
        ("2026-11-23", Trap("2026-11-23", "a date")),
        ("9" * 5000, Trap("9" * 5000, "a number in an odd spelling")),
    ],
)
def test_scalars(tmp_path: Path, written: str, value: object) -> None:
    read = load_document(write(tmp_path, f"key: {written}\n"), PlanError).root["key"]
    assert read == value
    assert type(read) is type(value)


def test_duplicate_keys_do_not_hide_other_findings(tmp_path: Path) -> None:
    text = "a: 1\na: 2\nb: {c: 1, c: 2}\n"
    document = load_document(write(tmp_path, text), PlanError)
    assert [(p.line, p.key) for p in document.problems] == [(2, "a"), (3, "b.c")]
    assert document.root == {"a": 1, "b": {"c": 1}}


def refused(path: Path) -> str:
    with pytest.raises(PlanError) as caught:
        load_plan(path)
    return str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    assert refused(tmp_path).endswith(": cannot be read: Is a directory")
    assert refused(tmp_path / "no").endswith("/no: cannot be read: No such file or directory")
    assert "cannot be read" in refused(Path("a\0b"))


def test_file_too_large(tmp_path: Path) -> None:
    text = "version: 1\n#" + "x" * MAX_FILE_BYTES
    assert "is larger than 256 KiB" in refused(write(tmp_path, text))


def test_largest_file_is_read(tmp_path: Path) -> None:
    text = "version: 1\n#"
    text += "x" * (MAX_FILE_BYTES - len(text))
    assert "name: is missing" in refused(write(tmp_path, text))


@pytest.mark.parametrize("opening", ["[", "{a: ", "- ", "? "])
def test_deep_nests_are_cut_off_at_once(tmp_path: Path, opening: str) -> None:
    text = opening * 50_000 if opening in ("- ", "? ") else "a: " + opening * 50_000
    assert "more than 16 levels deep" in refused(write(tmp_path, text))


def test_a_bom_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    text = "\ufeffa: 1\r\nb: 2\r\n"
    document = load_document(write(tmp_path, text), PlanError)
    assert document.root == {"a": 1, "b": 2}
    assert document.marks[("b",)] == Mark(2, 1)


def test_hostile_text_stays_on_its_line_and_short(tmp_path: Path) -> None:
    text = 'version: "\\e[31m\\nplan.yaml:1: fine' + "x" * 10_000 + '"\n'
    line = refused(write(tmp_path, text)).splitlines()[0]
    assert line.isprintable()
    assert len(line) < 200 + len(str(tmp_path))


def test_a_hopeless_file_gets_a_bounded_message(tmp_path: Path) -> None:
    text = "version: 1\n" + "".join(f"key{index}:\n" for index in range(1000))
    with pytest.raises(PlanError) as caught:
        load_plan(write(tmp_path, text))
    assert len(caught.value.problems) == 1003
    assert len(str(caught.value).splitlines()) == MAX_LINES + 1
    assert str(caught.value).endswith("\n... and 953 more")
    assert caught.value.remedy == "correct these 1003 findings"


# --- any file at all ------------------------------------------------------------------------


def words(text: str) -> st.SearchStrategy[str]:
    return st.sampled_from(text.split())


ANY_TEXT = st.characters(exclude_categories=["Cs"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(ANY_TEXT, max_size=20)
    | words("auto never required quit local unlimited 60s 64KiB 1Gbit/s 127.0.0.1 /q sequential")
)
KEYS = words(
    """version name source destination host qmp pid after lanes listen port push insecure profile
    precopy mode max_passes max switch_when missing_below stalled bandwidth limits before_switch
    fault ahead behind then range start end block sequential trace"""
) | st.text(ANY_TEXT, max_size=8)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)


def is_plan_or_plan_error(path: Path) -> None:
    try:
        assert isinstance(load_plan(path), Plan)
    except PlanError as error:
        assert error.problems
        assert all(line.isprintable() for line in str(error).splitlines())
        assert len(str(error).splitlines()) == min(len(error.problems), MAX_LINES + 1)
        str(error).encode()


WITHOUT_FIXTURE_CHECK = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@WITHOUT_FIXTURE_CHECK
@given(tree=st.dictionaries(KEYS, TREES, max_size=8))
def test_any_tree_is_a_plan_or_a_plan_error(tmp_path: Path, tree: object) -> None:
    is_plan_or_plan_error(write(tmp_path, yaml.safe_dump(tree, allow_unicode=True)))


FRAGMENTS = (
    words("version: 1 name: source: {qmp: /a} destination: push: lanes: profile: - [ ] { } , : ?")
    | words("""&a *a << ! !!python/object:x '"' " ' | > % @ ` # --- ... %YAML 1.1 %TAG""")
    | words(r"\uD800 \UFFFFFFFF \x 1:30 0x 0o7 = ~ .inf 1e999")
    | st.sampled_from(["\n", "\n  ", " ", ": ", "\t", "\r", "\0", "\u2028", "\ufeff", "\x85"])
)


@WITHOUT_FIXTURE_CHECK
@given(pieces=st.lists(FRAGMENTS | st.text(max_size=4), max_size=30))
@example(pieces=['a: "\\UFFFFFFFF"'])
@example(pieces=['a: "\\U00110000"'])
@example(pieces=["%YAML " + "9" * 5000 + ".1\n--- a: 1"])
@example(pieces=["a: !<%FF> x"])
@example(pieces=["a: 1:" + "9" * 5000])
@example(pieces=["a: 0b" + "1" * 200_000])
def test_any_text_is_a_plan_or_a_plan_error(tmp_path: Path, pieces: list[str]) -> None:
    text = "".join(pieces).encode("utf-8", "surrogatepass")
    is_plan_or_plan_error(write(tmp_path, text))


@pytest.mark.fuzz
@pytest.mark.slow
@settings(WITHOUT_FIXTURE_CHECK, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "3000")))
@given(data=st.binary(max_size=400) | st.lists(FRAGMENTS, max_size=80).map("".join))
def test_any_bytes_are_a_plan_or_a_plan_error(tmp_path: Path, data: bytes | str) -> None:
    encoded = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    is_plan_or_plan_error(write(tmp_path, encoded))


@pytest.mark.fuzz
@pytest.mark.slow
@settings(WITHOUT_FIXTURE_CHECK, max_examples=int(os.environ.get("FUZZ_EXAMPLES", "1000")))
@given(data=st.data())
def test_a_mutated_plan_is_a_plan_or_a_plan_error(tmp_path: Path, data: st.DataObject) -> None:
    """The shipped plan with a few lines changed, lost or twice: close to what people get wrong."""
    source = Path(__file__).parents[2] / "configs" / "plan.yaml"
    lines = [line for line in source.read_text().splitlines() if line.strip()[:1] not in ("", "#")]
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(lines) - 1))
        change = data.draw(st.sampled_from(["drop", "double", "value", "indent"]))
        key, _, _ = lines[index].partition(":")
        lines[index : index + 1] = {
            "drop": [],
            "double": [lines[index]] * 2,
            "value": [f"{key}: {data.draw(FRAGMENTS)}"],
            "indent": [" " + lines[index]],
        }[change]
    is_plan_or_plan_error(write(tmp_path, "\n".join(lines)))
