"""`smooseg evaluate`: measure a checkpoint against the labels of a whole set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .command import end, load_segmenter, run
from .config import (
    FIT,
    GROUPS,
    Backbone,
    BackbonePrecision,
    CacheLimit,
    Device,
    Folder,
    PresetName,
    Resample,
    TrainConfig,
    preset,
)
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.outfolder import mark_as_ours
from .system.sizes import parse_size

if TYPE_CHECKING:
    import numpy as np

    from .datasets import Dataset
    from .segment.checkpoint import Checkpoint
    from .segment.segmenter import Segmenter
    from .system.processes import Processes


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure accuracy and mIoU of a checkpoint on labelled images: every labelled pixel of every image counts."""

    checkpoint: Annotated[str, Group("data"), Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    data: Annotated[str | None, Value("FOLDER", usual=True)] = None
    """DIR with images/ and labels/, or val/ (else test/) above them; or Cityscapes, COCO-Stuff, Potsdam or PASCAL VOC
    as their owners pack them [the demo's held-out images]."""
    groups: Annotated[int | None, Bounds(1, GROUPS)] = None
    """Number of groups, looked up in the tree [the number that training or smooseg choose settled on]."""
    preset: PresetName | None = None
    """The paper's protocol for a dataset, whatever the checkpoint was trained with: central squares of 320 pixels
    (potsdam 224), nearest neighbour, mirror averaging, all images [the checkpoint's sizes]."""
    eval_size: int | None = None
    """Short side in pixels [the preset's, else the checkpoint's]."""
    whole: bool = False
    """Measure every labelled pixel of whole images, at their own size, instead of the paper's central squares. A
    checkpoint of another scale than fit is always measured so, unless a --preset is given."""
    mirror: bool = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the
    paper does."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone; auto takes one in which the device is fast."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""
    cache_limit: CacheLimit | None = None
    """Maximum size of the feature cache, e.g. 50GB (default: unlimited). Least recently used features go first."""

    out: Annotated[Folder | None, Group("output")] = None
    """Folder for scores.json and confusion.png [evaluation next to the checkpoint]."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    config = parse(EvaluateConfig, args, "evaluate")
    from .datasets.images import whole_patches
    from .segment.segmenter import pick_device
    from .system.processes import ALONE

    processes = processes or ALONE
    device = processes.device(pick_device(config.device))
    segmenter = load_segmenter(
        config.checkpoint, config.backbone, device, config.backbone_precision, groups=config.groups
    )
    dataset = labelled_images(config.data, segmenter.checkpoint)
    settings = segmenter.config if config.preset is None else protocol(config.preset, config.data)
    patch = segmenter.backbone.patch
    suits = settings.eval_size or segmenter.backbone.sizes[1]
    size = whole_patches(suits, patch) if config.eval_size is None else config.eval_size
    for note in dataset.notes:
        print(f"data       {note}")
    if config.whole or settings.scale != (FIT,):
        measured = wholes(config, segmenter, dataset, processes)
    else:
        if config.eval_size is None and size != suits:
            print(f"eval_size: {suits} -> {size} pixels, a multiple of the {patch}-pixel patch")
        measured = central_squares(config, segmenter, dataset, settings.resample, size=size, processes=processes)
    if processes.first:
        report(config, dataset, measured)


@dataclass(frozen=True)
class Measured:
    """counts: [groups, classes]. size: the short side in pixels where there is one. how: the scale, for people."""

    counts: np.ndarray
    images: int
    skipped: list[tuple[str, str]]
    size: int | None
    how: str


def central_squares(
    config: EvaluateConfig,
    segmenter: Segmenter,
    dataset: Dataset,
    resample: Resample,
    *,
    size: int,
    processes: Processes,
) -> Measured:
    """Measure on the central squares of all images, from cached features, as the paper does."""
    from .datasets.cutting import Cutting
    from .features.extract import open_or_extract
    from .features.job import FeatureOptions
    from .features.room import require_room
    from .measure.confusion import LabelSquares, head_codes, require_same_rows

    cutting = Cutting(size=size, resample=resample, margin=segmenter.config.margin)
    options = FeatureOptions(
        size=size,
        argument="--eval-size",
        resample=resample,
        margin=cutting.margin,
        cache=config.cache,
        limit=None if config.cache_limit is None else parse_size(config.cache_limit, "--cache-limit"),
        processes=processes,
    )
    require_room(dataset, segmenter.backbone, options, stores=1 + config.mirror)
    store = open_or_extract(dataset, segmenter.backbone, options)
    mirrored = None
    if config.mirror:
        mirrored = open_or_extract(dataset, segmenter.backbone, replace(options, mirror=True))
        require_same_rows(store, mirrored)
    labels = LabelSquares(dataset, store, cutting, processes)
    counts = labels.confusion(head_codes(segmenter.grouping, store, mirrored), segmenter.grouping.prototypes)
    return Measured(counts, len(store), store.skipped, size, f"at {size} px")


def wholes(config: EvaluateConfig, segmenter: Segmenter, dataset: Dataset, processes: Processes) -> Measured:
    """Measure on whole images, every pixel at its own size."""
    from .measure.confusion import count_wholes

    cutting = segmenter.cutting(short_side=config.eval_size, argument="--eval-size")
    counts, skipped = count_wholes(segmenter, dataset, processes, mirror=config.mirror, short_side=config.eval_size)
    fits = cutting.scale == (FIT,)
    how = f"of whole images at {cutting.size} px" if fits else f"of whole images at scale {' '.join(cutting.scale)}"
    return Measured(counts, len(dataset) - len(skipped), skipped, cutting.size if fits else None, how)


def report(config: EvaluateConfig, dataset: Dataset, measured: Measured) -> None:
    """Write the figures to the output folder, and print them."""
    from .datasets import classes_of
    from .measure.scores import hungarian, majority, percent, scores_table
    from .show import charts, pictures

    names, counts = classes_of(dataset), measured.counts
    best = hungarian(counts)
    matched = {"hungarian": best, "majority": majority(counts)}
    out = Path(config.out).expanduser() if config.out else Path(config.checkpoint).parent / "evaluation"
    summary = {
        "checkpoint": config.checkpoint,
        "data": dataset.name,
        "held_out": dataset.held_out,
        "preset": config.preset,
        "images": measured.images,
        "skipped": measured.skipped,
        "size": measured.size,
        "measured": measured.how,
        "groups": len(counts),
        "mirror": config.mirror,
        **{name: scores.as_dict(names) for name, scores in matched.items()},
        "confusion": counts.tolist(),
    }
    mark_as_ours(out, "confusion.png")
    write_json(out / "scores.json", summary)
    pictures.save(out / "confusion.png", charts.confusion_picture(counts, best, names))
    print(scores_table(matched, names))
    skipped = f"; {len(measured.skipped)} images could not be used" if measured.skipped else ""
    print(
        f"\n{measured.images} images of {dataset.name}, {best.pixels:,} labelled pixels {measured.how}, "
        f"{'mirror averaged' if config.mirror else 'no mirror'}; {len(counts)} groups, {len(names)} classes{skipped}\n"
        "both mappings from groups to classes are chosen by these labels: "
        "hungarian one to one (the field's), majority many to one\n"
        f"accuracy {percent(best.accuracy)} %  mIoU {percent(best.miou)} %  (hungarian)"
    )
    print(f"saved {out / 'scores.json'}, {out / 'confusion.png'}")


def labelled_images(data: str | None, checkpoint: Checkpoint) -> Dataset:
    """The held-out images of the folder `data`, or without it those of the demo. UserError when they or their labels
    are missing."""
    from .datasets import open_dataset
    from .datasets.demo import demo_datasets

    if data is None:
        config = checkpoint.config
        # arrays given to `fit` have no folder either, but they have no classes
        if config.preset != "demo" or config.data is not None or checkpoint.class_names is None:
            raise UserError("--data: missing; the checkpoint is not of the demo: give a folder with images/ and labels")
        return demo_datasets()[1]
    dataset = open_dataset(data, "val")
    if not dataset.labelled:
        found = "has no labels" + "".join(f" ({note})" for note in dataset.notes)
        raise UserError(f"--data {data}: {found}; evaluation needs DIR/images and DIR/labels, prediction needs none")
    return dataset


def protocol(name: str, data: str | None) -> TrainConfig:
    """The preset `name`. UserError when `data` is recognised as the dataset of another one."""
    from .datasets import recognise

    settings = preset(name)
    layout = None if data is None else recognise(data)
    if layout is not None and layout.preset != name:
        raise UserError(f"--preset {name}: but {data} is {layout.title}; give --preset {layout.preset}")
    return settings


if __name__ == "__main__":
    sys.exit(end(run(main)))
