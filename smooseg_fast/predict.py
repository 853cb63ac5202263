"""`smooseg predict`: masks, overlays, shares and a contact sheet for any image or folder of images."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .command import end, load_segmenter, run
from .config import FIT, GROUPS, Backbone, BackbonePrecision, Device, legal_scales
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Group, Value
from .system.files import write_json
from .system.signals import Interrupted

if TYPE_CHECKING:
    from .segment.segmenter import Segmenter
    from .show.predictions import Item, Outcome, Predictions
    from .system.processes import Processes


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Segment images of any size with a checkpoint. The same command on the same --out resumes where it was stopped."""

    images: Annotated[str, Group("data"), Value("PATH", usual=True)]
    """An image, or a folder of images in any nesting."""
    checkpoint: Annotated[str, Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    groups: Annotated[int | None, Bounds(1, GROUPS)] = None
    """Number of groups, looked up in the tree [the number that training or smooseg choose settled on]."""
    short_side: Annotated[int | None, Bounds(1, 1 << 16, " pixels")] = None
    """Size in pixels to which the short side of an image is brought before features are taken [the checkpoint's];
    larger sees finer detail."""
    scale: Annotated[tuple[str, ...] | None, Value("SCALE"), legal_scales] = None
    """Scale at which images are seen, as in training [the checkpoint's]: fit, native, or a factor of height and width;
    as many as the checkpoint was trained at. All but fit are segmented in tiles."""
    mirror: bool = True
    """Take each image once, which halves the time, instead of averaging its codes with those of its mirror image as the
    paper does."""

    backbone: Annotated[Backbone | None, Group("features")] = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone; auto takes one in which the device is fast."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""

    out: Annotated[str, Group("output"), Value("FOLDER")]
    """Folder for masks/ (8-bit palette PNG of the image's own size), overlays/ (at most 16 megapixels), shares.json and
    sheet.jpg, all of one checkpoint."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    config = parse(PredictConfig, args, "predict")
    from .segment.segmenter import pick_device
    from .show.predictions import Predictions, items_below, segment
    from .system.processes import ALONE
    from .system.progress import announced

    processes = processes or ALONE
    device = processes.device(pick_device(config.device))
    segmenter = load_segmenter(
        config.checkpoint, config.backbone, device, config.backbone_precision, groups=config.groups
    )
    root, out = Path(config.images).expanduser(), Path(config.out).expanduser()
    with announced(f"listing    the images in {root}"):
        items = items_below(root) if processes.first else []
    folder = Predictions(out, settings(config, segmenter), processes)
    with announced(f"checking   which of {len(items)} images are done"):
        done = {item.name: shares for item in items if (shares := folder.shares(item)) is not None}
    items, done = processes.all((items, done))[0]
    if done:
        print(f"{len(done)} of {len(items)} images are done in {out}, by this checkpoint and with these settings")
    with folder.claimed():
        options = {"mirror": config.mirror, "short_side": config.short_side, "scale": config.scale}
        outcome = segment(segmenter, items, done, folder, **options)
        if processes.first:
            finish(segmenter, config, items, folder, outcome)


def settings(config: PredictConfig, segmenter: Segmenter) -> dict[str, Any]:
    """Everything that decides the labels of an image."""
    cutting = segmenter.cutting(config.scale, config.short_side)
    return {
        "checkpoint": f"step {segmenter.checkpoint.step}, {segmenter.digest[:16]}",
        "backbone": segmenter.backbone.digest[:16],
        "mirror": config.mirror,
        "scale": list(cutting.scale),
        "short_side": cutting.size if cutting.scale == (FIT,) else None,
    }


def finish(
    segmenter: Segmenter, config: PredictConfig, items: Sequence[Item], folder: Predictions, outcome: Outcome
) -> None:
    """Write the shares and the sheet of all images that are done, and say how it went."""
    from .show.predictions import MASKS, OVERLAYS, SHARES, SHEET, draw_sheet, mean_shares
    from .system.progress import announced

    skipped = {item.name: outcome.skipped[item.name].reason for item in items if item.name in outcome.skipped}
    images = {item.name: outcome.shares[item.name] for item in items if item.name in outcome.shares}
    if not images and outcome.signal is not None:
        raise Interrupted(outcome.signal, "no image was done yet")
    if not images:
        name, reason = next(iter(skipped.items()))
        raise UserError(
            f"--images {Path(config.images).expanduser()}: none of the {len(items)} images can be used "
            f"(first: {name}: {reason}); give images that open"
        )
    out, mean = folder.path, mean_shares(images.values())
    model = {"checkpoint": config.checkpoint, **segmenter.about()}
    summary = {"groups": segmenter.groups, "mean": mean, "images": images, "skipped": skipped, "model": model}
    write_json(out / SHARES, summary)
    with announced("drawing    the sheet"):
        draw_sheet(folder, [item for item in items if item.name in images], mean)
    count = f"{len(images)} of {len(items)} images" + (f", {len(skipped)} could not be used" if skipped else "")
    if outcome.signal is not None:
        raise Interrupted(outcome.signal, f"{count} are done, in {out}")
    print(f"segmented {count}")
    print(f"masks {out / MASKS}, overlays {out / OVERLAYS}, shares of each group {out / SHARES}")
    print(f"look at {out / SHEET}")


if __name__ == "__main__":
    sys.exit(end(run(main)))
