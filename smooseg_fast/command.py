"""Command lines: arguments from a dataclass, the checkpoint they name, errors as one line with exit code 2, signals as 130 and 143."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import tyro

from .datasets import recognise
from .errors import UserError, WriteError
from .segment.segmenter import Segmenter
from .system.processes import PATIENCE_S, Processes, joined
from .system.signals import terminable, with_kept

T = TypeVar("T")


def parse(kind: type[T], args: Sequence[str], default: T | None = None, prog: str | None = None) -> T:
    """`args` as a `kind`; UserError with one line instead of the parser's own page. `--help` prints and exits with 0."""
    page = io.StringIO()
    options = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(kind, args=list(args), prog=prog, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(one_line(page.getvalue())) from None


def one_line(page: str) -> str:
    """The message of the parser's page: title, rule, message, rule, hints; with a box the title stands in the first rule."""
    page = re.sub(r"\x1b\[[0-9;]*m", "", page)
    sections = [" ".join(re.sub(r"[│╭╮╰╯├┤]", " ", part).split()) for part in re.split(r"[^\n]*[─-]{10,}[^\n]*", page)]
    sections = [part for part in sections if part]
    message = sections[0 if "╭" in page else 1 : 2][:1]
    return (message[0] if message else "the arguments could not be read").rstrip(".") + "; --help lists the flags"


def printable(text: str) -> str:
    """As one line that says nothing to the terminal itself: names may come out of anyone's file."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


def load_segmenter(checkpoint: str, backbone: str | None, device: str, precision: str) -> Segmenter:
    """What a command's flags of these names ask for; a warning on stderr when the backbone is another than that of training."""
    segmenter = Segmenter.load(checkpoint, backbone=backbone, device=device, precision=precision)
    if not segmenter.same_backbone:
        name = segmenter.backbone.name
        print(
            f"warning: {name} is not, weight for weight, the backbone of training; groups may have shifted",
            file=sys.stderr,
        )
    return segmenter


def pictures_of(data: str | None, run: Path) -> Path:
    """What predict can be given after a run on `data`: its images, or the samples of them in the folder `run`."""
    layout = None if data is None else recognise(data)
    if data is None or (layout is not None and layout.pictures is None):
        return run / "samples"
    return Path(data) if layout is None else layout.pictures


def predict_command(checkpoint: Path, images: Path, out: Path, backbone: str) -> str:
    """What to type next. A `module:callable` has to be named again: a checkpoint never imports code by itself."""
    words = [
        "python",
        "-m",
        "smooseg_fast.predict",
        "--checkpoint",
        str(checkpoint),
        "--images",
        str(images),
        "--out",
        str(out),
    ]
    return shlex.join(words + (["--backbone", backbone] if ":" in backbone else []))


def run(main: Callable[..., None], args: Sequence[str] | None = None, *, together: bool = False) -> int:
    """The body of every `python -m smooseg_fast.X`: -> the exit code. After a signal or on a full disk it says by what to resume.

    together: `main` takes the processes as its second argument; else torchrun is refused.
    """
    try:
        try:
            return _run(main, sys.argv[1:] if args is None else args, together)
        finally:
            sys.stdout.flush()  # at Python's own end nobody could catch that it fails
    except BrokenPipeError:  # who read stdout has gone, as `head` does: no news for the user
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as of a command that SIGPIPE ends


def _run(main: Callable[..., None], args: Sequence[str], together: bool) -> int:
    with joined() as processes, terminable() if processes.size == 1 else contextlib.nullcontext():
        again = shlex.join([*starter(processes), "-m", sys.modules[main.__module__].__spec__.name, *args])
        try:
            with processes.first_heard():
                if together:
                    main(args, processes)
                elif processes.size > 1:
                    raise UserError(
                        f"torchrun: this command runs in one process, not {processes.size}; start it with python -m"
                    )
                else:
                    main(args)
                processes.wait()  # the first may still be writing
        except UserError as error:
            if processes.last_word():
                start = "" if processes.first else "\n"  # where the first process may have left a progress bar
                resume = f"; to resume then: {again}" if isinstance(error, WriteError) else ""
                print(start + "error: " + printable(str(error)) + resume, file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            stop = with_kept(stop, "what was finished is kept")
            # the first process, if it lives, knows what is kept
            if processes.last_word(0 if processes.first else PATIENCE_S):
                print(f"interrupted; {stop.kept}\nresume     {again}", file=sys.stderr)
            return 128 + stop.number
    return 0


def starter(processes: Processes) -> list[str]:
    """What stands before the module in the command of this process."""
    if processes.size == 1:
        return ["python"]
    return ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', processes.size)}"]
