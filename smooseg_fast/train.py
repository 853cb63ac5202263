"""`smooseg train`: learn to segment a folder of images; without arguments, the embedded demo."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .command import end, pictures_of, predict_command, run
from .config import AUTO, TrainConfig, preset, with_changes
from .errors import UserError
from .system.commandline import HELP, command_line, parser_of, read
from .system.fields import flag
from .system.outfolder import HoldsAnotherRun
from .system.terminal import one_line

if TYPE_CHECKING:
    from .datasets import Dataset
    from .segment.segmenter import Segmenter
    from .system.processes import Processes

SAMPLES = 6


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    started, config = time.perf_counter(), configure(args)
    from .datasets import recognise
    from .datasets.demo import datasets_of
    from .learn.trainer import learn
    from .system.processes import ALONE

    processes = processes or ALONE
    out, reason = (Path(config.out), "") if config.out else free_folder(config)
    say(f"output     {out}{reason}")
    train, held_out = datasets_of(config)
    backbone = "" if config.backbone == AUTO else f", backbone {config.backbone}"  # else the choice is said next
    say(f"smooseg_fast: preset {config.preset}, {train.name} ({len(train)} images){backbone}")
    if config.data is not None and (layout := recognise(config.data)) is not None:
        paper = f"; the paper's settings for it are --preset {layout.preset}"
        say(f"data       {layout.title}" + ("" if layout.preset in (config.preset, "folder") else paper))
    segmenter = learn(config, train, held_out, out=out, progress=True, say=say, processes=processes, started=started)
    if processes.first:
        tell_next(config, segmenter, train if held_out is None else held_out, out)


def tell_next(config: TrainConfig, segmenter: Segmenter, dataset: Dataset, out: Path) -> None:
    """Print the commands that may follow. Pictures of `dataset` are written where it has no image files of its own."""
    from .learn.runfolder import CHECKPOINT, TREE

    images = pictures_of(config.data, out)
    if images == out / "samples":  # the demo's images are made up, and tiles lie in no image file
        write_samples(dataset, images)
    predictions = out / "predictions"
    checkpoint, now = segmenter.checkpoint, segmenter.groups
    if checkpoint.fine is not None:
        another = now + 2 if now + 2 <= checkpoint.fine.most else max(1, now - 1)
        other = command_line("choose", "--run", str(out), "--groups", str(another))
        print(f"choose     {out / TREE} shows how the {now} groups split and merge; another number, at once: {other}")
        if now != checkpoint.trained:  # chosen since, so in a folder of its own
            predictions = out / f"predictions_{now}"
    print("next       " + predict_command(out / CHECKPOINT, images, predictions, segmenter.config.backbone))


def write_samples(dataset: Dataset, folder: Path) -> None:
    """Save the first images of `dataset`; those that cannot be read were reported before."""
    from .datasets.images import ImageError
    from .show.pictures import save

    for index in range(min(SAMPLES, len(dataset))):
        with contextlib.suppress(ImageError):
            save(folder / Path(dataset.names[index].replace("/", "_")).with_suffix(".png"), dataset.image(index))


def say(line: str) -> None:
    """Print above the progress bar, and not through it."""
    tqdm.write(one_line(line))
    sys.stdout.flush()


def free_folder(config: TrainConfig) -> tuple[Path, str]:
    """(runs/NAME, or runs/NAME-2 and so on: the first that is free or holds this very run; why it is not runs/NAME, or
    nothing)."""
    from .learn.runfolder import RunFolder

    base, reason = Path("runs") / (Path(config.data).resolve().name if config.data else "demo"), ""
    path, number = base, 1
    while True:
        try:
            RunFolder(path, config)
            return path, reason
        except HoldsAnotherRun as other:
            why = f"holds another run, {flag(other.name)} {words(other.recorded)} against {words(other.asked)}"
        except UserError as error:
            why = str(error).removeprefix(f"--out {path}: ").partition(";")[0]
        reason, number = reason or f": {path} {why}", number + 1
        path = base.with_name(f"{base.name}-{number}")


def words(value: Any) -> str:
    """A setting as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def configure(args: Sequence[str]) -> TrainConfig:
    """The settings that `args` ask for: those of the preset (folder with --data, demo without), changed by the other
    flags."""
    program = command_line("train")
    given = read(TrainConfig, [word for word in args if word not in HELP], program)
    base = preset(given.get("preset") or ("folder" if given.get("data") is not None else "demo"))
    if HELP & set(args):
        parser_of(TrainConfig, program, vars(base)).print_help()
        raise SystemExit(0)
    config = with_changes(base, **given)
    if config.data is None and config.preset != "demo":
        raise UserError(f"--data: missing; preset {config.preset} needs a folder of images (the demo is --preset demo)")
    return config


if __name__ == "__main__":
    sys.exit(end(run(main)))
