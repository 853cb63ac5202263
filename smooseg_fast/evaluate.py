"""`python -m smooseg_fast.evaluate`: a checkpoint against labels, over a whole set."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from .command import load_segmenter, parse, run
from .config import TrainConfig, preset
from .datasets import Dataset, open_dataset, recognise
from .datasets.demo import demo_datasets
from .datasets.images import whole_patches
from .errors import UserError
from .features.extract import open_or_extract
from .features.job import FeatureOptions
from .features.room import require_room
from .measure.confusion import LabelSquares, confusion_of, head_codes, require_same_rows
from .measure.scores import hungarian, majority, percent, table
from .segment.checkpoint import Checkpoint
from .segment.segmenter import pick_device
from .show import charts, pictures
from .system.files import write_json
from .system.processes import ALONE, Processes
from .system.sizes import parse_size


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Accuracy and mIoU of a checkpoint on labelled images: every labelled pixel of every image counts."""

    checkpoint: str
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    data: str | None = None
    """DIR with images/ and labels/, or val/ (else test/) above them; or Cityscapes, COCO-Stuff, Potsdam or PASCAL VOC as their owners pack
    them; without it, the demo's held-out images."""
    preset: str | None = None
    """cityscapes, cocostuff27 or potsdam: the paper's protocol for that dataset, whatever the checkpoint was trained with: central
    squares of 320 pixels (potsdam 224), nearest neighbour, mirror averaging, all images [the checkpoint's sizes]."""
    out: str | None = None
    """Folder for scores.json, confusion.png [evaluation beside the checkpoint]."""
    mirror: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="")] = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the paper does."""
    eval_size: int | None = None
    """Pixels of the short side [the preset's, else the checkpoint's]."""
    backbone: str | None = None
    """Needed where the checkpoint was trained on a module:callable; else the one it names."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto."""
    backbone_precision: str = "auto"
    """What a ViT backbone computes in: float32, bfloat16, float16, or auto: what the device is fast in."""
    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""
    cache_limit: str | None = None
    """Room that the cache may take, such as 50GB [all there is]; the features of other runs go for it, the longest unused first."""


def main(args: Sequence[str], processes: Processes = ALONE) -> None:
    config = parse(EvaluateConfig, args, prog="python -m smooseg_fast.evaluate")
    segmenter = load_segmenter(
        config.checkpoint, config.backbone, processes.device(pick_device(config.device)), config.backbone_precision
    )
    dataset = labelled_images(config.data, segmenter.checkpoint)
    names = dataset.class_names
    settings = segmenter.config if config.preset is None else protocol(config.preset, config.data)
    size = config.eval_size
    if size is None:
        size = whole_patches(settings.eval_size, segmenter.backbone.patch)
        if size != settings.eval_size:
            print(
                f"eval_size: {settings.eval_size} -> {size} pixels, a multiple of the {segmenter.backbone.patch}-pixel patch"
            )
    for note in dataset.notes:
        print(f"data       {note}")
    options = FeatureOptions(
        size=size,
        resample=settings.resample,
        argument="--eval-size",
        cache=config.cache,
        limit=None if config.cache_limit is None else parse_size(config.cache_limit, "--cache-limit"),
        processes=processes,
    )
    require_room(dataset, segmenter.backbone, options, stores=1 + config.mirror)
    store = open_or_extract(dataset, segmenter.backbone, options)
    mirrored = open_or_extract(dataset, segmenter.backbone, replace(options, mirror=True)) if config.mirror else None
    if mirrored is not None:
        require_same_rows(store, mirrored)
    labels = LabelSquares(dataset, store, size, processes)
    codes = head_codes(segmenter.head, store, mirrored)
    counts = confusion_of(codes, segmenter.head.teacher, store.grid, labels, len(names))
    if not processes.first:
        return

    matched = {"hungarian": hungarian(counts), "majority": majority(counts)}
    out = Path(config.out) if config.out else Path(config.checkpoint).parent / "evaluation"
    summary = {
        "checkpoint": config.checkpoint,
        "data": dataset.name,
        "held_out": dataset.held_out,
        "preset": config.preset,
        "images": len(store),
        "skipped": store.skipped,
        "size": size,
        "mirror": config.mirror,
        **{name: scores.as_dict(names) for name, scores in matched.items()},
        "confusion": counts.tolist(),
    }
    write_json(out / "scores.json", summary)
    pictures.save(out / "confusion.png", charts.confusion_picture(counts, matched["hungarian"], names))
    print(table(matched, names))
    print(
        f"\n{len(store)} images of {dataset.name}, {matched['hungarian'].pixels:,} labelled pixels at {size} px, "
        f"{'mirror averaged' if config.mirror else 'no mirror'}; {segmenter.groups} groups, {len(names)} classes"
        + (f"; {len(store.skipped)} images could not be used" if store.skipped else "")
    )
    print(
        "both mappings from groups to classes are chosen by these labels: hungarian one to one (the field's), majority many to one"
    )
    print(
        f"accuracy {percent(matched['hungarian'].accuracy)} %  mIoU {percent(matched['hungarian'].miou)} %  (hungarian)"
    )
    print(f"saved {out / 'scores.json'}, {out / 'confusion.png'}")


def labelled_images(data: str | None, checkpoint: Checkpoint) -> Dataset:
    """The held-out images of the folder `data`, or without it those of the demo. UserError when they, or their labels, are not there."""
    if data is None:
        config = checkpoint.config
        # arrays given to `fit` have no folder either, but they have no classes
        if config.preset != "demo" or config.data is not None or checkpoint.class_names is None:
            raise UserError(
                "--data: missing; the checkpoint is not of the demo: give a folder with images/ and labels/"
            )
        return demo_datasets()[1]
    dataset = open_dataset(data, "val")
    if not dataset.labelled:
        why = "".join(f" ({note})" for note in dataset.notes)
        raise UserError(
            f"--data {data}: has no labels{why}; evaluation needs DIR/images and DIR/labels, smooseg_fast.predict needs none"
        )
    return dataset


def protocol(name: str, data: str | None) -> TrainConfig:
    """The preset `name`. UserError when `data` is recognised as the dataset of another."""
    settings = preset(name)
    layout = None if data is None else recognise(data)
    if layout is not None and layout.preset != name:
        raise UserError(f"--preset {name}: but {data} is {layout.title}; give --preset {layout.preset}")
    return settings


if __name__ == "__main__":
    sys.exit(run(main, together=True))
