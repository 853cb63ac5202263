"""The common part of the commands: the checkpoint they name, the next command they print, errors as one line with exit
code 2, signals as 130 and 143.

Commands import PyTorch and the rooms only when work starts, so that --help and completion appear at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, WriteError
from .system.commandline import HELP, command_line, quoted, shell_line, starter
from .system.progress import announced
from .system.signals import importing, terminable, with_kept
from .system.stores import File, place
from .system.terminal import discard, printable, terminals
from .system.threads import wait_asleep

# words of PyTorch's errors where the memory of the machine or of a card is full
FULL = ("can't allocate memory", "out of memory", "not enough memory")

if TYPE_CHECKING:
    from .segment.checkpoint import Checkpoint
    from .segment.names import Names
    from .segment.segmenter import Segmenter
    from .system.processes import Processes


def load_segmenter(
    checkpoint: str,
    backbone: str | None,
    device: str,
    precision: str,
    *,
    groups: int | None,
    exact: bool = False,
    upsampler: str | None = None,
) -> Segmenter:
    """The segmenter that a command's flags of these names ask for; warns on stderr when the backbone is not that of
    training. `exact`: see `Segmenter.load`."""
    from .segment.segmenter import Segmenter

    segmenter = Segmenter.load(
        checkpoint, backbone=backbone, device=device, precision=precision, exact=exact, upsampler=upsampler
    )
    if groups is not None:
        segmenter = segmenter.at(groups)
    if not segmenter.same_backbone:
        warning = "is not, weight for weight, the backbone of training; groups may have shifted"
        print(f"warning: {segmenter.backbone.name} {warning}", file=sys.stderr)
    return segmenter


def pictures_of(data: str | None, run: Path) -> File:
    """The images to predict after a run on `data`: its own, or the samples of them in the folder `run`."""
    from .datasets import recognise

    layout = None if data is None else recognise(data)
    pictures = data if layout is None else layout.pictures
    return run / "samples" if pictures is None else place(pictures)


def finished_run(folder: str) -> Path:
    """The folder that --run names. UserError unless it holds a finished run; it names runs next to the folder."""
    from .learn.runfolder import REPORT, RUN

    out = Path(folder).expanduser()
    if (out / REPORT).is_file():
        return out
    if (out / RUN).is_file():
        raise UserError(f"--run {out}: is not finished; run the same smooseg train again, which resumes it")
    near = [str(path) for path in (out.parent, *sorted(out.glob("*"))) if (path / REPORT).is_file()]
    listed = f"did you mean {' or '.join(map(quoted, near[:3]))}"
    raise UserError(f"--run {out}: holds no finished run; {listed if near else 'give the --out folder of training'}")


def counted(checkpoint: Checkpoint) -> str:
    """How many groups a checkpoint has, such as "8 groups", or "8 groups (7 after merging)"."""
    groups, merged = checkpoint.groups or checkpoint.trained, len(checkpoint.names.numbers)
    return f"{groups} groups" + (f" ({merged} after merging)" if merged < groups else "")


def new_names(names: Names, proposed: Mapping[str, str] | None) -> dict[int, str]:
    """The `proposed` names, by group, of groups that have none; without those that another group has."""
    given, taken = {int(number): name for number, name in (proposed or {}).items()}, names.names.values()
    return {number: name for number, name in given.items() if number not in names.names and name not in taken}


def naming_line(run: Path, checkpoint: Checkpoint) -> str:
    """The line that leads to names: those of classes, where labels propose some, or a list of the groups."""
    words = ["--run", str(run), *["--from-labels"] * bool(new_names(checkpoint.names, checkpoint.proposed))]
    how = "gives groups the names of the classes that they match" if words[2:] else "lists the groups, to name them"
    return f"name       {command_line('name', *words)} {how}"


def predict_command(checkpoint: Path, images: Path | str, out: Path, backbone: str) -> str:
    """Return the command to type next. It repeats a `module:callable`: a checkpoint never imports code by itself."""
    words = ["--checkpoint", str(checkpoint), "--images", str(images), "--out", str(out)]
    return command_line("predict", *words, *(["--backbone", backbone] if ":" in backbone else []))


def run(main: Callable[..., None], args: Sequence[str] | None = None, *, quick: bool = False) -> int:
    """The body of every command: -> the exit code. After a signal or on a full disk it prints the command that resumes.

    `main` takes the words after the command, and `processes` if torchrun may start it; other commands refuse torchrun.
    A `quick` command only prints, as --help does, without PyTorch.
    """
    args = sys.argv[1:] if args is None else args

    def body() -> int:
        if not quick and not HELP & set(args):
            return _run(main, args)
        with contextlib.suppress(SystemExit):
            main(args)
        return 0

    return guarded(body)


def guarded(body: Callable[[], int]) -> int:
    """The exit code of `body`, or that of the error, signal or lost reader that ends it. What stdout does not take is
    an error, told once the work is done."""
    with terminals() as (out, _):
        try:
            try:
                code = body()
            except UserError as error:
                print("error: " + printable(str(error)), file=sys.stderr)
                code = 2
            finally:
                out.flush()  # at Python's own end nobody could catch that it fails
        except KeyboardInterrupt:  # before the command began
            print("interrupted; nothing was begun", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # the reader of stdout has gone, as `head` does: no news for the user
            discard(out)
            return 128 + 13  # like a command that SIGPIPE ends
        if code == 0 and out.failure is not None and out.failure.errno is not None:
            why = f"cannot be written ({out.failure.strerror}), so lines are missing there"
            print(f"error: stdout: {why}; the work is done, and its files are whole", file=sys.stderr)
            return 2
        return code


def end(code: int) -> int:
    """The exit code of a command, for `sys.exit`; a process that torchrun started ends with it here and now.

    Python's own end takes down what threads of torch still use, and aborted now and then after all work was done
    ("terminate called without an active exception").
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # None where it was closed
                stream.flush()
        os._exit(code)
    return code


def _run(main: Callable[..., None], args: Sequence[str]) -> int:
    wait_asleep()
    with announced("starting   PyTorch is loading"), importing():
        from .system.processes import PATIENCE_S, joined

    with joined() as processes, terminable(lambda: processes.ending):
        try:
            with processes.first_heard(), paths_named():
                if "processes" in signature(main).parameters:
                    main(args, processes)
                elif processes.size > 1:
                    raise UserError(f"torchrun: this command runs in one process, not {processes.size}; start it alone")
                else:
                    main(args)
                processes.wait()  # the first may still be writing
        except UserError as error:
            if processes.last_word():
                start = "" if processes.first else "\n"  # where the first process may have left a progress bar
                resume = f"; to resume then: {_again(main, args, processes)}" if isinstance(error, WriteError) else ""
                print(start + "error: " + printable(str(error)) + resume, file=sys.stderr)
            return 2
        except KeyboardInterrupt as stop:
            stop = with_kept(stop, "what was finished is kept")
            # the first process, if it lives, knows what is kept
            if processes.last_word(0 if processes.first else PATIENCE_S):
                print(f"interrupted; {stop.kept}\nresume     {_again(main, args, processes)}", file=sys.stderr)
            return 128 + stop.number
    return 0


@contextlib.contextmanager
def paths_named() -> Iterator[None]:
    """Turn what the system says about a path into one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        paths = [os.fsdecode(path) for path in (error.filename, error.filename2) if isinstance(path, (str, bytes))]
        path = "".join(f"{path}: " for path in paths[:1])
        advice = "check this path and its permissions" if path else "the same command resumes what can be resumed"
        raise UserError(f"{path}the system refused it ({error.strerror or error}); {advice}") from error
    except (MemoryError, RuntimeError) as error:
        if "home directory" in str(error):  # Python's, for a path below ~ or ~NAME
            raise UserError("~: no such user has a home folder here; write the path without ~") from error
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in FULL):
            raise
        advice = "give a smaller --size, --batch-size or --code-dim, or smaller images"
        raise UserError(f"memory: does not hold what these settings ask for; {advice}") from error


def _again(main: Callable[..., None], args: Sequence[str], processes: Processes) -> str:
    """This very command."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes.size)) if processes.size > 1 else 1
    spec = sys.modules[main.__module__].__spec__  # has the full name where the module itself is __main__
    return shell_line([*starter(main.__module__ if spec is None else spec.name, here), *args])
