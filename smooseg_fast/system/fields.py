"""Fields of settings: a dataclass declares kinds, choices, bounds and help; values from Python, files and command lines
are held against it.

steps: Annotated[int, Bounds(1)] = 200 \"\"\"Optimiser steps.\"\"\"
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

# kind -> (what Python may give for it, in words, what --help shows for a value)
KINDS: dict[type, tuple[type, str, str]] = {
    str: (str, "text", "TEXT"),
    int: (Integral, "a whole number", "N"),
    float: (Real, "a number", "X"),
    bool: (bool, "True or False", ""),
}


@dataclass(frozen=True)
class Bounds:
    """The legal range of a number, both ends included; `note` follows the upper end in messages."""

    low: float
    high: float | None = None
    note: str = ""

    def check(self, flag: str, value: float) -> None:
        if value >= self.low and (self.high is None or value <= self.high):
            return
        if isinstance(self.high, float):
            raise UserError(f"{flag}: must be between {self.low:g} and {self.high:g}, got {value}")
        legal = f"at least {self.low:,}"  # also for NaN
        if self.high is not None and value > self.high:
            power = (int(self.high) + 1).bit_length() - 1
            legal = f"below 2^{power}" if power > 32 else f"at most {self.high:,}{self.note}"
        raise UserError(f"{flag}: must be {legal}, got {value}")

    def __str__(self) -> str:
        if self.high is None or self.high > 2**32:
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Group:
    """Opens a group of --help: this field and those after it."""

    title: str


@dataclass(frozen=True)
class Value:
    """What --help shows for a value; the shell completes paths for FOLDER, FILE and PATH.

    A word without a flag is taken to be meant for the `usual` field. A `positional` one has no flag at all.
    """

    metavar: str
    usual: bool = False
    positional: bool = False


Rule = Callable[[Any, str], Any]  # (value, flag); raises UserError


@dataclass(frozen=True)
class Field:
    """A field as its annotation declares it."""

    name: str
    kind: type
    many: bool
    optional: bool
    required: bool
    choices: tuple[str, ...]
    bounds: Bounds | None
    value: Value
    rules: tuple[Rule, ...]
    group: str

    @property
    def flag(self) -> str:
        return flag(self.name)

    @property
    def flags(self) -> tuple[str, ...]:
        """All words that name it; the second of two switches it off."""
        if self.value.positional:
            return ()
        return (self.flag, "--no-" + self.flag[2:]) if self.kind is bool else (self.flag,)

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.value.metavar if self.value.positional else self.flag

    def read(self, words: Sequence[str]) -> Any:
        """The value that `words` of a command line stand for, checked. UserError when they stand for none."""
        if self.optional and list(words) == ["None"]:
            return None
        values = tuple(map(self._number, words))
        value = values if self.many else values[0]
        self.check(value)
        return value

    def _number(self, word: str) -> Any:
        try:
            return self.kind(word)
        except ValueError:
            raise UserError(f"{self.label}: must be {KINDS[self.kind][1]}, got {word!r:.80}") from None

    def check(self, value: Any) -> None:
        """UserError when `value` is not legal; names the flag, the value and the legal ones."""
        if value is None and self.optional:
            return
        if self.many and not isinstance(value, tuple):
            raise UserError(f"{self.label}: must be one or more values, got {value!r:.80}")
        for item in value if self.many else (value,):
            self._check_one(item)
        for rule in self.rules:
            rule(value, self.label)

    def _check_one(self, value: Any) -> None:
        accepted, words, _ = KINDS[self.kind]
        if not isinstance(value, accepted) or (self.kind is not bool and isinstance(value, bool)):
            raise UserError(f"{self.label}: must be {words}, got {value!r:.80}")
        if self.choices and value not in self.choices:
            raise UserError(f"{self.label}: {value!r:.80} is not known; choose one of {', '.join(self.choices)}")
        if value == "":
            thing = "a folder" if self.value.metavar == "FOLDER" else "a value"
            raise UserError(
                f"{self.label}: is empty; give {thing}" + (", or leave it out" if not self.required else "")
            )
        if self.bounds is not None:
            self.bounds.check(self.label, value)


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


@cache
def fields_of(kind: type) -> dict[str, Field]:
    """The fields of the dataclass `kind` by their names, in their order."""
    hints, group, declared = get_type_hints(kind, include_extras=True), "options", {}
    for field in dataclasses.fields(kind):
        declared[field.name] = _field(field, hints[field.name], group)
        group = declared[field.name].group
    return declared


def check_fields(settings: Any) -> None:
    """UserError for the first field of a dataclass instance whose value is not legal by itself."""
    for field in fields_of(type(settings)).values():
        field.check(getattr(settings, field.name))


@cache
def helps_of(kind: type) -> dict[str, str]:
    """The docstrings below the fields of the dataclass `kind`, each in one line."""
    (body,) = (node.body for node in ast.parse(textwrap.dedent(inspect.getsource(kind))).body)
    helps = {}
    for node, below in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            helps[node.target.id] = " ".join(below.value.value.split())
    return helps


def _field(field: dataclasses.Field, hint: Any, group: str) -> Field:
    """`group`: that of the field before."""
    notes: list[Any] = []
    optional = False
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        optional |= types.NoneType in get_args(hint)
        hint, *more = (part for part in get_args(hint) if part is not types.NoneType)
        notes += more
    many = get_origin(hint) is tuple
    if many:
        hint = get_args(hint)[0]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    shown = "{" + ",".join(choices) + "}" if choices else KINDS[kind][2]
    return Field(
        name=field.name,
        kind=kind,
        many=many,
        optional=optional,
        required=field.default is dataclasses.MISSING,
        choices=choices,
        bounds=next((note for note in notes if isinstance(note, Bounds)), None),
        value=next((note for note in notes if isinstance(note, Value)), Value(shown)),
        rules=tuple(note for note in notes if callable(note)),
        group=next((note.title for note in notes if isinstance(note, Group)), group),
    )
