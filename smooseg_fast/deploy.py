"""`smooseg deploy`: a checkpoint and its backbone as one network for other programs, ONNX or torch.export."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from .command import load_segmenter, run
from .config import GROUPS, Backbone
from .system.commandline import parse
from .system.fields import Bounds, Value


@dataclass(frozen=True, kw_only=True)
class DeployConfig:
    """Write a checkpoint with its backbone as one network that other programs run without smooseg, at any batch and
    size.

    The network takes RGB images float32 [B,3,H,W] in 0..1 with sides that are multiples of the backbone's patch (of two
    patches for efficientnet-lite0) and at least twice as long, and gives labels uint8 [B,H,W] and scores
    [B,groups,H/patch,W/patch]. Before the file appears it is run and compared with PyTorch. An input and its outputs
    lie next to it, for the program that will run it.
    """

    checkpoint: Annotated[str, Value("FILE")]
    """The checkpoint.safetensors that training wrote, or a published SmooSeg .ckpt."""
    format: Annotated[Literal["onnx", "pt2"], Value("FORMAT")] = "onnx"
    """onnx, for ONNX Runtime and others (needs the extra onnx), or pt2, a program of torch.export."""
    groups: Annotated[int | None, Bounds(1, GROUPS)] = None
    """Number of groups, looked up in the tree [the number that training or smooseg choose settled on]."""
    backbone: Backbone | None = None
    """Needed when the checkpoint was trained on a module:callable [the one that the checkpoint names]."""
    out: Annotated[str, Value("FILE")]
    """The file to write; its check is written next to it, as NAME.check.npz."""


def main(args: Sequence[str]) -> None:
    config = parse(DeployConfig, args, "deploy")
    from .segment.deployed import deploy, least_side, multiple_of
    from .system.progress import announced

    segmenter = load_segmenter(config.checkpoint, config.backbone, "cpu", "auto", groups=config.groups, exact=True)
    multiple, count = multiple_of(segmenter), len(segmenter.groups)
    with announced(f"exporting  {segmenter.backbone.name} and {count} groups, then comparing with PyTorch"):
        check, difference = deploy(segmenter, Path(config.out).expanduser(), config.format)
    sides = f"H and W multiples of {multiple}, at least {least_side(segmenter)}"
    print(f"network    {count} groups; images [B,3,H,W] of 0..1, {sides}")
    print(f"compared   scores differ from PyTorch's by at most {difference:.1e}")
    print(f"written    {Path(config.out).expanduser()}, and an input with its outputs: {check}")


if __name__ == "__main__":
    sys.exit(run(main))
