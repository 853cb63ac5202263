"""Command lines: argparse parsers from the declared fields of settings, and what to type next. Errors are one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import shlex
import shutil
import sys
import textwrap
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ..errors import UserError
from .fields import Field, fields_of, helps_of

T = TypeVar("T")
HELP = {"-h", "--help"}
PACKAGE = "smooseg_fast"
MODULES = {"backbones": "backbonelist", "export": "exporting"}  # commands whose module has another name than they


def program() -> str:
    """The words for this program, as it was started: `smooseg`, `python -m smooseg_fast`, or nothing for one of its
    modules alone."""
    script = Path(sys.argv[0])
    if script.stem.removesuffix("-script") == "smooseg":
        return "smooseg"
    return f"python -m {PACKAGE}" if (script.parent.name, script.stem) == (PACKAGE, "__main__") else ""


def starter(module: str, processes: int = 1) -> list[str]:
    """The words that start the command of `module`, in the way in which this process was started."""
    words, command = program().split(), module.removeprefix(f"{PACKAGE}.")
    command = next((name for name, stem in MODULES.items() if stem == command), command)
    words = [*words, command] if words else ["python", "-m", module]
    if processes == 1:
        return words
    words = words[1:] if words[0] == "python" else ["--no-python", *words]
    return ["torchrun", f"--nproc-per-node={processes}", *words]


def command_line(command: str, *words: str) -> str:
    """The words that start a command of this package, such as "predict"."""
    return shell_line([*starter(f"{PACKAGE}.{MODULES.get(command, command)}"), *words])


def shell_line(words: Iterable[str]) -> str:
    """A command line to type. Words with unprintable characters stand in the quotes of bash and zsh for bytes."""
    return " ".join(map(quoted, words))


def quoted(word: str) -> str:
    """`word` in the quotes that it needs in a shell."""
    if word.isprintable():
        return shlex.quote(word)
    plain = (c if c.isprintable() and c not in "\\'" else _bytes(c) for c in word)
    return f"$'{''.join(plain)}'"


def _bytes(c: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X", or nothing when nothing is near."""
    close = difflib.get_close_matches(word, list(known), 1, 0.65)
    return f"; did you mean {close[0]}" if close else ""


class Parser(argparse.ArgumentParser):
    """Raises errors as UserError, and takes words of one dash as values: -1e-3 is a number, and no flag is short."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile("-[^-]")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse would hide that the reader has gone

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help lists the flags")


class _Formatter(argparse.HelpFormatter):
    def add_argument(self, action: argparse.Action) -> None:
        self._indent()  # argparse forgets the indent of commands when it measures the widest
        super().add_argument(action)
        self._dedent()

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)  # flags stay whole


def add_commands(parser: Parser, about: Mapping[str, str]) -> dict[str, Parser]:
    """Gives `parser` a command for each name in `about`, with this line of help; -> their parsers."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    return {name: commands.add_parser(name, help=line) for name, line in about.items()}


def choose_command(
    parser: Parser, args: Sequence[str], about: Mapping[str, str], folder: str = ""
) -> tuple[str, list[str]] | None:
    """(the command that `args` begin with, the words after it); None when there are none, and the list of commands was
    printed. --help prints it and exits with 0.

    `folder`: the words that a folder would follow, for the message about one that stands in place of the command.
    """
    if args and args[0] in about:
        return args[0], list(args[1:])
    if args and not args[0].startswith("-"):
        hint = nearest(args[0], about) or f"; there are {', '.join(about)}"
        if folder and Path(args[0]).exists():
            hint = f"; did you mean {parser.prog} {folder} {quoted(args[0])}"
        raise UserError(f"{args[0]}: is not a command of {parser.prog}{hint}")
    add_commands(parser, about)
    parser.parse_args(args[:1])
    parser.print_help()
    return None


def parser_of(kind: type, program: str, defaults: Mapping[str, Any] | None = None) -> Parser:
    """The parser of a command whose settings are a `kind`. Its help shows `defaults` rather than those of the kind."""
    words = [program]
    for field in fields_of(kind).values():
        if field.value.positional:
            words.append(field.value.metavar if field.required else f"[{field.value.metavar} ...]")
        elif field.required:
            words.append(f"{field.label} {field.value.metavar}")
    width = shutil.get_terminal_size().columns - 9
    usage = textwrap.fill(" ".join([*words, "[--flag value ...]"]), width, subsequent_indent=" " * 7)
    description, _, epilog = inspect.cleandoc(kind.__doc__ or "").partition("\n\n")
    parser = Parser(prog=program, usage=usage, description=description, epilog=epilog)
    add_fields(parser, kind, defaults or {})
    return parser


def add_fields(parser: Parser, kind: type, defaults: Mapping[str, Any]) -> list[tuple[Field, argparse.Action]]:
    """Gives `parser` the arguments of a `kind`; -> those that take values."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)} | dict(defaults)
    groups: dict[str, Any] = {"options": parser}
    actions = []
    for field in fields_of(kind).values():
        if field.group not in groups:
            groups[field.group] = parser.add_argument_group(field.group)
        add = partial(groups[field.group].add_argument, default=SUPPRESS)
        text = _explained(field, helps_of(kind).get(field.name, ""), defaults[field.name]).replace("%", "%%")
        if field.kind is bool:  # the help shows the switch that changes something
            for name, on in zip(field.flags, (True, False)):
                shown = SUPPRESS if on == defaults[field.name] else text
                add(name, dest=field.name, action="store_const", const=on, help=shown)
        else:
            name, nargs = (field.name, ("?", "*")) if field.value.positional else (field.label, (None, "+"))
            action = add(name, type=field.read, nargs=nargs[field.many], metavar=field.value.metavar, help=text)
            actions.append((field, action))
    return actions


def _explained(field: Field, text: str, default: Any) -> str:
    """Help, range and default."""
    notes = [text] if field.bounds is None else [text, f"({field.bounds})"]
    if field.kind is not bool and default not in (None, (), dataclasses.MISSING):
        values = default if field.many else (default,)
        notes.append(f"[{' '.join(f'{x:g}' if isinstance(x, float) else str(x) for x in values)}]")
    return " ".join(notes)


def parse(kind: type[T], args: Sequence[str], *command: str) -> T:
    """`args` of a command, such as "predict", as a `kind`. UserError in one line; `--help` prints the page and exits
    with 0."""
    program = command_line(*command)
    given = read(kind, args, program)
    fields = fields_of(kind).values()  # type: ignore[arg-type]  # mypy looks up an instance's __hash__
    missing = [field for field in fields if field.required and field.name not in given]
    if missing:
        words = [str(word) for field in fields if field.value.positional for word in given.get(field.name) or ()]
        path = next((word for word in words if missing[0].value.usual and Path(word).exists()), None)
        label = missing[0].label
        hint = f"{program} --help lists the flags" if path is None else f"did you mean {label} {quoted(path)}"
        raise UserError(f"{label}: missing; {hint}")
    return kind(**given)


def read(kind: type, args: Sequence[str], program: str) -> dict[str, Any]:
    """The values that `args` name, by their fields, each checked by itself. UserError for the first that is not legal.

    Words are `--flag value`, `--flag=value`, `--switch` or `--no-switch`, with hyphens or underscores; the last of a
    flag counts.
    """
    fields = fields_of(kind)
    words = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in args]
    given, unknown = parser_of(kind, program).parse_known_args(words)
    if unknown:
        raise UserError(_unknown(unknown[0], fields, vars(given), program))
    values = {}
    for name, value in vars(given).items():
        values[name] = None if value == [None] else tuple(value) if isinstance(value, list) else value
        fields[name].check(values[name])
    return values


def _unknown(word: str, fields: Mapping[str, Field], given: Iterable[str], program: str) -> str:
    if word.startswith("-"):
        name = word.partition("=")[0]
        hint = nearest(name, [flag for field in fields.values() for flag in field.flags])
        return f"{name}: is not a flag{hint or f'; {program} --help lists the flags'}"
    usual = next((field for field in fields.values() if field.value.usual and field.name not in given), None)
    hint = "put names with spaces in quotes" if usual is None else f"did you mean {usual.label} {quoted(word)}"
    return f"{word}: belongs to no flag; {hint}"
