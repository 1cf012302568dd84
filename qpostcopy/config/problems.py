"""What is wrong with a file of the operator's, and the errors that carry it.

A file is read to its end before anything is raised: one error holds one
`Problem` for each finding, each naming file, line, key, value, what was
expected and, where it can be guessed, what to write instead.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpostcopy.errors import UsageError

KeyPath = tuple[str | int, ...]

MAX_LINES = 50


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding. `line` and `column` count from 1; None: the file as a whole."""

    file: str
    line: int | None
    column: int | None
    key: str
    text: str
    remedy: str | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.text) if part)


class ConfigError(UsageError):
    """A plan or a profile is wrong; nothing was touched.

    The message has one line for each problem; with several, each line ends in
    its own remedy, with one the remedy is `remedy`. Past `MAX_LINES` findings the
    message counts the rest; `problems` holds them all.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(str(self.problems[0]), remedy=self.problems[0].remedy)
        else:
            lines = [f"{p}; {p.remedy}" if p.remedy else str(p) for p in self.problems[:MAX_LINES]]
            if len(self.problems) > MAX_LINES:
                lines.append(f"... and {len(self.problems) - MAX_LINES} more")
            count = len(self.problems)
            super().__init__("\n".join(lines), remedy=f"correct these {count} findings")


class PlanError(ConfigError):
    """The plan is wrong (or the plan and the profile it names)."""


class ProfileError(ConfigError):
    """The profile is wrong, or there is no such profile."""


def dotted(path: KeyPath) -> str:
    """("push", 0, "range") -> `push[0].range`"""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if part.isprintable() and len(part) <= 40 else repr(part[:40])
            text += f".{shown}" if text else shown
    return text


def did_you_mean(word: str, known: Sequence[str]) -> str | None:
    """`did you mean X?` for the nearest known word, if one is near."""
    near = difflib.get_close_matches(word[:80], known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else None
