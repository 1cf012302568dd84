"""YAML as we accept it: one small mapping, each key once, each key with its line.

On PyYAML's composer, with its traps taken out. A plain scalar that YAML 1.1
reads as something other than what it looks like (`off`, `010`, `1:30`, a date)
becomes a `Trap`: no field accepts one, and its message says what YAML made of
the text. Anchors, aliases, tags, further documents, deep nests and large files
are refused: no plan needs them, and expanding them is how YAML files become bombs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from qpostcopy.config.problems import ConfigError, KeyPath, Problem, dotted

MAX_FILE_BYTES = 256 * 1024
MAX_DEPTH = 16

Value = object  # None | bool | int | str | Trap | list[Value] | dict[str, Value]

_TAG = "tag:yaml.org,2002:"
_PLAIN_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,30})")
_HEX_NUMBER = re.compile(r"0x[0-9a-fA-F]{1,16}")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the file; both count from 1."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Trap:
    """Something that YAML does not read as the text it is.

    :param text: as written. :param reading: what YAML makes of it.
    :param remedy: what to do, whatever was expected; None: that depends on it.
    """

    text: str
    reading: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A file's content, where each key stands, and what was found while reading."""

    file: str
    root: dict[str, Value]
    marks: dict[KeyPath, Mark]
    problems: tuple[Problem, ...] = ()

    def problem(self, path: KeyPath, text: str, remedy: str | None = None) -> Problem:
        """A finding at `path`, with the line of its nearest key that is in the file."""
        known = path
        while known not in self.marks:
            known = known[:-1]
        mark = self.marks[known]
        return Problem(self.file, mark.line, mark.column, dotted(path), text, remedy)


def load_document(path: Path, error: type[ConfigError]) -> Document:
    """Read `path`.

    Duplicate keys do not end the reading; they are in `problems`.

    :raise ConfigError: of the type `error`, when nothing can be made of the file.
    """
    text = _read(path, error)
    try:
        node = _compose(text)
    except yaml.YAMLError as cause:
        raise error([_syntax_problem(str(path), text, cause)]) from cause
    except (ValueError, OverflowError) as cause:
        # PyYAML passes escapes (`"\UFFFFFFFF"`) and version numbers on unchecked.
        what = "not valid YAML: an escape or a number in it is out of range"
        raise error([Problem(str(path), None, None, "", what)]) from cause
    return _document(str(path), node, error)


# --- the bytes ------------------------------------------------------------------------------


def _read(path: Path, error: type[ConfigError]) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the path
        reason = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
        raise error([Problem(str(path), None, None, "", f"cannot be read: {reason}")]) from cause
    if len(data) > MAX_FILE_BYTES:
        text = (
            f"is larger than {MAX_FILE_BYTES // 1024} KiB, the most that a plan or profile may have"
        )
        raise error([Problem(str(path), None, None, "", text)])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        line = data.count(b"\n", 0, cause.start) + 1
        text = f"byte {data[cause.start]:#04x} is not UTF-8"
        raise error([Problem(str(path), line, None, "", text, "save the file as UTF-8")]) from cause


# --- the YAML -------------------------------------------------------------------------------


class _RefusedYaml(yaml.MarkedYAMLError):
    """Valid YAML that we do not accept."""

    def __init__(self, problem: str, event: yaml.Event, remedy: str) -> None:
        assert isinstance(event.start_mark, yaml.Mark)
        super().__init__(problem=problem, problem_mark=event.start_mark)
        self.remedy = remedy


class _Composer(yaml.SafeLoader):
    """SafeLoader's nodes, without aliases, anchors, tags and deep nests."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node | None:
        self._refuse(self.peek_event())  # type: ignore[no-untyped-call]
        self.depth += 1
        try:
            return super().compose_node(parent, index)  # type: ignore[arg-type]
        finally:
            self.depth -= 1

    def _refuse(self, event: yaml.NodeEvent) -> None:
        if self.depth >= MAX_DEPTH:
            text = f"more than {MAX_DEPTH} levels deep"
            raise _RefusedYaml(text, event, "no plan and no profile is so deep")
        if event.anchor is not None:
            name = f"*{event.anchor}" if isinstance(event, yaml.AliasEvent) else f"&{event.anchor}"
            raise _RefusedYaml(
                f"anchors and aliases ({name[:40]}) are refused", event, "write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise _RefusedYaml(
                f"tags ({tag[:40]}) are refused", event, "write the value without a tag"
            )


def _compose(text: str) -> yaml.Node | None:
    composer = _Composer(text)
    try:
        composer.get_event()  # type: ignore[no-untyped-call]  # the start of the stream
        if composer.check_event(yaml.StreamEndEvent):
            return None
        node = composer.compose_document()
        if not composer.check_event(yaml.StreamEndEvent):
            event = composer.peek_event()  # type: ignore[no-untyped-call]
            raise _RefusedYaml("a second document begins here", event, "keep one document a file")
        return node
    finally:
        composer.dispose()


def _syntax_problem(file: str, text: str, cause: yaml.YAMLError) -> Problem:
    if isinstance(cause, yaml.reader.ReaderError):
        line = text.count("\n", 0, cause.position) + 1
        what = f"not valid YAML: character U+{int(cause.character):04X} is not allowed"
        return Problem(
            file, line, None, "", what, "remove it, or write it as an escape in double quotes"
        )
    assert isinstance(cause, yaml.MarkedYAMLError)
    mark = cause.problem_mark or cause.context_mark
    assert mark, "PyYAML marks its errors"
    if isinstance(cause, _RefusedYaml):
        return Problem(file, mark.line + 1, mark.column + 1, "", str(cause.problem), cause.remedy)
    what = ": ".join(part for part in ("not valid YAML", cause.context, cause.problem) if part)
    return Problem(file, mark.line + 1, mark.column + 1, "", what, _syntax_remedy(what))


def _syntax_remedy(what: str) -> str | None:
    if r"'\t'" in what:
        return "YAML does not indent with tabs; use spaces"
    if "mapping values are not allowed" in what:
        return "check the indentation, and quote a value that has `: ` in it"
    return None


# --- the values -----------------------------------------------------------------------------


def _document(file: str, node: yaml.Node | None, error: type[ConfigError]) -> Document:
    empty = node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null")
    if empty or not isinstance(node, yaml.MappingNode):
        text = "is empty" if empty else "is not a mapping"
        remedy = "begin with `version: 1`"
        raise error([Problem(file, 1, 1, "", f"{text}: expected keys and values", remedy)])
    reader = _Values(file)
    root = reader.value(node, ())
    if isinstance(root, Trap):
        raise error([Problem(file, 1, 1, "", f"is {root.reading}", root.remedy)])
    assert isinstance(root, dict)
    return Document(file, root, reader.marks, tuple(reader.problems))


@dataclass
class _Values:
    """Turns nodes into values and notes where each key stands."""

    file: str
    marks: dict[KeyPath, Mark] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def value(self, node: yaml.Node, path: KeyPath) -> Value:
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.marks[(*path, index)] = _mark(item)
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return _plain_value(node.tag.removeprefix(_TAG), node.value)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> Value:
        self.marks.setdefault(path, _mark(node))
        result: dict[str, Value] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                remedy = (
                    "is this a {{ template }} that was not filled in? else write the key as a word"
                )
                return Trap("{...}", "a mapping with a list or a mapping for a key", remedy)
            key = (*path, key_node.value)
            if key in self.marks:
                self._twice(key, _mark(key_node))
            else:
                self.marks[key] = _mark(key_node)
                result[key_node.value] = self.value(value_node, key)
        return result

    def _twice(self, key: KeyPath, mark: Mark) -> None:
        text = f"this key is here twice, first on line {self.marks[key].line}"
        remedy = "keep one of them"
        self.problems.append(Problem(self.file, mark.line, mark.column, dotted(key), text, remedy))


def _mark(node: yaml.Node) -> Mark:
    return Mark(node.start_mark.line + 1, node.start_mark.column + 1)


def _plain_value(kind: str, text: str) -> Value:
    """What the scalar means; `kind` is YAML 1.1's idea of it."""
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return Trap(ascii(text)[1:-1], "half of a surrogate pair", "write the whole character")
    if kind == "null":
        return None
    if kind == "bool":
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        return Trap(text, f"the boolean {text.lower() in ('yes', 'on')}")
    if kind == "int":
        if _PLAIN_NUMBER.fullmatch(text):
            return int(text)
        return int(text, 16) if _HEX_NUMBER.fullmatch(text) else Trap(text, _odd_number(text))
    if kind == "float":
        return Trap(text, "a number in base 60" if ":" in text else "a number with a fraction")
    if kind == "timestamp":
        return Trap(text, "a date")
    return text


def _odd_number(text: str) -> str:
    """What YAML 1.1 makes of an integer in an odd spelling."""
    if ":" in text:
        value = 0
        for part in text.lstrip("+-").replace("_", "").split(":")[:8]:
            value = value * 60 + int(part[:9])
        return f"{value}, in base 60"
    digits = text.lstrip("+-").replace("_", "")
    if digits.startswith("0") and digits.isdigit() and len(digits) <= 20:
        return f"{int(digits, 8)}, in base 8"
    return "a number in an odd spelling"
