"""`python -m smooseg_fast.data check DIR`: what a folder was recognised as, what it holds and what is missing, before hours are spent."""

from __future__ import annotations

import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from .command import parse, run
from .datasets import IGNORE, Dataset, Layout, open_dataset, open_splits, recognise
from .datasets.base import extent
from .datasets.images import ImageError
from .errors import UserError
from .features.sample import spread
from .system.progress import Bar

PROGRAM = "python -m smooseg_fast.data"
HELP = f"""usage: {PROGRAM} check DIR [--sample N]

check    what DIR was recognised as, what it holds and what is missing; check --help lists its flags"""
NOT_HELD_OUT = "no images are kept apart: figures would be taken on the images that are learnt from"
TINY = 16  # pixels: an image is called small below it, about two patches of a backbone


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Say what a folder holds and what is missing. Exit code 0 when it can be learnt from or measured on, 2 when not."""

    data: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="DIR")]
    """The folder that --data of train and evaluate would be given."""
    sample: int = 200
    """Images of each split that are opened with their labels, evenly spaced; 0 opens all."""


@dataclass
class Inspection:
    """What was found by opening `opened` images of a dataset. Class counts are over the labels that could be read."""

    dataset: Dataset
    opened: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width)
    small: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # a line for each image
    wrong: list[str] = field(default_factory=list)  # a line for each label
    labels: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(IGNORE + 1, np.int64))  # pixels of each class

    def add(self, index: int, size: tuple[int, int] | str, counts: np.ndarray | str | None) -> None:
        """What `look` found of an image."""
        self.opened += 1
        if isinstance(size, str):
            self.broken.append(size)
        else:
            self.sizes[size] += 1
            if min(size) < TINY:
                self.small.append(self.dataset.names[index])
        if isinstance(counts, str):
            self.wrong.append(counts)
        elif counts is not None:
            self.labels += 1
            self.counts += counts

    def shares(self) -> np.ndarray:
        """[classes] of the labelled pixels; nan without any."""
        counts = self.counts[: len(self.dataset.class_names or ())]
        total = counts.sum()
        return counts / total if total else np.full(len(counts), np.nan)


def main(args: Sequence[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        return
    if args[0] != "check":
        raise UserError(f"{args[0]}: no such command; it is {PROGRAM} check DIR")
    check(parse(CheckConfig, args[1:], prog=f"{PROGRAM} check"))


def check(config: CheckConfig) -> None:
    """Prints the report; UserError at its end when the folder cannot be used."""
    if config.sample < 0:
        raise UserError(f"--sample: must be 0 (all) or more, got {config.sample}")
    layout = recognise(config.data)
    splits, lacking = open_both(config.data, layout)
    say("data", f"{config.data}: {what(config.data, splits) if layout is None else layout.title}")
    found = {}
    for split, dataset in splits.items():
        found[split] = inspect(dataset, split, config.sample)
        say(split, describe(found[split]))
    for line in others(layout):
        say("also", line)
    tell_classes(found)
    for note in dict.fromkeys([*lacking, *(note for dataset in splits.values() for note in dataset.notes)]):
        say("note", note)
    problems = [
        problem for split, inspection in found.items() for problem in judge(split, inspection, measured="val" in splits)
    ]
    if problems:
        raise UserError("; ".join(problems))
    say("next", next_command(config.data, layout, splits))


def what(data: str, splits: dict[str, Dataset]) -> str:
    """A folder or file that no owner lays out."""
    if Path(data).expanduser().is_file():
        return "an image"
    return "a folder of images" + (" with labels" if any(dataset.labelled for dataset in splits.values()) else "")


def open_both(data: str, layout: Layout | None) -> tuple[dict[str, Dataset], list[str]]:
    """("train" and "val", where they differ and as far as a run would open them; what it could not do). UserError where none could."""
    try:
        train, val = open_splits(data)
    except UserError as error:
        try:
            return {"val": open_dataset(data, "val")}, [str(error)]
        except UserError:
            raise error from None
    if val is None and layout is not None:
        val = layout.open("val")  # without labels, but there
    if val is not None and val.held_out:
        return {"train": train, "val": val}, []
    return {"train": train}, [NOT_HELD_OUT] if train.labelled else []


def inspect(dataset: Dataset, split: str, sample: int) -> Inspection:
    """Opens `sample` images, or with 0 all, and their labels, with a progress line."""
    inspection = Inspection(dataset)
    _ = dataset.class_names  # counted here, where they have to be: its own progress line should not cross ours
    chosen = spread(len(dataset), sample or len(dataset)).tolist()
    bar = Bar(total=len(chosen), desc=f"check {split}", unit="image", leave=False, file=sys.stderr)
    with bar, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for index, found in zip(chosen, pool.map(lambda index: look(dataset, index), chosen)):
                inspection.add(index, *found)
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    return inspection


def look(dataset: Dataset, index: int) -> tuple[tuple[int, int] | str, np.ndarray | str | None]:
    """(height and width of an image, or what is wrong with it; pixels of each class, what is wrong with its label, or None without)."""
    try:
        size = dataset.image(index).shape[:2]
    except ImageError as error:
        return str(error), None
    try:
        label = dataset.label(index)
    except UserError as error:
        return size, str(error)
    return size, None if label is None else np.bincount(label.ravel(), minlength=IGNORE + 1)


def describe(inspection: Inspection) -> str:
    dataset = inspection.dataset
    parts = [f"{len(dataset)} images" + (", held out" if dataset.held_out else "")]
    parts.append(
        f"{'all' if inspection.opened == len(dataset) else inspection.opened} opened, {inspection.labels} of them with a label"
    )
    if inspection.sizes:
        (common, count), *_ = inspection.sizes.most_common(1)
        least, most = (extent(pick(inspection.sizes, key=lambda size: size[0] * size[1])) for pick in (min, max))
        every = len(inspection.sizes) == 1
        parts.append(f"{extent(common)} pixels" + ("" if every else f" in {count} of them; from {least} to {most}"))
    return "; ".join(parts)


def others(layout: Layout | None) -> list[str]:
    """A line for each of the owner's splits that is neither learnt from nor measured on."""
    lines = []
    for split, part in {} if layout is None else layout.parts.items():
        if split not in ("train", "val"):
            try:
                lines.append(f"{split}: {len(part())} images, not used")
            except UserError as error:
                lines.append(f"{split}: {error}")
    return lines


def tell_classes(found: dict[str, Inspection]) -> None:
    labelled = {split: inspection for split, inspection in found.items() if inspection.labels}
    if not labelled:
        return
    names = next(iter(labelled.values())).dataset.class_names
    where = " and ".join(f"{each.labels} labels of {split}" for split, each in labelled.items())
    whole = all(each.opened == len(each.dataset) for each in labelled.values())
    say(
        "classes",
        f"{len(names)}; share of the labelled pixels in {'all ' if whole else ''}{where}{'' if whole else ' (a sample)'}",
    )
    shares = {split: inspection.shares() for split, inspection in labelled.items()}
    width = max(map(len, (*names, "not labelled")))
    say("", f"{'':4}{'':{width}}" + "".join(f"{split:>9}" for split in labelled))
    for number, name in enumerate(names):
        say("", f"{number:3} {name:{width}}" + "".join(f"{100 * shares[split][number]:8.2f}%" for split in labelled))
    ignored = (each.counts[IGNORE] / each.counts.sum() for each in labelled.values())
    say(
        "", f"{'':4}{'not labelled':{width}}" + "".join(f"{100 * share:8.2f}%" for share in ignored) + "  of all pixels"
    )
    unseen = [name for number, name in enumerate(names) if all(not share[number] > 0 for share in shares.values())]
    if unseen:
        say(
            "note",
            f"{len(unseen)} classes have no pixel in {'any label' if whole else 'the labels opened'}: {', '.join(unseen)}",
        )


def judge(split: str, inspection: Inspection, measured: bool) -> list[str]:
    """Warns of what a run would skip; -> what it would stop at. measured: there are images held out for figures."""
    problems = []
    for lines, what in ((inspection.broken, "images"), (inspection.wrong, "labels")):
        if not lines:
            continue
        line = f"{len(lines)} of the {inspection.opened} {what} of {split} that were opened cannot be used, first {lines[0]}"
        fatal = len(lines) == inspection.opened if what == "images" else split == "val" or not measured
        if fatal:
            problems.append(line)
        else:
            say("warning", f"{line} ({'a run skips them' if what == 'images' else 'a run does not read them'})")
    if inspection.small:
        say(
            "warning",
            f"{len(inspection.small)} images of {split} have a side below {TINY} pixels, first {inspection.small[0]}",
        )
    return problems


def next_command(data: str, layout: Layout | None, splits: dict[str, Dataset]) -> str:
    preset = [] if layout is None or layout.preset == "folder" else ["--preset", layout.preset]
    if "train" in splits:
        return shlex.join(["python", "-m", "smooseg_fast.train", *preset, "--data", data])
    return shlex.join(["python", "-m", "smooseg_fast.evaluate", *preset, "--checkpoint", "FILE", "--data", data])


def say(what: str, line: str) -> None:
    print(f"{what:11}{line}", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
