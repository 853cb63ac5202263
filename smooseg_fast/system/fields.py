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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError
from .stores import require_local

# kind -> (what Python may give for it, in words, what --help shows for a value)
KINDS: dict[type, tuple[type[Any], str, str]] = {
    str: (str, "text", "TEXT"),
    int: (Integral, "a whole number", "N"),
    float: (Real, "a number", "X"),
    bool: (bool, "True or False", ""),
}


PATHS = ("FOLDER", "DIR", "FILE", "PATH")  # metavars of local paths


@dataclass(frozen=True)
class Bounds:
    """The legal range of a number, both ends included; `note` follows the upper end in messages."""

    low: float
    high: float | None = None
    note: str = ""

    def check(self, flag: str, value: float) -> None:
        """UserError when `value` of `flag` is outside."""
        if self.low <= value and (self.high is None or value <= self.high):
            return
        legal = f"at least {self.low:,}"  # also for NaN
        if isinstance(self.high, float):
            legal = f"between {self.low:g} and {self.high:g}"
        elif self.high is not None and value > self.high:
            legal = "below 2^63" if self.high == 2**63 - 1 else f"at most {self.high:,}{self.note}"
        raise UserError(f"{flag}: must be {legal}, got {value}")

    def __str__(self) -> str:
        low, high = (f"{end:g}" if isinstance(end, float) else f"{end}" for end in (self.low, self.high))
        return f"at least {low}" if self.high in (None, 2**63 - 1) else f"{low} to {high}"


@dataclass(frozen=True)
class Group:
    """Opens a group of --help: this field and those after it."""

    title: str


@dataclass(frozen=True)
class Value:
    """What --help shows for a value; shells complete folders for FOLDER and DIR, and files for FILE, PATH and NAME.

    A word without a flag is taken to be meant for the `usual` field. A `positional` one has no flag at all. `stores`
    lets a path be the URL of a store.
    """

    metavar: str
    usual: bool = False
    positional: bool = False
    stores: bool = False


@dataclass(frozen=True)
class OneOf:
    """A rule: one of these numbers."""

    numbers: tuple[int, ...]

    def __call__(self, value: int, flag: str) -> None:
        """UserError unless `value` is one of them."""
        if isinstance(value, bool) or value not in self.numbers:
            raise UserError(f"{flag}: must be one of {', '.join(map(str, self.numbers))}, got {value!r:.80}")


Rule = Callable[[Any, str], Any]  # (value, flag); raises UserError


@dataclass(frozen=True)
class Field:
    """A field as its annotation declares it. `flags` set it, the second of a switch to False; messages use `label`."""

    name: str
    flags: tuple[str, ...]
    label: str
    kind: type
    many: bool
    optional: bool
    required: bool
    choices: tuple[str, ...]
    bounds: Bounds | None
    value: Value
    rules: tuple[Rule, ...]
    group: str

    def read(self, word: str) -> Any:
        """The value that a `word` of a command line stands for. UserError when it stands for none."""
        if self.optional and word == "None":
            return None
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
        accepted, words, _ = KINDS[self.kind]
        for item in value if self.many else (value,):
            if not isinstance(item, accepted) or (self.kind is not bool and isinstance(item, bool)):
                raise UserError(f"{self.label}: must be {words}, got {item!r:.80}")
            if self.choices and item not in self.choices:
                raise UserError(f"{self.label}: {item!r:.80} is not known; choose one of {', '.join(self.choices)}")
            if item == "":
                thing = "a folder" if self.value.metavar == "FOLDER" else "a value"
                raise UserError(f"{self.label}: is empty; give {thing}{'' if self.required else ', or leave it out'}")
            if self.value.metavar in PATHS and not self.value.stores:
                require_local(item, self.label)
            if isinstance(item, str) and "\0" in item:
                raise UserError(f"{self.label}: holds a NUL character, which no name has; write it again")
            if self.bounds is not None:
                self.bounds.check(self.label, item)
        for rule in self.rules:
            rule(value, self.label)


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
    for field in fields_of(type(settings)).values():  # type: ignore[arg-type]  # mypy looks up an instance's __hash__
        field.check(getattr(settings, field.name))


@cache
def helps_of(kind: type) -> dict[str, str]:
    """The docstrings below the fields of the dataclass `kind`, each in one line."""
    above = [base for base in kind.__bases__ if dataclasses.is_dataclass(base)]
    helps = {name: text for base in above for name, text in helps_of(base).items()}
    module = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    (definition,) = (node for node in module.body if isinstance(node, ast.ClassDef))
    for node, below in pairwise(definition.body):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr)):
            continue
        if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
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
    hint = get_args(hint)[0] if many else hint
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kind = str if choices else hint
    shown = "{" + ",".join(choices) + "}" if choices else KINDS[kind][2]
    value = next((note for note in notes if isinstance(note, Value)), Value(shown))
    flags = (flag(field.name), flag(f"no_{field.name}")) if kind is bool else (flag(field.name),)
    return Field(
        name=field.name,
        flags=() if value.positional else flags,
        label=value.metavar if value.positional else flags[0],
        kind=kind,
        many=many,
        optional=optional,
        required=field.default is dataclasses.MISSING,
        choices=choices,
        bounds=next((note for note in notes if isinstance(note, Bounds)), None),
        value=value,
        rules=tuple(note for note in notes if callable(note)),
        group=next((note.title for note in notes if isinstance(note, Group)), group),
    )
