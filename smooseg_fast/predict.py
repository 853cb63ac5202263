"""`smooseg predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .command import end, load_segmenter, run
from .config import FIT, GROUPS, Backbone, BackbonePrecision, Device, Refine, Shifts, distinct, legal_scales
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.readingflags import Bands, Intensity, Pages
from .system.signals import Interrupted

if TYPE_CHECKING:
    from .segment.segmenter import Segmenter
    from .show.predictions import Item, Outcome, Predictions, Shares
    from .system.processes import Processes


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint. The same command on the same --out resumes where it was stopped."""

    images: Annotated[str, Group("data"), Value("PATH", usual=True)]
    """An image, or a folder of images in any nesting."""
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

    out: Annotated[str, Group("output"), Value("FOLDER")]
    """Folder for masks/ (8-bit palette PNG of the image's own size), overlays/ (at most 16 megapixels), shares.json and
    sheet.jpg, all of one checkpoint."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    config = parse(PredictConfig, args, "predict")
    from .segment.segmenter import pick_device
    from .show.predictions import Predictions, items_below, look_at, segment
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
    root, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    with announced(f"listing    the images in {root}"):
        items = items_below(root) if processes.first else []
    read = segmenter.checkpoint.reading.changed(config.intensity, config.bands, config.pages)
    items, read = processes.all(look_at(items, read) if processes.first else ([], read))[0]
    for cut in cuts:
        cut.checkpoint.reading = read
    folders = {
        cut.groups: Predictions(folder_of(out, cut.groups, many=bool(others)), settings(config, cut), processes)
        for cut in cuts
    }
    with ExitStack() as stack:
        for folder in folders.values():
            stack.enter_context(folder.claimed())
        with announced(f"checking   which of {len(items)} images are done"):
            done = [folder.done(items) if processes.first else {} for folder in folders.values()]
        items, done = processes.all((items, done))[0]
        for folder, names in zip(folders.values(), done):
            if names:
                where = f"in {folder.path}, by this checkpoint and with these settings"
                print(f"{len(names)} of {len(items)} images are done {where}")
        names = ("mirror", "shifts", "short_side", "scale", "refine")
        options = {name: getattr(config, name) for name in names}
        outcome = segment(segmenter, items, folders, done, **options)
        if processes.first:
            finish(config, cuts, items, list(folders.values()), outcome)


def folder_of(out: Path, groups: int, many: bool) -> Path:
    """Where the masks of a number of groups go: `out`, or a folder in it where there are several numbers."""
    return out / f"groups_{groups}" if many else out


def settings(config: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """Everything that decides the labels of an image."""
    cutting = segmenter.cutting(config.scale, config.short_side)
    return {
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
) -> None:
    """Write the shares and the sheet of all images that are done, at each number of groups, and say how it went."""
    from .show.predictions import MASKS, OVERLAYS, SHARES, SHEET

    skipped = {item.name: outcome.skipped[item.name].reason for item in items if item.name in outcome.skipped}
    done = [item for item in items if any(item.name in shares for shares in outcome.shares)]
    if not done and outcome.signal is not None:
        raise Interrupted(outcome.signal, "no image was done yet")
    if not done:
        name, reason = next(iter(skipped.items()))
        raise UserError(
            f"--images {Path(config.images).expanduser()}: none of the {len(items)} images can be used "
            f"(first: {name}: {reason}); give images that open"
        )
    for segmenter, folder, shares in zip(cuts, folders, outcome.shares):
        model = {"checkpoint": config.checkpoint, **segmenter.about()}
        more = {"skipped": skipped, "model": model}
        write_summary(folder, segmenter, items, shares, more)
    count = f"{len(done)} of {len(items)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if outcome.signal is not None:
        raise Interrupted(outcome.signal, f"{count} are done, in {Path(config.out).expanduser()}")
    print(f"segmented {count}")
    for folder in folders:
        out = folder.path
        print(f"masks {out / MASKS}, overlays {out / OVERLAYS}, shares of each group {out / SHARES}")
        print(f"look at {out / SHEET}")


def write_summary(
    folder: Predictions,
    segmenter: Segmenter,
    items: Sequence[Item],
    shares: Mapping[str, Shares],
    more: Mapping[str, Any],
) -> None:
    """Write the shares of all images that are done, and their sheet; none where a stop came before the first image."""
    from .show.predictions import SHARES, draw_sheet, mean_shares
    from .system.progress import announced

    images = {item.name: shares[item.name] for item in items if item.name in shares}
    if images:
        mean = mean_shares(images.values())
        write_json(folder.path / SHARES, {"groups": segmenter.groups, "mean": mean, "images": images, **more})
        with announced("drawing    the sheet"):
            draw_sheet(folder, [item for item in items if item.name in images], mean, segmenter.checkpoint.reading)


if __name__ == "__main__":
    sys.exit(end(run(main)))
