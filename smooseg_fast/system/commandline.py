"""Command lines: words to settings and back. Errors are one line; --help is a page in groups, as wide as the
terminal."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from .fields import Field, fields_of, helps_of

T = TypeVar("T")
HELP = {"-h", "--help"}
PACKAGE = "smooseg_fast"
MARGIN = 28  # columns left of the help of a flag


def program() -> str:
    """The words for this program, as it was started: `smooseg`, `python -m smooseg_fast`, or nothing for one of its
    modules alone."""
    script = Path(sys.argv[0])
    if script.stem.removesuffix("-script") == "smooseg":
        return "smooseg"
    return f"python -m {PACKAGE}" if (script.parent.name, script.stem) == (PACKAGE, "__main__") else ""


def starter(module: str, processes: int = 1) -> list[str]:
    """The words that start the command of `module`, in the way in which this process was started."""
    words = program().split()
    words = [*words, module.removeprefix(f"{PACKAGE}.")] if words else ["python", "-m", module]
    if processes > 1:
        words = [
            "torchrun",
            f"--nproc-per-node={processes}",
            *(words[1:] if words[0] == "python" else ["--no-python", *words]),
        ]
    return words


def command_line(command: str, *words: str) -> str:
    """What to type for a command of this package, such as "predict"."""
    return shlex.join([*starter(f"{PACKAGE}.{command}"), *words])


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X", or nothing when nothing is near."""
    close = difflib.get_close_matches(word, list(known), 1, 0.6)
    return f"; did you mean {close[0]}" if close else ""


def choose_command(
    args: Sequence[str], about: Mapping[str, str], program: str, folder: str = ""
) -> tuple[str, list[str]] | None:
    """(the command that `args` begin with, the words after it); None when the list of commands was asked for, and
    printed.

    `folder`: the words that a folder would follow, for the message about one that stands in place of the command.
    """
    if not args or args[0] in HELP:
        width = max(map(len, about))
        print(f"usage: {program} COMMAND ...\n")
        for name, line in about.items():
            print(_wrapped(line, f"  {name:{width}}  ", " " * (width + 4)))
        print(f"\n{program} COMMAND --help lists the flags of a command")
        return None
    if args[0] not in about:
        hint = nearest(args[0], about) or f"; there are {', '.join(about)}"
        if folder and Path(args[0]).exists():
            hint = f"; did you mean {program} {folder} {shlex.quote(args[0])}"
        raise UserError(f"{args[0]}: is not a command of {program}{hint}")
    return args[0], list(args[1:])


def parse(kind: type[T], args: Sequence[str], *command: str) -> T:
    """`args` of a command, such as "predict", as a `kind`. UserError in one line; `--help` prints the page and exits
    with 0."""
    program = command_line(*command)
    if HELP & set(args):
        print(page(kind, program, {}))
        raise SystemExit(0)
    given = read(kind, args, program)
    missing = [field.label for field in fields_of(kind).values() if field.required and field.name not in given]
    if missing:
        raise UserError(f"{missing[0]}: missing; {program} --help lists the flags")
    return kind(**given)


def read(kind: type, args: Sequence[str], program: str) -> dict[str, Any]:
    """The values that `args` name, by their fields, each checked by itself. UserError for the first that is not legal.

    Words are `--flag value`, `--flag=value`, `--switch` or `--no-switch`, with hyphens or underscores; the last of a
    flag counts.
    """
    words, values = list(args), dict[str, Any]()
    fields = fields_of(kind)
    flags = {field.flag: field for field in fields.values() if not field.value.positional}
    toggles = {name: (field, not off) for field in flags.values() for name, off in switches(field)}
    positional = [field for field in fields.values() if field.value.positional]
    last = None  # the flag that took the word before
    while words:
        word = words.pop(0)
        key, equals, value = word.partition("=")
        key = key.replace("_", "-")
        if not word.startswith("-") or word == "-":
            if not positional:
                raise UserError(_stray(word, last, fields, values, program))
            field = positional.pop(0)
            taken = [word, *_until_flag(words)] if field.many else [word]
            values[field.name] = field.read(taken)
        elif key in toggles:
            if equals:
                raise UserError(f"{key}: takes no value, got {value!r:.80}")
            field, on = toggles[key]
            values[field.name] = on
        elif key in flags:
            field = flags[key]
            taken = [value] if equals else _until_flag(words, None if field.many else 1)
            if not taken:
                raise UserError(f"{key}: has no value; give {_shown(field)}")
            values[field.name], last = field.read(taken), field
        else:
            hint = nearest(key, (*flags, *toggles)) or f"; {program} --help lists the flags"
            raise UserError(f"{word if key == '--' else key}: is not a flag{hint}")
    return values


def _until_flag(words: list[str], most: int | None = None) -> list[str]:
    """Takes the words up to the next flag, or `most`, out of `words`. A negative number is no flag."""
    taken: list[str] = []
    while words and not words[0].startswith("--") and (most is None or len(taken) < most):
        taken.append(words.pop(0))
    return taken


def switches(field: Field) -> list[tuple[str, bool]]:
    """The names that turn a field of True or False on, and off."""
    return [(field.flag, False), ("--no-" + field.flag[2:], True)] if field.kind is bool else []


def _stray(word: str, last: Field | None, fields: Mapping[str, Field], given: Iterable[str], program: str) -> str:
    usual = next((field for field in fields.values() if field.value.usual and field.name not in given), None)
    if usual is not None:
        return f"{word}: stands behind no flag; did you mean {usual.flag} {shlex.quote(word)}"
    if last is not None:
        return f"{word}: is one value too many for {last.flag}, which takes one; put names with spaces in quotes"
    return f"{word}: stands behind no flag; {program} --help lists the flags"


# the page of --help


def page(kind: type, program: str, defaults: Mapping[str, Any]) -> str:
    """What --help prints. `defaults` go before those of the fields."""
    fields, helps = fields_of(kind), helps_of(kind)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)} | dict(defaults)
    needed = [_usage(field) for field in fields.values() if field.required]
    needed += [f"[{_usage(field)} ...]" for field in fields.values() if field.value.positional and not field.required]
    lines = [_wrapped(" ".join([*needed, "[--flag value ...]"]), f"usage: {program} ", " " * 8), ""]
    lines += [_wrapped(" ".join(part.split())) + "\n" for part in _doc(kind).split("\n\n")]
    group = None
    for field in fields.values():
        if field.group != group:
            lines += [*([] if group is None else [""]), field.group]
            group = field.group
        lines.append(_entry(field, helps.get(field.name, ""), defaults[field.name]))
    return "\n".join([*lines, "", "  --help".ljust(MARGIN) + "show this page"])


def _doc(kind: type) -> str:
    """The docstring of a class; empty where Python strips them."""
    return textwrap.dedent("    " + (kind.__doc__ or ""))


def _usage(field: Field) -> str:
    return field.value.metavar if field.value.positional else f"{field.flag} {_shown(field)}"


def _shown(field: Field) -> str:
    return field.value.metavar + (" ..." if field.many else "")


def _entry(field: Field, text: str, default: Any) -> str:
    head = switches(field)[bool(default)][0] if field.kind is bool else _usage(field)
    notes = [] if field.bounds is None else [f"({field.bounds})"]
    if field.kind is not bool and default not in (None, (), dataclasses.MISSING):
        values = default if field.many else (default,)
        notes.append(f"[{' '.join(f'{x:g}' if isinstance(x, float) else str(x) for x in values)}]")
    return _hung(f"  {head}", " ".join([text, *notes]))


def _hung(head: str, text: str) -> str:
    """`text` right of `head`, or below it where the head is long or the terminal narrow."""
    margin = MARGIN if _width() >= 60 else 8
    if len(head) + 2 > margin:
        return head + "\n" + _wrapped(text, " " * margin, " " * margin)
    return _wrapped(text, head.ljust(margin), " " * margin)


def _width() -> int:
    return max(40, shutil.get_terminal_size().columns)


def _wrapped(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(
        text, _width(), initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )
