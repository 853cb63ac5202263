"""`smooseg backbones`: list the frozen features that are on this machine and those that could be."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .command import run
from .config import Backbone as BackboneName
from .config import Device
from .errors import UserError
from .system.commandline import parse

if TYPE_CHECKING:
    from .backbones import Backbone
    from .backbones.catalogue import Entry

MEASURED_S = 1.0  # for each backbone, after a first batch
SQUARES = 4  # at once: as many as the smallest runs have
HEAD = ("", "patch", "channels", "MB", "images/s", "colour / grey", "licence", "good for")


@dataclass(frozen=True, kw_only=True)
class BackbonesConfig:
    """List the frozen features that are on this machine and those that could be, and the command that gets each.

    images/s is measured here, at the training size that suits the features. colour / grey is the mean mIoU in % that
    they reach without training on sets of colour images and of grey ones (docs/guide.md).
    """

    check: BackboneName | None = None
    """Load one backbone, given as for --backbone, and print what it is, with the digest of its weights, instead of the
    list. The digest is the same wherever the copy is sound, and in whatever layout the weights lie."""
    measure: bool = True
    """Leave the column images/s empty; measuring takes some seconds for each that is here."""
    device: Device = "auto"
    """Device to measure on: cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""


def main(args: Sequence[str]) -> None:
    config = parse(BackbonesConfig, args, "backbones")
    if config.check is not None:
        return check(config.check, config.device, config.measure)
    from .backbones.auto import candidates, explained, look
    from .backbones.catalogue import CATALOGUE, how_to_get
    from .system.table import aligned

    here = look()
    present = [entry for entry in CATALOGUE if here.has(entry.name)]
    missing = [entry for entry in CATALOGUE if not here.has(entry.name)]
    speeds = measured(present, config.device) if config.measure else {}
    head, *lines = aligned([HEAD, *(row(entry, speeds) for entry in (*present, *missing))], (0, 6, 7)).splitlines()
    print("\n".join([f"here{head[4:]}", *lines[: len(present)], ""]))
    if missing:
        print("\n".join(["not here", *lines[len(present) :], ""]))
        for steps in dict.fromkeys(how_to_get(entry, here.transformers) for entry in missing):
            names = [entry.name for entry in missing if how_to_get(entry, here.transformers) == steps]
            print(f"get        {', '.join(names)}:\n           {steps}")
        print("           without a network: docs/offline.md tells which files to bring, and how to check them\n")
    photos, grey = (candidates(here, grey)[0] for grey in (False, True))
    others = "" if grey.name == photos.name else f"; for grey images {grey.name}"
    print(f"auto       {explained(photos, here)[0].removeprefix('backbone').strip()}{others}")


def check(name: str, device: str, measure: bool) -> None:
    """Print what the backbone `name` is. UserError when it cannot be loaded."""
    from .backbones import load_backbone
    from .segment.segmenter import pick_device

    backbone = load_backbone(name, pick_device(device))
    print(f"backbone   {name}: patches of {backbone.patch} pixels, {backbone.dim} channels, in {backbone.precision}")
    print(f"licence    {backbone.licence}")
    print(f"digest     {backbone.digest}")
    if measure:
        speed = images_a_second(backbone)
        print(f"speed      {speed:.3g} images a second of {backbone.sizes[0]} pixels on {backbone.device}")


def row(entry: Entry, speeds: Mapping[str, str]) -> tuple[str, ...]:
    megabytes = str(entry.megabytes or "-")
    score = "-" if entry.scores is None else " / ".join(f"{score:.1f}" for score in entry.scores)
    numbers = (str(entry.patch), str(entry.channels), megabytes, speeds.get(entry.name, "-"), score)
    return entry.name, *numbers, entry.licence, entry.good_for


def measured(entries: Iterable[Entry], device: str) -> dict[str, str]:
    """Images a second of each, in words; "fails" for one that cannot be loaded, with the reason on stderr."""
    from .backbones import load_backbone
    from .segment.segmenter import pick_device
    from .system.progress import say

    speeds = {}
    for entry in entries:
        say(f"measuring  {entry.name}")
        try:
            speeds[entry.name] = f"{images_a_second(load_backbone(entry.name, pick_device(device))):.3g}"
        except UserError as error:
            say(f"warning    {error}")
            speeds[entry.name] = "fails"
    return speeds


def images_a_second(backbone: Backbone) -> float:
    """Squares of its training size that `backbone` takes in a second, without reading and cutting images."""
    import torch

    from .datasets.images import whole_patches

    side = whole_patches(backbone.sizes[0], backbone.patch)
    squares = torch.randint(0, 256, (SQUARES, 3, side, side), dtype=torch.uint8)
    backbone(squares)[0].cpu()  # the first batch also loads kernels and takes memory
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < MEASURED_S:
        backbone(squares)[0].cpu()
        count += SQUARES
    return count / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run(main))
