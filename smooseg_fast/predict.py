"""`smooseg predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import sys
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

from .command import end, load_segmenter, run
from .config import FIT, GROUPS, Backbone, BackbonePrecision, Device, Refine, Shifts, distinct, legal_scales
from .errors import UserError
from .system.commandline import command_line, parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.readingflags import Bands, Intensity, Pages
from .system.signals import Interrupted
from .system.stores import File, place, require_local

if TYPE_CHECKING:
    from .segment.segmenter import Segmenter
    from .show.items import Item
    from .show.predictions import Outcome, Predictions, Shares
    from .system.processes import Processes


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint. The same command on the same --out resumes where it was stopped."""

    images: Annotated[str, Group("data"), Value("PATH", usual=True, stores=True)]
    """An image, or a folder of images in any nesting, on a disk or in a store (s3://, gs://, hf://, https://, zip://);
    or tar files, as in shard-{000..010}.tar."""
    checkpoint: Annotated[str, Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    groups: Annotated[tuple[int, ...] | None, Bounds(1, GROUPS), distinct] = None
    """Number of groups, looked up in the tree [the number that training or smooseg choose settled on]. Several, as in
    --groups 4 8 16, take one pass of the backbone, and each has a folder groups_N in --out."""
    short_side: Annotated[int | None, Bounds(1, 1 << 16, " pixels")] = None
    """Size in pixels to which the short side of an image is brought before features are taken [the checkpoint's];
    larger sees finer detail."""
    scale: Annotated[tuple[str, ...] | None, Value("SCALE"), legal_scales] = None
    """Scale at which images are seen, as in training [the checkpoint's]: fit, native, or a factor of height and width;
    as many as the checkpoint was trained at. All but fit are segmented in tiles."""
    intensity: Intensity | None = None
    """Values that become black and white, in images of more than 8 bits [the checkpoint's]: LOW HIGH; or data for one
    range for these images, or image for one for each."""
    bands: Bands | None = None
    """Bands to show as red, green and blue, e.g. 4 3 2, or one as grey [the checkpoint's]."""
    pages: Pages | None = None
    """Page of a stack (TIFF, WebP) to read; all segments every page [the checkpoint's]."""
    mirror: bool = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the
    paper does."""
    shifts: Shifts = 1
    """See each image 2 or 4 times, each time moved by half a patch, on a grid of half patches: finer borders, in as
    many times the time."""
    refine: Refine | None = None
    """How labels follow the edges of the image, at its own size: guided (guided filter, fast), joint (joint bilateral
    upsampling), crf (dense CRF as the paper has it), crf-exact (the same over all pairs of pixels; for a GPU), or
    none [guided; none for a published checkpoint]."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    upsampler: Annotated[str | None, Value("NAME")] = None
    """module:callable that refines features by the image: it takes features [1,h,w,D] and uint8 [H,W,3], and returns
    features [1,n*h,n*w,D]."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone; auto is float32 for a published checkpoint, else one in which the device is
    fast."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""

    out: Annotated[str, Group("output"), Value("FOLDER", stores=True)]
    """Folder for masks/ (8-bit palette PNG of the image's own size, and GeoTIFF of maps), overlays/ (at most 16
    megapixels), shares.json, groups.json (names and colours), manifest.csv, sheet.jpg and the page report.html, all of
    one checkpoint. A map that was stopped in the middle resumes there. In a store there is no page, a map that was
    stopped resumes on the same machine alone, and two commands must not write into one folder at once."""
    confidence: bool = False
    """Also write confidence/: how far the likeliest group leads the second at every pixel, 0 to 254 for 0 to 1, and 255
    where there is no data; PNG, or GeoTIFF of maps."""
    probabilities: bool = False
    """Also write probabilities/: how likely every group is at every pixel, in the same numbers; NPZ [height, width,
    groups], or GeoTIFF of maps with a band for each group."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    started, config = perf_counter(), parse(PredictConfig, args, "predict")
    if config.confidence or config.probabilities:
        require_local(config.out, "--out")
    from .segment.segmenter import pick_device
    from .show.items import items_below, look_at
    from .show.predictions import Predictions, segment
    from .show.report_tiles import TILES, Atlas, TileFile, Watched, allowance
    from .system.processes import ALONE
    from .system.progress import announced

    processes = processes or ALONE
    device = processes.device(pick_device(config.device))
    first, *others = config.groups or (None,)
    segmenter = load_segmenter(
        config.checkpoint,
        config.backbone,
        device,
        config.backbone_precision,
        groups=first,
        upsampler=config.upsampler,
    )
    cuts = [segmenter, *map(segmenter.at, others)]
    root, out = place(config.images), place(config.out)
    with announced(f"listing    the images in {root}"):
        items = items_below(root) if processes.first else []
    read = segmenter.checkpoint.reading.changed(config.intensity, config.bands, config.pages)
    items, read = processes.all(look_at(items, read) if processes.first else ([], read))[0]
    for cut in cuts:
        cut.checkpoint.reading = read
    if processes.first and config.scale is None and config.short_side is None:
        tell_of_scale(segmenter, items)
    folders = {
        len(cut.grouping): Predictions(
            folder_of(out, len(cut.grouping), many=bool(others)),
            settings(config, cut),
            processes,
            groups=cut.groups,
            merge=cut.names.merge,
            more=[kind for kind in ("confidence", "probabilities") if getattr(config, kind)],
        )
        for cut in cuts
    }
    watched = Watched(segmenter, [cut.grouping for cut in cuts])
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(folder.claimed())
        with announced(f"checking   which of {len(items)} images are done"):
            mine = items[processes.rank :: processes.size]
            parts = processes.all([folder.done(mine) for folder in folders.values()])
        done = [dict(ChainMap(*of_folder)) for of_folder in zip(*parts)]
        for cut, folder in zip(cuts, folders.values()):
            if isinstance(folder.path, Path):  # a page is opened from a disk
                folder.tiles = TileFile(folder.path / TILES, Atlas.of(cut), allowance(len(items)), watched)
                folder.tiles.open(processes.first, [item.name for item in items])
        processes.wait()
        for folder, names in zip(folders.values(), done):
            if names:
                where = f"in {folder.path}, by this checkpoint and with these settings"
                print(f"{len(names)} of {len(items)} images are done {where}")
        flags = ("mirror", "shifts", "short_side", "scale", "refine")
        options = {name: getattr(config, name) for name in flags}
        outcome = segment(watched, items, folders, done, **options)
        if processes.first:
            finish(config, cuts, items, list(folders.values()), outcome, lambda: perf_counter() - started)
            made = next(iter(folders.values())).path
            if isinstance(made, Path):
                form = "gpkg" if any(item.map for item in items) else "coco"
                print("next       " + command_line("export", "--predictions", str(made), "--format", form))


def tell_of_scale(segmenter: Segmenter, items: Sequence[Item]) -> None:
    """Say that maps are seen small where the checkpoint brings every image to one size."""
    cutting, maps = segmenter.cutting(), sum(item.map for item in items)
    if maps and cutting.scale == (FIT,):
        seen = f"note: {maps} of {len(items)} images are maps, whose short side is seen at {cutting.size} pixels"
        print(f"{seen}; --scale native sees their own, and a checkpoint trained so fits best", file=sys.stderr)


def folder_of(out: File, groups: int, many: bool) -> File:
    """Where the masks of a number of groups go: `out`, or a folder in it where there are several numbers."""
    return out / f"groups_{groups}" if many else out


def settings(config: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """Everything that decides the labels of an image."""
    cutting = segmenter.cutting(config.scale, config.short_side)
    return {
        "groups": len(segmenter.grouping),
        "checkpoint": f"step {segmenter.checkpoint.step}, {segmenter.digest[:16]}",
        "backbone": segmenter.backbone.digest[:16],
        "reading": str(segmenter.checkpoint.reading),
        "mirror": config.mirror,
        "shifts": config.shifts,
        "upsampler": None if segmenter.upsampler is None else segmenter.upsampler.digest[:16],
        "refine": segmenter.refinement(config.refine),
        "scale": list(cutting.scale),
        "short_side": cutting.size if cutting.scale == (FIT,) else None,
    }


def finish(
    config: PredictConfig,
    cuts: Sequence[Segmenter],
    items: Sequence[Item],
    folders: Sequence[Predictions],
    outcome: Outcome,
    clock: Callable[[], float],
) -> None:
    """Write the shares and the sheet of all images that are done, at each number of groups, and say how it went."""
    from .show.manifest import write_manifest
    from .show.predictions import MANIFEST, MASKS, OVERLAYS, SHARES, SHEET, SHEETS
    from .show.report import PAGE

    skipped = {item.name: outcome.skipped[item.name].reason for item in items if item.name in outcome.skipped}
    done = [item for item in items if any(item.name in shares for shares in outcome.shares)]
    kept = f"; the finished part of {' and '.join(outcome.under_way)} is kept" if outcome.under_way else ""
    if not done and outcome.signal is not None:
        raise Interrupted(outcome.signal, f"no image was done yet{kept}")
    if not done:
        name, reason = next(iter(skipped.items()))
        raise UserError(
            f"--images {place(config.images)}: none of the {len(items)} images can be used "
            f"(first: {name}: {reason}); give images that open"
        )
    ended = perf_counter()
    for segmenter, folder, shares in zip(cuts, folders, outcome.shares):
        model = {"checkpoint": config.checkpoint, **segmenter.about()}
        more = {"skipped": skipped, "model": model}
        write_summary(folder, segmenter, items, shares, more, clock)
        write_manifest(folder, items, outcome.skipped)
    count = f"{len(done)} of {len(items)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if outcome.signal is not None:
        raise Interrupted(outcome.signal, f"{count} are done, in {place(config.out)}{kept}")
    took = sum(folder.drawn_s for folder in folders) + perf_counter() - ended
    drawing = f"{took:.1f} s of it ({100 * took / clock():.0f} %) for overlays, sheets and page"
    print(f"segmented  {count}; took {clock():.1f} s, {drawing}")
    for folder in folders:
        out = folder.path
        print(f"masks      {out / MASKS}; {out / MANIFEST} has the mask, time or error of every image")
        print(f"shares     {out / SHARES}: how much of every image and of all is in each group")
        pages = f", {out / SHEETS}" if any(out.glob(f"{SHEETS}/*.jpg")) else ""
        print(f"look at    {out / SHEET}{pages}, {out / OVERLAYS}")
        if folder.tiles is not None:
            print(f"open       {out / PAGE} in a browser")


def write_summary(
    folder: Predictions,
    segmenter: Segmenter,
    items: Sequence[Item],
    shares: Mapping[str, Shares],
    more: Mapping[str, Any],
    clock: Callable[[], float],
) -> None:
    """Write the shares of all images that are done, and their sheet; none where a stop came before the first image."""
    from .segment.names import write_groups
    from .show.predictions import GROUPS, SHARES, draw_sheets, mean_shares
    from .show.report_folder import write_folder_page
    from .system.progress import announced

    images = {item.name: shares[item.name] for item in items if item.name in shares}
    if images:
        mean = mean_shares(images.values())
        write_json(folder.path / SHARES, {"groups": len(segmenter.groups), "mean": mean, "images": images, **more})
        listed = [replace(group, share=mean.get(str(group.number), 0.0)) for group in segmenter.groups]
        write_groups(folder.path / GROUPS, listed)
        shown = [item for item in items if item.name in images]
        with announced("drawing    the sheet"):
            draw_sheets(folder, shown, listed, segmenter.checkpoint.reading)
        if folder.tiles is not None:
            times = [("the command up to this page", clock())]
            with announced("writing    the page"):
                write_folder_page(folder, shown, segmenter.checkpoint.reading, times)


if __name__ == "__main__":
    sys.exit(end(run(main)))
