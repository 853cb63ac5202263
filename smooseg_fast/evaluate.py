"""`smooseg evaluate`: measure a checkpoint against the labels of a whole set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .command import end, load_segmenter, run
from .config import (
    FIT,
    GROUPS,
    PAPER_REFINE,
    Backbone,
    BackbonePrecision,
    CacheLimit,
    Device,
    Folder,
    Ignored,
    PresetName,
    Refine,
    Shifts,
    TrainConfig,
    preset,
)
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.outfolder import mark_as_ours
from .system.sizes import parse_size
from .system.stores import place
from .system.terminal import one_line

if TYPE_CHECKING:
    import numpy as np

    from .datasets import Dataset
    from .datasets.cutting import Cutting
    from .measure.probes import Kind
    from .measure.scores import Scores
    from .segment.checkpoint import Checkpoint
    from .segment.segmenter import Segmenter
    from .system.processes import Processes

PROBES = {"linear": "linear map", "neighbours": "20 nearest neighbours"}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure accuracy and mIoU of a checkpoint on labelled images: every labelled pixel of every image counts."""

    checkpoint: Annotated[str, Group("data"), Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    data: Annotated[str | None, Value("FOLDER", usual=True, stores=True)] = None
    """DIR with images/ and labels/, or val/ (else test/) above them; or Cityscapes, COCO-Stuff, Potsdam or PASCAL VOC
    as their owners pack them [the demo's held-out images]."""
    ignore: Ignored | None = None
    """Numbers in the label files that count as not labelled [those of training]."""
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
    shifts: Shifts = 1
    """See each image 2 or 4 times, each time moved by half a patch, on a grid of half patches: finer borders, in as
    many times the time."""
    refine: Refine | None = None
    """How labels follow the edges of the image, as in smooseg predict: none, guided, joint, crf or crf-exact. Scores
    without it are given next to it; none gives those alone [guided; with a --preset or a published checkpoint, the two
    rows of the paper's tables: none, and next to it crf]."""
    probes: bool = False
    """Fit a linear map and nearest neighbours, too, on the labels of the training images of --data, on frozen features
    and on codes, and score them on the held-out ones. They tell poor features from poor groups."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    upsampler: Annotated[str | None, Value("NAME")] = None
    """module:callable that refines features by the image: it takes features [1,h,w,D] and uint8 [H,W,3], and returns
    features [1,n*h,n*w,D]. Needs whole images (--whole)."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone; auto is float32 with a --preset or a published checkpoint, whose figures were
    measured in it, else one in which the device is fast."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""
    cache_limit: CacheLimit | None = None
    """Maximum size of the feature cache, e.g. 50GB (default: unlimited). Least recently used features go first."""

    out: Annotated[str | None, Group("output"), Value("FOLDER", stores=True)] = None
    """Folder for scores.json and confusion.png [evaluation next to the checkpoint]."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    config = parse(EvaluateConfig, args, "evaluate")
    from .datasets.cutting import Cutting
    from .datasets.images import whole_patches
    from .datasets.inspection import label_lines
    from .segment.segmenter import pick_device
    from .system.processes import ALONE

    processes = processes or ALONE
    device = processes.device(pick_device(config.device))
    segmenter = load_segmenter(
        config.checkpoint,
        config.backbone,
        device,
        config.backbone_precision,
        groups=config.groups,
        exact=config.preset is not None,
        upsampler=config.upsampler,
    )
    refinements = refinements_of(config, segmenter)
    ignore = segmenter.config.ignore if config.ignore is None else config.ignore
    dataset = labelled_images(config.data, segmenter.checkpoint, ignore)
    training = training_images(config, dataset, segmenter.checkpoint, ignore) if config.probes else None
    settings = segmenter.config if config.preset is None else protocol(config.preset, config.data)
    patch = segmenter.backbone.patch
    suits = settings.eval_size or segmenter.backbone.sizes[1]
    size = whole_patches(suits, patch) if config.eval_size is None else config.eval_size
    for note in dataset.notes:
        print(one_line(f"data       {note}"))
    for title, line in label_lines(dataset):
        print(one_line(f"{title:11}{line}"))
    if config.whole or settings.scale != (FIT,):
        if config.probes:
            raise UserError("--probes: measure central squares, not whole images; leave it or --whole out")
        measured = wholes(config, segmenter, dataset, refinements, processes)
    else:
        if config.probes and config.shifts > 1:
            raise UserError("--probes: see every square once; leave --shifts or --probes out")
        if config.upsampler is not None:
            raise UserError("--upsampler: central squares come from the cache without their pictures; add --whole")
        if config.eval_size is None and size != suits:
            print(f"eval_size: {suits} -> {size} pixels, a multiple of the {patch}-pixel patch")
        cutting = Cutting(size=size, resample=settings.resample, margin=segmenter.config.margin)
        measured = central_squares(config, segmenter, (dataset, training), cutting, refinements, processes)
    if processes.first:
        report(config, dataset, measured, segmenter)


def refinements_of(config: EvaluateConfig, segmenter: Segmenter) -> list[Refine]:
    """The refinements to measure, "none" among them. The first one is the main one."""
    if config.refine is None and published(config, segmenter):
        return ["none", PAPER_REFINE]
    refine = segmenter.refinement(config.refine)
    return ["none"] if refine == "none" else [refine, "none"]


@dataclass(frozen=True)
class Measured:
    """counts: [groups, classes] of each refinement, the main one first, of groups after merging. size: the short side
    in pixels where there is one. how: the scale, for people. probes: those of "features" and of "codes", if they were
    asked for."""

    counts: dict[Refine, np.ndarray]
    images: int
    skipped: list[tuple[str, str]]
    size: int | None
    how: str
    probes: dict[str, dict[Kind, Scores]] = field(default_factory=dict)


def central_squares(
    config: EvaluateConfig,
    segmenter: Segmenter,
    sets: tuple[Dataset, Dataset | None],
    cutting: Cutting,
    refinements: Sequence[Refine],
    processes: Processes,
) -> Measured:
    """Measure on the central squares of all images, from cached features, as the paper does.

    sets: the images to measure on, and those that probes are fitted on, if any.
    """
    from .backbones.shifts import density, offsets
    from .features.extract import open_or_extract
    from .features.job import FeatureOptions
    from .features.room import require_room
    from .measure.confusion import LabelSquares, head_codes, require_same_rows, shifted_codes
    from .measure.probes import probe
    from .segment.grouping import Grouping

    dataset, training = sets
    options = FeatureOptions(
        size=cutting.size,
        argument="--eval-size",
        resample=cutting.resample,
        margin=cutting.margin,
        exact=published(config, segmenter) and segmenter.backbone.precision == "float32",
        cache=config.cache,
        limit=None if config.cache_limit is None else parse_size(config.cache_limit, "--cache-limit"),
        processes=processes,
    )
    moves, sides = offsets(config.shifts, segmenter.backbone.patch), (False, True)[: 1 + config.mirror]
    require_room(dataset, segmenter.backbone, options, stores=len(moves) * len(sides))
    seen = [[replace(options, shift=move, mirror=side) for side in sides] for move in moves]
    stores = [[open_or_extract(dataset, segmenter.backbone, one) for one in sides_of] for sides_of in seen]
    store = stores[0][0]
    for other in chain(*stores):
        require_same_rows(store, other)
    labels = LabelSquares(dataset, store, cutting, processes, density=density(config.shifts))
    codes = shifted_codes(segmenter.grouping, stores, segmenter.backbone.patch)
    names = segmenter.names
    counts = {way: names.merged(labels.refined_confusion(codes, segmenter.grouping, way)) for way in refinements}
    probes = {}
    if training is not None:
        fitted_on = LabelSquares(training, open_or_extract(training, segmenter.backbone, options), cutting, processes)
        head = Grouping(segmenter.grouping.head)
        views = {"features": lambda squares: squares.store.rows, "codes": lambda s: head_codes(head, s.store)}
        probes = probe(fitted_on, labels, views)
    return Measured(counts, len(store), store.skipped, cutting.size, f"at {cutting.size} px", probes)


def published(config: EvaluateConfig, segmenter: Segmenter) -> bool:
    """Whether the figures are to be those of the published arithmetic: the backbone and its features in float32."""
    return config.preset is not None or "published" in segmenter.checkpoint.report


def wholes(
    config: EvaluateConfig,
    segmenter: Segmenter,
    dataset: Dataset,
    refinements: Sequence[Refine],
    processes: Processes,
) -> Measured:
    """Measure on whole images, every pixel at its own size."""
    from .measure.confusion import count_wholes

    cutting = segmenter.cutting(short_side=config.eval_size, argument="--eval-size")
    counts, skipped = count_wholes(
        segmenter,
        dataset,
        processes,
        mirror=config.mirror,
        shifts=config.shifts,
        short_side=config.eval_size,
        refinements=refinements,
    )
    fits = cutting.scale == (FIT,)
    how = f"of whole images at {cutting.size} px" if fits else f"of whole images at scale {' '.join(cutting.scale)}"
    counts = {way: segmenter.names.merged(of_way) for way, of_way in counts.items()}
    return Measured(counts, len(dataset) - len(skipped), skipped, cutting.size if fits else None, how)


def report(config: EvaluateConfig, dataset: Dataset, measured: Measured, segmenter: Segmenter) -> None:
    """Write the figures to the output folder, and print them."""
    from .datasets import classes_of
    from .measure.scores import by_refinement, hungarian, majority, percent, proposed_names, scores_table
    from .show import charts, pictures

    names, groups, (refine, *_) = classes_of(dataset), segmenter.groups, measured.counts
    numbers, captions = [group.number for group in groups], [group.caption for group in groups]
    rows = {way: {"hungarian": hungarian(c), "majority": majority(c)} for way, c in measured.counts.items()}
    counts, matched = measured.counts[refine], rows[refine]
    best = matched["hungarian"]
    out = place(config.out) if config.out else Path(config.checkpoint).parent / "evaluation"
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
        "shifts": config.shifts,
        "upsampler": config.upsampler,
        "refine": refine,
        "digest": segmenter.digest,
        "merge": segmenter.names.merge,
        "names": [group.name for group in groups],
        "proposed": {str(numbers[k]): name for k, name in proposed_names(counts, names).items()},
        **{name: scores.as_dict(names, numbers) for name, scores in matched.items()},
        "confusion": counts.tolist(),
        "by_refinement": by_refinement(rows, names, numbers),
        **probes_as_dict(measured, names),
    }
    mark_as_ours(out, "confusion.png")
    write_json(out / "scores.json", summary)
    pictures.save(out / "confusion.png", charts.confusion_picture(counts, best, names, captions))
    print(scores_table(matched, names, captions))
    shifts = "" if config.shifts == 1 else f", {config.shifts} shifts"
    refined = "" if refine == "none" else f", refined by {refine}"
    skipped = f"; {len(measured.skipped)} images could not be used" if measured.skipped else ""
    print(
        f"\n{measured.images} images of {dataset.name}, {best.pixels:,} labelled pixels {measured.how}, "
        f"{'mirror averaged' if config.mirror else 'no mirror'}{shifts}{refined}; "
        f"{len(counts)} groups, {len(names)} classes{skipped}\n"
        "both mappings from groups to classes are chosen by these labels: "
        "hungarian one to one (the field's), majority many to one"
    )
    for way in sorted(rows, key=lambda way: way != "none"):
        scores, how = rows[way]["hungarian"], "not refined" if way == "none" else f"refined by {way}"
        print(f"accuracy {percent(scores.accuracy)} %  mIoU {percent(scores.miou)} %  (hungarian, {how})")
    if measured.probes:
        print("probes     fitted on the labels of the training images; no group is matched to a class:")
    for view, kinds in measured.probes.items():
        for kind, scores in kinds.items():
            name = f"{PROBES[kind]}, {view}"
            print(f"           {name:30s}  accuracy {percent(scores.accuracy)} %  mIoU {percent(scores.miou)} %")
    print(f"saved {out / 'scores.json'}, {out / 'confusion.png'}")


def probes_as_dict(measured: Measured, names: Sequence[str]) -> dict[str, Any]:
    """For scores.json; empty without probes."""
    probes = measured.probes.items()
    return (
        {"probes": {view: {k: s.as_dict(names) for k, s in kinds.items()} for view, kinds in probes}} if probes else {}
    )


def training_images(
    config: EvaluateConfig, held_out: Dataset, checkpoint: Checkpoint, ignore: Sequence[int]
) -> Dataset:
    """The labelled images that probes are fitted on. UserError without them, or where `held_out` are the same ones."""
    from .datasets import open_dataset
    from .datasets.demo import demo_datasets
    from .datasets.survey import settled

    if config.data is None:
        training: Dataset = demo_datasets()[0]
    else:
        training, _ = settled(open_dataset(config.data, "train", ignore), checkpoint.reading)
    if not held_out.held_out or not training.labelled:
        lacks = "no labels of training images" if held_out.held_out else "no images apart from those to measure on"
        raise UserError(
            f"--probes: {held_out.name} has {lacks}; give DIR/train and DIR/val, each with images and labels"
        )
    if training.class_names != held_out.class_names:
        raise UserError(f"--probes: the training images of {held_out.name} have other classes than the held-out ones")
    return training


def labelled_images(data: str | None, checkpoint: Checkpoint, ignore: Sequence[int]) -> Dataset:
    """The held-out images of the folder `data`, or without it those of the demo. UserError when they or their labels
    are missing. ignore: numbers in the labels that count as not labelled."""
    from .datasets import open_dataset
    from .datasets.demo import demo_datasets
    from .datasets.survey import settled

    if data is None:
        config = checkpoint.config
        # arrays given to `fit` have no folder either, but they have no classes
        if config.preset != "demo" or config.data is not None or checkpoint.class_names is None:
            raise UserError("--data: missing; the checkpoint is not of the demo: give a folder with images/ and labels")
        return demo_datasets()[1]
    dataset, _ = settled(open_dataset(data, "val", ignore), checkpoint.reading)
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
