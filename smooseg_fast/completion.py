"""`smooseg completion SHELL`: print a script that completes commands, flags and values in a shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from . import cache, data
from .backbonelist import BackbonesConfig
from .choose import ChooseConfig
from .command import run
from .convert import ConvertConfig
from .deploy import DeployConfig
from .evaluate import EvaluateConfig
from .exporting import ExportConfig
from .name import NameConfig
from .predict import PredictConfig
from .report import ReportConfig
from .similarity import SimilarityConfig
from .sweep import SweepConfig
from .system.commandline import Parser, add_commands, add_fields, parse
from .system.fields import Value
from .train import TrainFlags


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script that completes smooseg's commands, flags and values.

    For bash write `source <(smooseg completion bash)` into ~/.bashrc, for zsh `eval "$(smooseg completion zsh)"` into
    ~/.zshrc below compinit, and for fish `smooseg completion fish | source` into ~/.config/fish/config.fish. For tcsh
    save the script in a file, and source this in ~/.tcshrc.
    """

    shell: Annotated[Literal["bash", "zsh", "fish", "tcsh"], Value("SHELL", positional=True)]
    """bash, zsh, fish or tcsh."""


# the words after `smooseg`, by the settings that they take
SETTINGS: dict[str, type] = {
    "train": TrainFlags,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "choose": ChooseConfig,
    "name": NameConfig,
    "report": ReportConfig,
    "sweep": SweepConfig,
    "deploy": DeployConfig,
    "convert": ConvertConfig,
    "similarity": SimilarityConfig,
    "backbones": BackbonesConfig,
    "completion": CompletionConfig,
    **{f"data {name}": settings for name, (_, settings) in data.COMMANDS.items()},
    **{f"cache {name}": settings for name, (_, settings) in cache.COMMANDS.items()},
}


def main(args: Sequence[str]) -> None:
    config = parse(CompletionConfig, args, "completion")
    import shtab

    print(shtab.complete(tree(), config.shell))


def tree() -> Parser:
    """The parser of every command, with the values that shells complete."""
    import shtab

    from .__main__ import COMMANDS, parser

    paths = {"FOLDER": shtab.DIRECTORY, "DIR": shtab.DIRECTORY} | dict.fromkeys(("FILE", "PATH", "NAME"), shtab.FILE)
    root = parser("smooseg")
    parsers = add_commands(root, COMMANDS)
    for name, commands in (("data", data.COMMANDS), ("cache", cache.COMMANDS)):
        nested = add_commands(parsers[name], {word: about for word, (about, _) in commands.items()})
        parsers |= {f"{name} {word}": parser for word, parser in nested.items()}
    for path, settings in SETTINGS.items():
        for field, action in add_fields(parsers[path], settings, {}):
            action.choices = field.choices or None
            if field.value.metavar in paths:
                action.complete = paths[field.value.metavar]  # type: ignore[attr-defined]
    return root


if __name__ == "__main__":
    sys.exit(run(main))
