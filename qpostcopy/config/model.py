"""The base of all plan and profile models, and how their findings become problems.

Every model is frozen. Read from a file (`validate`, context `FROM_FILE`), a key
is known by its name in the file (the alias) only, and quantities need units;
built by our own code, fields go by their Python names, with units in the name.
A model reports unknown, missing and bad keys together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from qpostcopy.config.loader import Document, Trap
from qpostcopy.config.problems import KeyPath, Problem, did_you_mean

#: The validation context of values that an operator wrote.
FROM_FILE: Final = {"from_file": True}

SHOWN_CHARACTERS = 60


def from_file(info: ValidationInfo) -> bool:
    """Is this value an operator's, and not one of our own code?"""
    return info.context is FROM_FILE


def shown(value: object) -> str:
    """A value as its writer would recognise it, on one line and of bounded length."""
    if isinstance(value, Trap):
        return f"{_cut(value.text)} (which YAML reads as {value.reading})"
    if value is None:
        return "is empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        text = value if value.isprintable() else repr(value)[1:-1]
        return f'"{_cut(text)}"'
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def finding(text: str, *, remedy: str | None = None, at: str = "") -> PydanticCustomError:
    """The one kind of error that our validators raise.

    :param at: key below the validated value, if the finding is there.
    """
    return PydanticCustomError("finding", "{text}", {"text": text, "remedy": remedy, "at": at})


def refusal(value: object, expected: str, remedy: str | None = None) -> PydanticCustomError:
    """The finding "VALUE: expected EXPECTED"."""
    if isinstance(value, Trap) and value.remedy:
        remedy = value.remedy
    return finding(f"{shown(value)}: expected {expected}", remedy=remedy)


class Model(BaseModel):
    """Frozen; unknown, missing and bad keys are all reported at once."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, validate_default=False
    )

    @model_validator(mode="wrap")
    @classmethod
    def _report_all(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        if isinstance(data, cls):
            return data
        keys = cls.keys_in_file() if from_file(info) else cls.all_keys()
        if not isinstance(data, Mapping):
            raise refusal(data, f"a mapping with the keys {', '.join(keys)}" if keys else "{}")
        errors = [_unknown(key, keys, data[key]) for key in data if key not in keys]
        try:
            made = handler({key: data[key] for key in data if key in keys})
        except ValidationError as cause:
            errors += [cls._again(details) for details in cause.errors(include_url=False)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made

    @classmethod
    def keys_in_file(cls) -> list[str]:
        """The keys of this section, as a file has them."""
        return [field.alias or name for name, field in cls.model_fields.items()]

    @classmethod
    def all_keys(cls) -> list[str]:
        return [*cls.keys_in_file(), *cls.model_fields]

    @classmethod
    def _again(cls, details: Any) -> InitErrorDetails:
        """An error of pydantic's or ours, in a form that can be raised once more."""
        if details["type"] == "finding":
            error = finding(details["ctx"]["text"], **_only(details["ctx"], "remedy", "at"))
        elif details["type"] == "missing":
            error = finding(f"is missing: expected {cls._describe(details['loc'])}")
        else:
            error = finding(f"{shown(details['input'])}: {details['msg']}")
        return InitErrorDetails(type=error, loc=details["loc"], input=details["input"])

    @classmethod
    def _describe(cls, loc: KeyPath) -> str:
        for name, field in cls.model_fields.items():
            if loc == (field.alias or name,) and field.description:
                return field.description
        return "a value"


def _only(ctx: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: ctx[key] for key in keys}


def _unknown(key: object, keys: list[str], value: object) -> InitErrorDetails:
    word = str(key)
    known = f"the keys here are {', '.join(keys)}" if keys else "take it out: no key goes here"
    remedy = did_you_mean(word, keys) or known
    error = finding("no such key", remedy=remedy)
    return InitErrorDetails(type=error, loc=(word,), input=value)


_Made = TypeVar("_Made", bound=Model)


def validate(
    model: type[_Made], root: Mapping[str, object], document: Document
) -> tuple[_Made | None, list[Problem]]:
    """Make the model of what an operator wrote.

    :return: the model or None, and all that is wrong with the file, by line.
    """
    try:
        made = model.model_validate(root, context=FROM_FILE)
    except ValidationError as cause:
        found = [_problem(document, details) for details in cause.errors(include_url=False)]
        return None, by_line([*document.problems, *found])
    return made, list(document.problems)


def by_line(problems: list[Problem]) -> list[Problem]:
    """In the order in which one reads the file."""
    return sorted(problems, key=lambda problem: (problem.line or 0, problem.column or 0))


def _problem(document: Document, details: Any) -> Problem:
    ctx = details.get("ctx", {})
    at: KeyPath = tuple(ctx["at"].split(".")) if ctx.get("at") else ()
    text = ctx.get("text") or f"{shown(details['input'])}: {details['msg']}"
    return document.problem((*details["loc"], *at), text, ctx.get("remedy"))
