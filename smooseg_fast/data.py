"""`smooseg data check DIR`: tell what a folder was recognised as, what it holds and what is missing, before a long
run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .command import run
from .config import AUTO, Backbone, Device, Folder, Ignored
from .errors import UserError
from .system.commandline import Parser, choose_command, command_line, parse
from .system.fields import Bounds, Group, Value
from .system.outfolder import mark_as_ours
from .system.readingflags import Bands, Intensity, Pages
from .system.stores import place
from .system.table import aligned
from .system.terminal import one_line

if TYPE_CHECKING:
    from .datasets import Dataset, Layout
    from .datasets.inspection import Inspection

SHEET, DRAWN = "scales.jpg", 3  # images on it
SHRUNK, STRIP = 3, 4  # from these ratios on, another scale deserves a look
USUAL_SIZE = 224  # pixels of the short side at --scale fit, with most backbones
NOT_HELD_OUT = "no images are kept apart: figures would be taken on the images that are learnt from"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Tell what a folder holds and what is missing. The exit code is 0 when it can be learnt from or measured on, and 2
    when not."""

    data: Annotated[str, Value("DIR", positional=True, stores=True)]
    """The folder that --data of train and evaluate would be given."""
    ignore: Ignored = ()
    """Numbers in the label files that count as not labelled, as for training."""
    intensity: Intensity = ("data",)
    """Values that become black and white, as for training."""
    bands: Bands | None = None
    """Bands to show as red, green and blue, as for training."""
    pages: Pages = "1"
    """Page of a stack to read, or all, as for training."""
    sample: Annotated[int, Bounds(0)] = 200
    """Images of each split to open with their labels, evenly spaced; 0 opens all."""
    pictures: Annotated[Folder | None, Group("which scale?")] = None
    """Draw scales.jpg into this folder: three images at --scale fit, 0.5 and native, where these differ, grouped
    without training."""
    backbone: Backbone = AUTO
    """Frozen features of these pictures, as for training."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""


COMMANDS = {"check": ("tell what DIR was recognised as, what it holds and what is missing", CheckConfig)}


def main(args: Sequence[str]) -> None:
    about = {name: line for name, (line, _) in COMMANDS.items()}
    chosen = choose_command(Parser(prog=command_line("data")), args, about, "check")
    if chosen is not None:
        check(parse(CheckConfig, chosen[1], "data", "check"))


def check(config: CheckConfig) -> None:
    """Print the report; UserError at its end when the folder cannot be used."""
    from .datasets import recognise
    from .datasets.copies import copies_notes
    from .datasets.inspection import inspect

    layout = recognise(config.data)
    splits, notes = open_both(config, layout)
    labels = " with labels" if any(dataset.labelled for dataset in splits.values()) else ""
    source = place(config.data)
    single = isinstance(source, Path) and source.is_file() and source.suffix.lower() != ".tar"
    title = "an image" if single else "a folder of images" + labels
    say("data", f"{config.data}: {title if layout is None else layout.title}")
    inspections = {}
    for split, dataset in splits.items():
        inspections[split] = inspect(dataset, split, config.sample)
        say(split, inspections[split].line())
    learnt_from = next(iter(inspections.values()))
    for line in another_scale(learnt_from):
        say("scale", line)
    for split, part in {} if layout is None else layout.parts.items():
        if split not in ("train", "val"):
            try:
                say("also", f"{split}: {len(part())} images, not used")
            except UserError as error:
                say("also", f"{split}: {error}")
    tell_classes({split: inspection for split, inspection in inspections.items() if inspection.labels})
    notes += copies_notes(splits["train"], splits.get("val")) if "train" in splits else []
    for note in dict.fromkeys([*notes, *(note for dataset in splits.values() for note in dataset.notes)]):
        say("note", note)
    problems = [line for split, inspection in inspections.items() for line in judge(split, inspection, "val" in splits)]
    if problems:
        raise UserError("; ".join(problems))
    if config.pictures is not None:
        draw(config, learnt_from)
    elif another_scale(learnt_from):
        say("look", command_line("data", "check", config.data, "--pictures", "FOLDER"))
    preset = [] if layout is None or layout.preset == "folder" else ["--preset", layout.preset]
    words = ["train", *preset] if "train" in splits else ["evaluate", *preset, "--checkpoint", "FILE"]
    ignored = ["--ignore", *map(str, config.ignore)] if config.ignore else []
    reading = reading_flags(config) if "train" in splits else []
    say("next", command_line(*words, "--data", config.data, *ignored, *reading))


def reading_flags(config: CheckConfig) -> list[str]:
    """The flags by which training reads the files as this check did."""
    flags = ["--intensity", *config.intensity] if config.intensity != ("data",) else []
    flags += ["--bands", *map(str, config.bands)] if config.bands else []
    return flags + (["--pages", config.pages] if config.pages != "1" else [])


def open_both(config: CheckConfig, layout: Layout | None) -> tuple[dict[str, Dataset], list[str]]:
    """("train" and "val", where they differ and as far as a run would open them; why one is missing). UserError when
    neither opens."""
    from .datasets import open_dataset, open_splits
    from .datasets.reading import PLAIN
    from .datasets.survey import settle, settled

    reading = PLAIN.changed(config.intensity, config.bands, config.pages)

    try:
        train, val = open_splits(config.data, config.ignore)
    except UserError as error:
        with suppress(UserError):
            return {"val": settled(open_dataset(config.data, "val", config.ignore), reading)[0]}, [str(error)]
        raise
    if val is None and layout is not None:
        val = layout.open("val")  # without labels, but there
    train, val = settle(train, val, reading)
    if val is not None and val.held_out:
        return {"train": train, "val": val}, []
    return {"train": train}, [NOT_HELD_OUT] if train.labelled else []


def tell_classes(labelled: dict[str, Inspection]) -> None:
    """Print what the numbers in the labels mean, and the share of every class in the labels of each split."""
    if not labelled:
        return
    import numpy as np

    from .datasets import classes_of
    from .datasets.base import Files
    from .datasets.inspection import Classes

    dataset = next(iter(labelled.values())).dataset
    names = classes_of(dataset)
    complete = all(inspection.complete for inspection in labelled.values())
    labels = {split: inspection.labels for split, inspection in labelled.items()}
    classes = Classes(
        dataset, labels, complete, np.sum([inspection.counts for inspection in labelled.values()], axis=0)
    )
    for note in dataset.label_notes if isinstance(dataset, Files) else ():
        say("labels", note)
    say("classes", classes.line())
    ignored = [inspection.counts[-1] / inspection.counts.sum() for inspection in labelled.values()]
    shares = [*zip(*(inspection.shares() for inspection in labelled.values())), ignored]
    titles = [*(f"{number:3} {name}" for number, name in enumerate(names)), "    not labelled (of all pixels)"]
    rows = [[title, *(f"{share:.2%}" for share in row)] for title, row in zip(titles, shares)]
    for line in aligned([["", *labelled], *rows]).splitlines():
        say("", line)
    unseen = [name for name, row in zip(names, shares) if not any(row)]
    if unseen:
        opened = "any label" if complete else "the labels opened"
        say("note", f"{len(unseen)} classes have no pixel in {opened}: {', '.join(unseen)}")
    classes.require_two()


def judge(split: str, inspection: Inspection, measured: bool) -> list[str]:
    """Warn of files that a run would skip; -> those at which it would stop. measured: some images are held out for
    figures."""
    problems, opened = [], inspection.opened
    for lines, things, fatal, consequence in (
        (inspection.broken, "images", len(inspection.broken) == opened, "a run skips them"),
        (inspection.wrong, "labels", split == "val" or not measured, "a run does not read them"),
    ):
        if lines:
            line = f"{len(lines)} of the {opened} {things} of {split} that were opened cannot be used, first {lines[0]}"
            if fatal:
                problems.append(line)
            else:
                say("warning", f"{line} ({consequence})")
    return problems


def another_scale(inspection: Inspection) -> list[str]:
    """Tell where a --scale other than fit deserves a look, from the sizes of the images alone."""
    sizes, lines, usual = inspection.sizes, [], USUAL_SIZE
    count = sizes.total()
    large = sum(n for size, n in sizes.items() if min(size) >= SHRUNK * usual)
    if 2 * large > count:
        short = sorted(min(size) for size in sizes.elements())[count // 2]
        lines.append(
            f"fit shrinks the images by {short / usual:.1f} (short side {short} -> {usual} pixels): if what you look "
            "for is small in them, try --scale native, or 0.5"
        )
    strips = sum(n for size, n in sizes.items() if max(size) >= STRIP * min(size))
    if strips:
        lines.append(
            f"{strips} of {count} images are at least {STRIP} times as long as wide and would be cut into many more "
            "squares than the others: --crops tiles takes a fair share of each"
        )
    return lines


def draw(config: CheckConfig, inspection: Inspection) -> None:
    """Write the sheet of a few images at several scales."""
    from .backbones import load_backbone
    from .backbones.auto import candidates, explained, look
    from .datasets.images import ImageError, require_patch, whole_patches
    from .datasets.inspection import is_grey
    from .segment.segmenter import pick_device
    from .show.pictures import save
    from .show.scales import scales_sheet

    name = config.backbone
    if name == AUTO:
        here = look()
        best = candidates(here, is_grey(inspection.dataset))[0]
        print("\n".join(explained(best, here)))
        name = best.name
    backbone = load_backbone(name, pick_device(config.device))
    names, images, dataset = [], [], inspection.dataset
    for index in inspection.evenly_spaced(DRAWN):
        with suppress(ImageError):  # `judge` has told
            image = dataset.image(index)
            require_patch(image, backbone.patch, dataset.names[index])
            names.append(dataset.names[index])
            images.append(image)
    if not images:
        raise UserError(f"--data {config.data}: none of the images chosen for --pictures can be used; check them")
    out = Path(config.pictures or "").expanduser()
    mark_as_ours(out, SHEET)
    sheet = scales_sheet(images, names, backbone, whole_patches(backbone.sizes[0], backbone.patch))
    save(out / SHEET, sheet)
    say("saved", str(out / SHEET))


def say(what: str, line: str) -> None:
    print(one_line(f"{what:11}{line}"), flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
