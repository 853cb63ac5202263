"""`smooseg COMMAND ...`, or `python -m smooseg_fast COMMAND ...`: every command of the package."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from . import __version__
from .command import end, guarded, run
from .system.commandline import MODULES, Parser, choose_command, program

COMMANDS = {
    "train": "learn to segment a folder of images without labels",
    "predict": "segment images of any size with a checkpoint",
    "evaluate": "measure a checkpoint against labels",
    "export": "write predictions for annotation tools, maps and scripts",
    "choose": "choose another number of groups, without training",
    "name": "name, merge and colour the groups of a run",
    "report": "write the page of a run or of predictions again",
    "sweep": "learn with several settings and seeds, and compare them",
    "deploy": "write a checkpoint and its backbone as one network, for ONNX Runtime or torch.export",
    "convert": "rewrite a published SmooSeg checkpoint as one of this program",
    "data": "check what a folder holds before training",
    "backbones": "list the frozen features that are here and that could be, with licences and speed",
    "similarity": "measure how alike patches are, and what thresholds make of it",
    "cache": "list, remove or verify cached features",
    "completion": "print a script that completes commands, flags and values in your shell",
}


def main(args: Sequence[str] | None = None) -> int:
    """The console script: -> the exit code."""
    args = list(sys.argv[1:] if args is None else args)
    return guarded(lambda: start(args))


def start(args: Sequence[str]) -> int:
    """Run the command that `args` begin with: -> its exit code. UserError when there is no such command."""
    try:
        chosen = choose_command(parser(program() or f"python -m {__package__}"), args, COMMANDS, "train --data")
    except SystemExit:  # after --help or --version
        return 0
    if chosen is None:
        return 0
    command, words = chosen
    module = import_module(f".{MODULES.get(command, command)}", __package__)
    return run(module.main, words, quick=command == "completion")


def parser(program: str) -> Parser:
    """The parser of the program's own flags."""
    parser = Parser(prog=program)
    parser.add_argument("--version", action="version", version=f"smooseg {__version__}", help="print the version")
    return parser


if __name__ == "__main__":
    sys.exit(end(main()))
