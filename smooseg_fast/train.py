"""`smooseg train`: learn to segment a folder of images; without arguments, the embedded demo."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tqdm import tqdm

from .command import end, naming_line, pictures_of, predict_command, run
from .config import AUTO, TrainConfig, preset, with_changes
from .errors import UserError
from .system.commandline import HELP, command_line, parser_of, read
from .system.fields import Group, Value, flag
from .system.files import read_text
from .system.outfolder import HoldsAnotherRun
from .system.stores import place
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
    backbone = "" if config.backbone == AUTO else f", backbone {config.backbone}"  # else `learn` says which
    say(f"smooseg_fast: preset {config.preset}, {train.name} ({len(train)} images){backbone}")
    if config.data is not None and (layout := recognise(config.data)) is not None:
        paper = f"; the paper's settings for it are --preset {layout.preset}"
        say(f"data       {layout.title}" + ("" if layout.preset in (config.preset, "folder") else paper))
    segmenter = learn(config, train, held_out, out=out, progress=True, say=say, processes=processes, started=started)
    if processes.first:
        tell_next(config, segmenter, train if held_out is None else held_out, out)


def tell_next(config: TrainConfig, segmenter: Segmenter, dataset: Dataset, out: Path) -> None:
    """Print the commands that may follow. Pictures of `dataset` are written where it has no image files of its own."""
    from .learn.runfolder import CHECKPOINT, PAGE, TREE

    images = pictures_of(config.data, out)
    if images == out / "samples":  # the demo's images are made up, and tiles lie in no image file
        write_samples(dataset, images)
    predictions = out / "predictions"
    checkpoint, now = segmenter.checkpoint, len(segmenter.grouping)
    print(f"open       {out / PAGE} in a browser: images, groups and their tree, to look at, name and merge")
    if checkpoint.fine is not None:
        another = now + 2 if now + 2 <= checkpoint.fine.most else max(1, now - 1)
        other = command_line("choose", "--run", str(out), "--groups", str(another))
        print(f"choose     {out / TREE} shows how the {now} groups split and merge; another number, at once: {other}")
        if now != checkpoint.trained:  # chosen since, so in a folder of its own
            predictions = out / f"predictions_{now}"
    print(naming_line(out, checkpoint))
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

    source = place(config.data) if config.data else Path("demo")
    base, reason = Path("runs") / (source.resolve().name if isinstance(source, Path) else source.stem), ""
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


@dataclass(frozen=True, kw_only=True)
class TrainFlags(TrainConfig):
    """Learn to segment a folder of images without labels; without arguments, the embedded demo.

    The defaults are the preset's: demo, or folder with --data. To see those for photos, add --data FOLDER.
    """

    config: Annotated[str | None, Group("data"), Value("FILE")] = None
    """The run.json of a run, or JSON like it: its settings instead of a preset's. Flags change them."""


def configure(args: Sequence[str]) -> TrainConfig:
    """The settings that `args` ask for: those of --config or of the preset (folder with --data, demo without), changed
    by the other flags."""
    program = command_line("train")
    given = read(TrainFlags, [word for word in args if word not in HELP], program)
    file = given.pop("config", None)
    if file is not None and "preset" in given:
        raise UserError("--preset: --config brings all its settings; leave one of them out")
    if file is None or HELP & set(args):
        base = preset(given.get("preset") or ("folder" if given.get("data") is not None else "demo"))
    else:
        base = read_config(Path(file).expanduser())
    if HELP & set(args):
        parser_of(TrainFlags, program, vars(base)).print_help()
        raise SystemExit(0)
    config = with_changes(base, **given)
    if config.data is None and config.preset != "demo":
        raise UserError(f"--data: missing; preset {config.preset} needs a folder of images (the demo is --preset demo)")
    return config


def read_config(path: Path) -> TrainConfig:
    """The settings in a JSON file, such as the run.json of a run; those that it lacks are the preset's that it names.

    UserError, naming the file, when it cannot be read, and for unknown or illegal settings.
    """
    from .learn.runfolder import CHOSEN

    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--config {path}: cannot be read ({why}); give the run.json of a run") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no settings by name; give the run.json of a run")
    values.pop(CHOSEN, None)  # `backbone` has the one that auto chose
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        name = values.get("preset", "folder" if values.get("data") is not None else "demo")
        return with_changes(preset(name), **values)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error


if __name__ == "__main__":
    sys.exit(end(run(main)))
