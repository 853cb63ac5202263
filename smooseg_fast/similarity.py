"""`smooseg similarity`: measure how alike the patches of a folder are, and what thresholds make of it, before any
training."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .command import run
from .config import (
    AUTO,
    Backbone,
    Crops,
    Device,
    Folder,
    PresetName,
    Resample,
    Side,
    TrainConfig,
    distinct,
    legal_scales,
    preset,
    with_changes,
)
from .errors import UserError
from .system.commandline import command_line, parse
from .system.fields import Bounds, Group, Value, flag
from .system.files import write_json
from .system.outfolder import mark_as_ours
from .system.readingflags import Bands, Intensity, Pages

PICTURE, RECORD = "similarity.png", "similarity.json"
SQUARES = ("size", "crops", "scale", "margin", "resample")
LEARNING = ("backbone", *SQUARES, "intensity", "bands", "pages", "granularity", "threshold_within", "threshold_across")


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """Measure the closeness of patch pairs within images and across them: mean, spread, histograms, and the shares that
    thresholds pull together and push apart. Nothing is learnt.

    Thresholds are those that are given, else those of --checkpoint, else those of --preset.
    """

    data: Annotated[str | None, Group("data"), Value("FOLDER", usual=True, stores=True)] = None
    """Folder of images in any nesting, as for training [that of the checkpoint; without one, the embedded demo]."""
    checkpoint: Annotated[str | None, Value("FILE")] = None
    """A checkpoint.safetensors that training wrote: take its features and its thresholds."""
    preset: PresetName | None = None
    """Settings to start from [folder with --data, demo without]."""
    size: Side | None = None
    """Short side in pixels; images are cut into squares of this side. By default, what suits the backbone."""
    crops: Crops | None = None
    """slide cuts squares along the long side, center the middle square alone, five the corners and the centre at half
    height and width, tiles a grid over the whole image."""
    scale: Annotated[tuple[str, ...] | None, Value("SCALE"), legal_scales] = None
    """fit, native, or one or several factors, as for training."""
    margin: Annotated[int | None, Bounds(0, 4096, " pixels")] = None
    """Pixels of context on every side of a square, as for training."""
    resample: Resample | None = None
    """How images are resized."""
    intensity: Intensity | None = None
    """Values that become black and white in images of more than 8 bits, as for training: data, image, or LOW HIGH."""
    bands: Bands | None = None
    """Bands to show as red, green and blue, or one as grey, as for training."""
    pages: Pages | None = None
    """Page of a stack to read, or all, as for training."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Frozen features, as for training: smooseg backbones lists them [those of the checkpoint or the preset]."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""

    granularity: Annotated[tuple[float, ...] | None, Group("thresholds and pairs"), distinct] = None
    """Thresholds as an excess over the measured means, one or several."""
    threshold_within: float | None = None
    """Closeness above which patches of the same image pull together; needs --threshold-across."""
    threshold_across: float | None = None
    """Closeness above which patches of different images pull together; needs --threshold-within."""
    pairs: Annotated[int, Bounds(1)] = 1_000_000_000
    """Maximum number of patch pairs of each kind to count: beyond it, squares drawn at random stand for all. Means are
    exact anyway."""

    out: Annotated[Folder | None, Group("output")] = None
    """Folder for similarity.png and similarity.json [similarity next to the checkpoint, else runs/NAME/similarity]."""


def main(args: Sequence[str]) -> None:
    asked = parse(SimilarityConfig, args, "similarity")
    request = configure(asked)
    from .backbones import load_backbone
    from .backbones.auto import candidates, explained, look
    from .datasets.demo import datasets_of
    from .datasets.images import whole_patches
    from .datasets.inspection import is_grey
    from .features.extract import open_or_extract
    from .features.job import FeatureOptions
    from .measure.closeness import closeness, similarity, warning
    from .segment.segmenter import pick_device
    from .show.closeness import closeness_picture, closeness_record, spread_table, thresholds_table
    from .show.pictures import save

    dataset, _ = datasets_of(request)
    name = request.backbone
    if name == AUTO:
        here = look()
        best = candidates(here, is_grey(dataset))[0]
        print("\n".join(explained(best, here)))
        name = best.name
    backbone = load_backbone(name, pick_device(asked.device))
    suits = request.size or backbone.sizes[0]
    size = whole_patches(suits, backbone.patch)
    if size != suits:
        print(f"size: {suits} -> {size} pixels, a multiple of the backbone's {backbone.patch}-pixel patch")
    config = dataclasses.replace(request, backbone=name, size=size, crops=request.grid_crops)
    how = f"backbone {config.backbone}, {size} px, crops {config.crops}, scale {' '.join(config.scale)}"
    print(f"smooseg_fast: {dataset.name} ({len(dataset)} images), {how}")
    for note in dataset.notes:
        print(f"data       {note}")
    squares = {name: getattr(config, name) for name in SQUARES}
    options = FeatureOptions(**squares, cache=asked.cache)
    store = open_or_extract(dataset, backbone, options)
    if len(store) < 2:
        more = "add images, or --crops slide"
        raise UserError(f"--data: {len(store)} square of {size} pixels, but pairs of images need 2; {more}")
    found = similarity(store, backbone.device, largest=asked.pairs)
    rows = [(variant, closeness(found, variant.thresholds)) for variant in config.variants()]
    print(spread_table(found))
    print(found.line())
    print()
    print(thresholds_table(rows))
    trouble = None if config.granularity is not None else warning(*rows[0][1])
    if trouble:
        print(f"warning    {trouble}")
    out = folder(asked, config)
    mark_as_ours(out, PICTURE)
    title = f"Closeness of patches: {dataset.name}, {backbone.name}"
    save(out / PICTURE, closeness_picture(found, rows, title))
    about = {"data": dataset.name, "backbone": backbone.name, **squares, "skipped": store.skipped}
    write_json(out / RECORD, closeness_record(found, rows) | about)
    print(f"saved      {out / PICTURE}, {out / RECORD}")
    print("next       " + next_command(asked, request))


def configure(asked: SimilarityConfig) -> TrainConfig:
    """The run that would learn from this data: the settings of a checkpoint or a preset, changed by those in
    `asked`."""
    from .segment.checkpoint import read_checkpoint

    given = {name: value for name in LEARNING if (value := getattr(asked, name)) is not None}
    if asked.checkpoint is None:
        base = preset(asked.preset or ("folder" if asked.data else "demo"))
    elif asked.preset is not None:
        raise UserError("--preset: a checkpoint has its own settings; leave out either it or --checkpoint")
    else:
        checkpoint = read_checkpoint(asked.checkpoint)
        name = checkpoint.backbone_name
        if asked.backbone is None and ":" in name:
            raise UserError(f"--backbone: missing; a checkpoint never imports code by itself: add --backbone {name}")
        base, given = dataclasses.replace(checkpoint.config, heads=1), {"backbone": name} | given
    data = asked.data or base.data
    if data is None and base.preset != "demo":
        raise UserError(f"--data: missing; preset {base.preset} needs a folder of images (the demo is --preset demo)")
    return with_changes(base, data=data, **given)


def folder(asked: SimilarityConfig, config: TrainConfig) -> Path:
    """Return the folder of the outputs."""
    if asked.out:
        return Path(asked.out).expanduser()
    if asked.checkpoint:
        return Path(asked.checkpoint).expanduser().parent / "similarity"
    return Path("runs") / (Path(config.data).resolve().name if config.data else "demo") / "similarity"


def next_command(asked: SimilarityConfig, config: TrainConfig) -> str:
    """Training with these settings; flags that equal the preset's are left out."""
    words = [] if config.preset in ("folder", "demo") else ["--preset", config.preset]
    words += [] if config.data is None else ["--data", config.data]
    base = preset(config.preset)
    for name in LEARNING:
        value = getattr(config, name)
        if value is not None and value != getattr(base, name):
            values = value if isinstance(value, tuple) else (value,)
            words += [flag(name), *(f"{v:g}" if isinstance(v, float) else f"{v}" for v in values)]
    words += [] if asked.cache is None else ["--cache", asked.cache]
    return command_line("train", *words)


if __name__ == "__main__":
    sys.exit(run(main))
