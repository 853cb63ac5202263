"""`python -m smooseg_fast.train`: learn to segment a folder of images; without arguments, the embedded demo."""

from __future__ import annotations

import contextlib
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .command import parse, pictures_of, predict_command, run
from .config import TrainConfig, flag, preset, with_changes
from .datasets import Dataset, recognise
from .datasets.demo import datasets_of
from .datasets.images import ImageError
from .errors import UserError
from .learn.runfolder import CHECKPOINT, LADDER, RunFolder
from .learn.trainer import learn
from .show.pictures import save
from .system.processes import ALONE, Processes

SAMPLES = 6


def main(args: Sequence[str], processes: Processes = ALONE) -> None:
    config = configure(args)
    out = Path(config.out) if config.out else free_folder(config)
    train, held_out = datasets_of(config)
    print(f"smooseg_fast: preset {config.preset}, {train.name} ({len(train)} images), backbone {config.backbone}")
    for line in recognised(config):
        say(line)
    segmenter = learn(config, train, held_out, out=out, progress=True, say=say, processes=processes)
    if not processes.first:
        return
    images = pictures_of(config.data, out)
    if (
        images == out / "samples"
    ):  # the demo's are made up, tiles lie in no image file: a few are written down for the next command
        write_samples(train if held_out is None else held_out, images)
    variant = segmenter.config.variants()[0]
    # of a finished run, where `choose` may have taken another head: its predictions have nothing to do with the first one's
    predictions = out / ("predictions" if variant == config.variants()[0] else f"predictions_{variant.name}")
    if config.granularity is not None and len(config.granularity) > 1:
        now = segmenter.config.granularity[0]
        another = next(value for value in reversed(config.granularity) if value != now)
        other = ["python", "-m", "smooseg_fast.choose", "--run", str(out), "--granularity", f"{another:g}"]
        print(f"choose     look at {out / LADDER}; {now:g} predicts, and another would by: {shlex.join(other)}")
    print("next       " + predict_command(out / CHECKPOINT, images, predictions, config.backbone))


def write_samples(dataset: Dataset, folder: Path) -> None:
    for index in range(min(SAMPLES, len(dataset))):
        with contextlib.suppress(ImageError):  # was skipped and said before
            save(folder / Path(dataset.names[index].replace("/", "_")).with_suffix(".png"), dataset.image(index))


def recognised(config: TrainConfig) -> list[str]:
    """What is said of data in the layout of its owner: another preset may be the one of the paper."""
    layout = None if config.data is None else recognise(config.data)
    if layout is None:
        return []
    fits = layout.preset in (config.preset, "folder")
    return [
        f"data       {layout.title}" + ("" if fits else f"; the paper's settings for it are --preset {layout.preset}")
    ]


def say(line: str) -> None:
    tqdm.write(line)  # to stdout, above the bar and not through it
    sys.stdout.flush()


def free_folder(config: TrainConfig) -> Path:
    """runs/NAME, or runs/NAME-2 and so on: the first that is free or holds this very run."""
    base = Path("runs") / (Path(config.data).resolve().name if config.data else "demo")
    for number in itertools.count(1):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            RunFolder(path, config)
        except UserError:
            continue
        return path


def configure(args: Sequence[str]) -> TrainConfig:
    """The preset named in `args` (folder with --data, demo without), with everything else in `args` laid over it."""
    args = list(args)
    base = preset(_value(args, "--preset") or ("folder" if _value(args, "--data") else "demo"))
    parsed = parse(TrainConfig, args, base, prog="python -m smooseg_fast.train")
    changes = {
        name: value
        for name, value in vars(parsed).items()
        if value != getattr(base, name) or _value(args, flag(name)) is not None
    }
    config = with_changes(base, **changes)
    if config.data is None and config.preset != "demo":
        raise UserError(f"--data: missing; preset {config.preset} needs a folder of images (the demo is --preset demo)")
    return config


def _value(args: list[str], name: str) -> str | None:
    """The value of a flag, before the parser knows the defaults; both `--flag value` and `--flag=value`, hyphens or underscores."""
    for place, word in enumerate(args):
        key, equals, value = word.partition("=")
        if key.replace("_", "-") == name:
            return value if equals else (args[place + 1] if place + 1 < len(args) else None)
    return None


if __name__ == "__main__":
    sys.exit(run(main, together=True))
