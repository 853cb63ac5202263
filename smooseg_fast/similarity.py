"""`python -m smooseg_fast.similarity`: how alike the patches of a folder are, and what thresholds make of it, before any training."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from .backbones import load_backbone
from .command import parse, run
from .config import TrainConfig, Variant, preset, with_changes
from .datasets.demo import datasets_of
from .errors import UserError
from .features.extract import open_or_extract
from .features.job import FeatureOptions
from .measure.closeness import BINS, Closeness, Similarity, closeness, similarity, warning
from .segment.checkpoint import read_checkpoint
from .segment.segmenter import pick_device
from .show.histograms import Histogram, histograms_picture
from .show.pictures import save
from .system.files import write_json

SHARES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
PICTURE, RECORD = "similarity.png", "similarity.json"
LEARNING = ("backbone", "size", "crops", "resample", "granularity", "threshold_within", "threshold_across")


@dataclass(frozen=True, kw_only=True)
class SimilarityConfig:
    """Closeness W of patch pairs within images and across them: mean, spread, histograms, and the shares that thresholds pull and push.

    Nothing is learnt. Thresholds are those named, else those of --checkpoint, else those of --preset.
    """

    data: str | None = None
    """Folder of images in any nesting, as for training [that of the checkpoint; without one, the embedded demo]."""
    checkpoint: str | None = None
    """A checkpoint.safetensors that training wrote: its features and its thresholds."""
    preset: str | None = None
    """What the settings below are where nothing else says so [folder with --data, demo without]."""
    backbone: str | None = None
    """Frozen features: filterbank, a transformers ViT by hub name or folder, a DINO or DINOv2 .pth, or module:callable."""
    size: int | None = None
    """Pixels of the short side; squares of this side are cut."""
    crops: str | None = None
    """slide: squares along the long side. center: the middle square alone. five: the corners and the centre at half height and width."""
    resample: str | None = None
    """nearest or bilinear."""
    granularity: tuple[float, ...] | None = None
    """Thresholds as an excess over the measured means, one or several."""
    threshold_within: float | None = None
    """Closeness above which patches of one image pull together; goes with --threshold-across."""
    threshold_across: float | None = None
    """The same for patches of different images."""
    pairs: int = 1_000_000_000
    """Patch pairs of each kind that are counted at most: beyond it squares drawn at random stand for all. Means are exact anyway."""
    partners: int = 1
    """How many others, drawn at random, each square is paired with across."""
    out: str | None = None
    """Folder for similarity.png and similarity.json [similarity beside the checkpoint, else runs/NAME/similarity]."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps or auto."""
    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""


def main(args: Sequence[str]) -> None:
    asked = parse(SimilarityConfig, args, prog="python -m smooseg_fast.similarity")
    for name, lowest in (("pairs", 1), ("partners", 1)):
        if getattr(asked, name) < lowest:
            raise UserError(f"--{name}: must be at least {lowest}, got {getattr(asked, name)}")
    if asked.partners > 15:
        raise UserError(f"--partners: must be at most 15, got {asked.partners}; squares are looked at 16 at a time")
    config = configure(asked)
    backbone = load_backbone(config.backbone, pick_device(asked.device))
    config = whole_patches(config, backbone.patch)
    dataset, _ = datasets_of(config)
    print(
        f"smooseg_fast: {dataset.name} ({len(dataset)} images), backbone {config.backbone}, {config.size} px, crops {config.crops}"
    )
    options = FeatureOptions(size=config.size, crops=config.crops, resample=config.resample, cache=asked.cache)
    store = open_or_extract(dataset, backbone, options)
    if len(store) < 2:
        raise UserError(
            f"--data: {len(store)} square of {config.size} pixels, but pairs of images need 2; add images, or --crops slide"
        )
    found = similarity(store, backbone.device, largest=asked.pairs, partners=asked.partners)
    rows = [(variant, closeness(found, variant.thresholds, config.relative)) for variant in config.variants()]
    print(table(found))
    print(found.line())
    print()
    print(thresholds_table(rows))
    trouble = None if config.relative else warning(*rows[0][1])
    if trouble:
        print(f"warning    {trouble}")
    out = folder(asked, config)
    about = {
        "data": dataset.name,
        "backbone": backbone.name,
        **{name: getattr(config, name) for name in ("size", "crops", "resample")},
    }
    save(out / PICTURE, picture(found, rows, f"Closeness of patches: {dataset.name}, {backbone.name}"))
    write_json(out / RECORD, record(found, rows) | about | {"skipped": store.skipped})
    print(f"saved      {out / PICTURE}, {out / RECORD}")
    print("next       " + next_command(asked, config))


def configure(asked: SimilarityConfig) -> TrainConfig:
    """The run that would learn from what is looked at: a checkpoint's or a preset's settings with those in `asked` laid over them."""
    named = {name: value for name in LEARNING if (value := getattr(asked, name)) is not None}
    if asked.checkpoint is not None:
        if asked.preset is not None:
            raise UserError("--preset: a checkpoint has its own settings; leave out either it or --checkpoint")
        found = read_checkpoint(asked.checkpoint)
        if asked.backbone is None and ":" in found.backbone_name:
            raise UserError(
                f"--backbone: missing; {asked.checkpoint} was trained on {found.backbone_name}, and a checkpoint never imports code by "
                f"itself: add --backbone {found.backbone_name}"
            )
        base, named = dataclasses.replace(found.config, heads=1), {"backbone": found.backbone_name} | named
        data = asked.data or base.data
        if data is None and base.preset != "demo":
            raise UserError("--data: missing; the checkpoint was trained on arrays: give a folder of images")
    else:
        base, data = preset(asked.preset or ("folder" if asked.data else "demo")), asked.data
        if data is None and base.preset != "demo":
            raise UserError(
                f"--data: missing; preset {base.preset} needs a folder of images (the demo is --preset demo)"
            )
    return with_changes(base, data=data, **named)


def whole_patches(config: TrainConfig, patch: int) -> TrainConfig:
    """Its size brought to whole patches of the backbone, as training does."""
    whole = max(1, round(config.size / patch)) * patch
    if whole != config.size:
        print(f"size: {config.size} -> {whole} pixels, a multiple of the backbone's {patch}-pixel patch")
    return dataclasses.replace(config, size=whole)


def folder(asked: SimilarityConfig, config: TrainConfig) -> Path:
    if asked.out:
        return Path(asked.out).expanduser()
    if asked.checkpoint:
        return Path(asked.checkpoint).expanduser().parent / "similarity"
    return Path("runs") / (Path(config.data).resolve().name if config.data else "demo") / "similarity"


def table(found: Similarity) -> str:
    head = ["", "mean", "std", *(f"{100 * q:g} %" for q in SHARES)]
    body = [
        [
            f"{name} images",
            f"{kind.mean:+.3f}",
            f"{kind.std:.3f}",
            *(f"{value:+.3f}" for value in kind.quantiles(SHARES)),
        ]
        for name, kind in (("within", found.within), ("across", found.across))
    ]
    return aligned([head, *body])


def thresholds_table(rows: Sequence[tuple[Variant, tuple[Closeness, Closeness]]]) -> str:
    """What each threshold pulls together (W above it) and pushes apart, in % of the pairs."""
    head = ["thresholds", "within", "pulls", "pushes", "net force", "across", "pulls", "pushes", "net force"]
    body = [[name_of(variant), *(cell for kind in kinds for cell in cells(kind))] for variant, kinds in rows]
    return aligned([head, *body])


def cells(kind: Closeness) -> list[str]:
    return [
        f"{kind.threshold:+.3f}",
        f"{100 * kind.pulled:.1f} %",
        f"{100 * (1 - kind.pulled):.1f} %",
        f"{kind.force:+.3f}",
    ]


def name_of(variant: Variant) -> str:
    return "threshold" if variant.granularity is None else f"granularity {variant.granularity:g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    )


def picture(found: Similarity, rows: Sequence[tuple[Variant, tuple[Closeness, Closeness]]], title: str) -> Image:
    panels = {}
    for place, (name, kind) in enumerate((("within images", found.within), ("across images", found.across))):
        marks = {
            f"{name_of(variant)}: {kinds[place].threshold:+.3f} pulls {100 * kinds[place].pulled:.0f} %": kinds[
                place
            ].threshold
            for variant, kinds in rows
        }
        panels[f"{name}: {kind.pairs / 1e6:.3g} million pairs"] = Histogram(
            edges_of(kind), kind.counts.tolist(), kind.mean, marks
        )
    return histograms_picture(
        panels, title, "pairs right of a threshold are pulled together, those left of it pushed apart"
    )


def edges_of(kind: Any) -> list[float]:
    return torch.linspace(*kind.limits, BINS + 1, dtype=torch.float64).tolist()


def record(found: Similarity, rows: Sequence[tuple[Variant, tuple[Closeness, Closeness]]]) -> dict[str, Any]:
    """Ready for JSON."""
    kinds = {
        name: {
            "mean": kind.mean,
            "std": kind.std,
            "quantiles": dict(zip(map(str, SHARES), kind.quantiles(SHARES))),
            "pairs": kind.pairs,
            "histogram": {"low": kind.limits[0], "high": kind.limits[1], "counts": kind.counts.tolist()},
        }
        for name, kind in (("within", found.within), ("across", found.across))
    }
    thresholds = [
        {"name": name_of(variant)}
        | {
            name: {"threshold": kind.threshold, "pulled": kind.pulled, "net_force": kind.force}
            for name, kind in zip(kinds, both)
        }
        for variant, both in rows
    ]
    counted = {"squares": found.squares, "squares_counted": found.counted, "partners": found.partners}
    return {**counted, **kinds, "thresholds": thresholds}


def next_command(asked: SimilarityConfig, config: TrainConfig) -> str:
    """Training with what was looked at; only what was named has to be named again."""
    words = ["python", "-m", "smooseg_fast.train"]
    if config.preset not in ("folder", "demo"):
        words += ["--preset", config.preset]
    if config.data is not None:
        words += ["--data", config.data]
    base = preset(config.preset)
    for name in LEARNING:
        value = getattr(config, name)
        if value is not None and value != getattr(base, name):
            words += [
                f"--{name.replace('_', '-')}",
                *([f"{v:g}" for v in value] if isinstance(value, tuple) else [f"{value}"]),
            ]
    if asked.cache is not None:
        words += ["--cache", asked.cache]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(run(main))
