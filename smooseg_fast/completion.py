"""`smooseg completion bash|zsh|fish`: print a script that completes commands, flags and values in a shell."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from . import cache, data
from .choose import ChooseConfig
from .command import run
from .config import TrainConfig
from .convert import ConvertConfig
from .evaluate import EvaluateConfig
from .predict import PredictConfig
from .similarity import SimilarityConfig
from .system.commandline import parse, switches
from .system.fields import Field, Value, fields_of, helps_of


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script that completes smooseg's commands, flags and values.

    For bash write `source <(smooseg completion bash)` into ~/.bashrc, for zsh `source <(smooseg completion zsh)` into
    ~/.zshrc, and for fish `smooseg completion fish | source` into ~/.config/fish/config.fish.
    """

    shell: Annotated[Literal["bash", "zsh", "fish"], Value("SHELL", positional=True)]
    """bash, zsh or fish."""


# the words after `smooseg`, by the settings that they take
SETTINGS: dict[str, type] = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "choose": ChooseConfig,
    "convert": ConvertConfig,
    "similarity": SimilarityConfig,
    "completion": CompletionConfig,
    **{f"data {name}": settings for name, (_, settings) in data.COMMANDS.items()},
    **{f"cache {name}": settings for name, (_, settings) in cache.COMMANDS.items()},
}


def main(args: Sequence[str]) -> None:
    config = parse(CompletionConfig, args, "completion")
    print({"bash": bash, "zsh": zsh, "fish": fish}[config.shell]())


def commands() -> dict[str, list[str]]:
    """ "" -> the commands, and for those that have commands of their own, their name -> these."""
    tree: dict[str, list[str]] = {"": []}
    for path in SETTINGS:
        name, _, below = path.partition(" ")
        if name not in tree[""]:
            tree[""].append(name)
        if below:
            tree.setdefault(name, []).append(below)
    return tree


def flags(field: Field) -> list[str]:
    """The flags of a field; none for a positional one."""
    if field.value.positional:
        return []
    return [name for name, _ in switches(field)] or [field.flag]


def bash() -> str:
    """Values that are not listed fall back to the names of files (complete -o default)."""
    tree = commands()
    nested = "|".join(name for name in tree if name)
    lines = [
        "_smooseg() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" words=""',
        '    if [[ $word == "=" ]]; then word=""',
        '    elif [[ $before == "=" ]]; then before="${COMP_WORDS[COMP_CWORD-2]}"; fi',
        "    COMPREPLY=()",
        '    (( COMP_CWORD > 1 )) && command="${COMP_WORDS[1]}"',
        f'    case "$command" in {nested}) (( COMP_CWORD > 2 )) && command+=" ${{COMP_WORDS[2]}}" ;; esac',
        '    case "$command $before" in',
    ]
    for path, settings in SETTINGS.items():
        fields = fields_of(settings).values()
        for field in fields:
            if field.choices and not field.value.positional:
                lines.append(f'        "{path} {field.flag}") words="{" ".join(field.choices)}" ;;')
        taking = [
            f'"{path} {name}"'
            for field in fields
            if field.kind is not bool and not field.choices
            for name in flags(field)
        ]
        if taking:
            lines.append(f"        {'|'.join(taking)}) return ;;")
    lines += ["    esac", '    if [[ -z $words ]]; then case "$command" in']
    for name, below in tree.items():
        lines.append(
            f'        "{name}") words="{" ".join([*below, *(["--version"] if not name else []), "--help"])}" ;;'
        )
    for path, settings in SETTINGS.items():
        fields = fields_of(settings).values()
        words = " ".join([*(name for field in fields for name in flags(field)), "--help"])
        listed = " ".join(choice for field in fields if field.value.positional for choice in field.choices)
        paths = any(field.value.positional and not field.choices for field in fields)
        start = "[[ $word == -* ]] || return; " if paths else ""
        lines.append(f'        "{path}") {start}words="{f"{listed} {words}".strip()}" ;;')
    lines += [
        "    esac; fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _smooseg smooseg",
    ]
    return "\n".join(lines)


def zsh() -> str:
    """zsh runs the script of bash."""
    return "autoload -Uz compinit bashcompinit\n(( $+functions[compdef] )) || compinit\nbashcompinit\n" + bash()


def fish() -> str:
    from .__main__ import COMMANDS

    lines = ["complete -c smooseg -f -n __fish_use_subcommand -l version", "complete -c smooseg -l help"]
    for name, about in COMMANDS.items():
        lines.append(f"complete -c smooseg -f -n __fish_use_subcommand -a {name} -d {shlex.quote(about)}")
    for name, below in commands().items():
        if name:
            seen = f"__fish_seen_subcommand_from {name}; and not __fish_seen_subcommand_from {' '.join(below)}"
            lines.append(f"complete -c smooseg -f -n {shlex.quote(seen)} -a {shlex.quote(' '.join(below))}")
    for path, settings in SETTINGS.items():
        seen = shlex.quote("; and ".join(f"__fish_seen_subcommand_from {word}" for word in path.split()))
        helps = helps_of(settings)
        for field in fields_of(settings).values():
            values = f" -a {shlex.quote(' '.join(field.choices))}" if field.choices else ""
            if field.value.positional:
                lines += [f"complete -c smooseg -f -n {seen}{values}"] if values else []
            for name in flags(field):
                takes = "" if field.kind is bool else " -x" if values else " -r"
                about = shlex.quote(helps.get(field.name, "").partition(". ")[0])
                lines.append(f"complete -c smooseg -n {seen} -l {name[2:]}{takes}{values} -d {about}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main, quick=True))
