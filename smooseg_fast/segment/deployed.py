"""A segmenter as one network that other programs run: ONNX, or a program of torch.export, at any batch and size.

The network takes images float32 [B,3,H,W] in 0..1, H and W multiples of `multiple_of` and at least twice it, and gives
`labels` uint8 [B,H,W], the numbers of a mask, which `Segmenter.predict` gives without mirroring, refinement and tiles,
and `scores` float32 [B,N,H/patch,W/patch]: the best cosine of a patch in each of the N groups, in the order of their
numbers. Pixels are normalised inside. The caller brings an image to the scale of training, which the description tells.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smooseg_kernels.rows import inverse_norms, unit_rows

from ..backbones.base import reason
from ..backbones.catalogue import LITE
from ..errors import UserError
from ..system.files import write_atomic
from .model import project
from .segmenter import Segmenter

INPUTS, OUTPUTS = ["images"], ["labels", "scores"]
PARITY = 1e-4  # by which scores may differ at most, and the share of labels that may, where two groups tie
# images, and rows and columns of `multiple_of`, that are compared; the first travel with the file
CASES = ((1, 2, 3), (3, 5, 4), (2, 4, 4))
OTHER = "update PyTorch and the packages of the extra onnx, or give the other format"
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
INSTALL = "pip install 'smooseg_fast[onnx]'"

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # images -> labels and probabilities


class Network(nn.Module):
    """Backbone, head, cut of the tree and merges of a segmenter, as one module."""

    directions: Tensor
    numbers: Tensor

    def __init__(self, segmenter: Segmenter):
        super().__init__()
        self.head, backbone, names = segmenter.head, segmenter.backbone, segmenter.names
        self._extract, self._patch = backbone.extract, backbone.patch
        self.model = getattr(backbone, "model", None)  # so that its weights become those of this module
        cut = np.arange(names.groups) if segmenter.grouping.groups is None else segmenter.grouping.groups
        self._plain = segmenter.grouping.groups is None
        self._parts = [np.flatnonzero(cut == k).tolist() for k in range(names.groups)]
        self._merged = [np.flatnonzero(names.table[: names.groups] == number).tolist() for number in names.numbers]
        self.register_buffer("directions", unit_rows(self.head.teacher.float()))
        self.register_buffer("numbers", torch.from_numpy(names.table[: names.groups].copy()))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        grid = images.shape[2] // self._patch, images.shape[3] // self._patch
        codes = project(self.head, self._extract(images)).float()
        products = codes @ self.directions.mT
        # longer codes count more between patches, as in `Segmenter.predict`; scores of merged groups count alike
        best = best_of(products if self._plain else products * inverse_norms(codes), self._parts)
        fine = F.interpolate(on_grid(best, grid), scale_factor=float(self._patch), mode="bilinear")
        scores = best_of(best * inverse_norms(codes) if self._plain else best, self._merged)
        return self.numbers[fine.argmax(1)], on_grid(scores, grid)


def best_of(scores: Tensor, parts: list[list[int]]) -> Tensor:
    """The best of each part of the channels: [B,P,K] -> [B,P,len(parts)]."""
    if all(len(part) == 1 for part in parts):
        return scores[..., [part[0] for part in parts]]
    return torch.stack([scores[..., part].amax(-1) for part in parts], -1)


def on_grid(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Rows [B,h*w,N] of patches -> [B,N,h,w]."""
    return rows.mT.reshape(rows.shape[0], rows.shape[2], *grid)


def network_of(segmenter: Segmenter) -> Network:
    """The network of a segmenter on a CPU, in float32. UserError for what has no such network."""
    scales = segmenter.config.scale
    if len(scales) > 1:
        raise UserError(
            f"--checkpoint: was trained at {len(scales)} scales ({' '.join(scales)}), and a network sees one; "
            "deploy a checkpoint of one scale"
        )
    return Network(segmenter).eval().requires_grad_(False)


def multiple_of(segmenter: Segmenter) -> int:
    """Pixels of which the sides of images are multiples: a patch, or two where padding depends on their number being
    odd, which one graph cannot."""
    backbone = segmenter.backbone
    return backbone.patch * (2 if backbone.name == LITE else 1)


def least_side(segmenter: Segmenter) -> int:
    """Pixels that the sides of images have at least: a graph for any size has no special case for a single patch."""
    return 2 * multiple_of(segmenter)


def shapes_of(multiple: int) -> dict[str, dict[int, Any]]:
    """Which sides of the images may change, for torch.export."""
    rows, columns = (torch.export.Dim(name, min=2, max=2**14) for name in ("rows", "columns"))
    return {"images": {0: torch.export.Dim("batch", max=2**14), 2: multiple * rows, 3: multiple * columns}}


def cases(multiple: int) -> list[np.ndarray]:
    """Images to compare with, float32 [B,3,H,W]: smooth colours with some noise, always alike."""
    rng, images = np.random.default_rng(0), []
    for count, h, w in CASES:
        coarse = torch.from_numpy(rng.random((count, 3, h, w), np.float32))
        smooth = F.interpolate(coarse, scale_factor=multiple, mode="bilinear").numpy()
        noise = rng.normal(0, 0.03, smooth.shape).astype(np.float32)
        images.append(np.clip(smooth + noise, 0, 1))
    return images


def exported(network: Network, multiple: int) -> torch.export.ExportedProgram:
    """The network as a program for images of any number and size. UserError where it cannot be one."""
    sample = torch.from_numpy(cases(multiple)[1])
    try:
        with torch.no_grad(), resized_in_graph(network), quiet():
            return torch.export.export(network, (sample,), dynamic_shapes=shapes_of(multiple), strict=False)
    except Exception as error:  # a network of others may do anything
        raise UserError(
            f"--backbone: cannot be exported for images of any size ({reason(error)}); use another"
        ) from error


@contextmanager
def resized_in_graph(network: Network) -> Iterator[None]:
    """Let a ViT resize its table of positions by products, which hold for every size, and not by rules for some."""
    embeddings = getattr(network.model, "embeddings", None)
    own = getattr(embeddings, "interpolate_pos_encoding", None)
    kind = getattr(getattr(network.model, "config", None), "model_type", None)
    smoothed = kind == "dinov2_with_registers"
    if embeddings is None or not (smoothed or getattr(own, "__name__", "") == "dino_positions"):
        yield
        return
    embeddings.interpolate_pos_encoding = MethodType(partial(positions, smoothed=smoothed), embeddings)
    try:
        yield
    finally:
        embeddings.interpolate_pos_encoding = own


def positions(self: Any, tokens: Tensor, height: int, width: int, *, smoothed: bool) -> Tensor:
    """As `backbones.vit.dino_positions`, or `smoothed` as transformers for DINOv2 with registers: for any size in one
    graph."""
    patch, (rows, columns) = self.patch_embeddings.patch_size, self.patch_embeddings.image_size
    here, there = (height // patch[0], width // patch[1]), (rows // patch[0], columns // patch[1])
    table = self.position_embeddings[0, 1:].float().unflatten(0, there)
    steps = [torch.arange(side + 1, device=table.device)[-1:].float() for side in here]  # sizes as tensors
    same = (steps[0] == there[0]) & (steps[1] == there[1])
    lines = []
    for side, step, length in zip(here, steps, there):
        scale = torch.where(same, 1.0, (step + (0.0 if smoothed else 0.1)) / length)
        lines.append(cubic(side, length, scale, smoothed))
    resized = torch.einsum("yh,hwd,xw->yxd", lines[0], table, lines[1]).flatten(0, 1).to(tokens.dtype)
    return torch.cat([self.position_embeddings[:, :1], resized[None]], 1)


def cubic(count: int, length: int, scale: Tensor, smoothed: bool) -> Tensor:
    """PyTorch's bicubic interpolation as a product: [count,length] for a line that is `scale` times as long.

    smoothed: with its anti-aliasing, which has another kernel and wider ones where a line gets shorter.
    """
    place = ((torch.arange(count, device=scale.device) + 0.5) / scale - 0.5)[:, None]
    columns = torch.arange(length, device=scale.device)
    if smoothed:
        weights = kernel((columns - place).abs() * scale.clamp(max=1), -0.5)
        return weights / weights.sum(1, keepdim=True)
    first, lines = place.floor(), torch.zeros_like(place) * columns
    for tap in range(-1, 3):  # those beyond the ends count for the first or last
        target = (first + tap).clamp(0, length - 1)
        lines = lines + torch.where(columns == target, kernel((first + tap - place).abs(), -0.75), 0.0)
    return lines


def kernel(x: Tensor, a: float) -> Tensor:
    """Keys' cubic convolution at distances x >= 0."""
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def description(segmenter: Segmenter) -> dict[str, Any]:
    """The facts that a program needs to run the network, ready for JSON."""
    checkpoint, config = segmenter.checkpoint, segmenter.config
    return {
        "images": "RGB float32 [B,3,H,W] in 0..1, normalised inside",
        "patch": segmenter.backbone.patch,
        "multiple_of": multiple_of(segmenter),
        "least_side": least_side(segmenter),
        "scale": config.scale[0],
        "short_side": config.sides[1],
        "resample": config.resample,
        "groups": [group.as_json() for group in segmenter.groups],
        "backbone": checkpoint.backbone_name,
        "licence": checkpoint.backbone_licence,
        "step": checkpoint.step,
        "parity": PARITY,
    }


def deploy(segmenter: Segmenter, path: Path, form: str) -> tuple[Path, float]:
    """Write the network as `form`, "onnx" or "pt2", and its check next to it, x.check.npz: `images`, and the `labels`
    and `scores` that PyTorch gives for them. -> the check, and by how much scores of the file differ.

    The file is run on images of several sizes first. UserError, and no file, where scores differ by more than PARITY
    or a label does.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None] if form == "onnx" else []
    if missing:
        raise UserError(f"--format onnx: needs {', '.join(missing)}; run: {INSTALL}")
    network, multiple = network_of(segmenter), multiple_of(segmenter)
    images, differences = cases(multiple), []
    with torch.no_grad():
        expected = [tuple(part.numpy() for part in network(torch.from_numpy(batch))) for batch in images]
    program, text = exported(network, multiple), json.dumps(description(segmenter))

    def write(target: Path) -> None:
        with naming_failures(form):
            run = (to_onnx if form == "onnx" else to_program)(program, target, text)
            results = [run(batch) for batch in images]
        for (got_labels, got_scores), (labels, scores) in zip(results, expected):
            differences.append(float(np.abs(got_scores - scores).max()))
            if not differences[-1] <= PARITY or (got_labels != labels).mean() > PARITY:  # also NaN
                wrong = f"scores differ by {differences[-1]:.1e}, and {(got_labels != labels).mean():.2%} of labels"
                raise UserError(f"--format {form}: gives other results than PyTorch ({wrong}), so no file; {OTHER}")

    write_atomic(path, write)
    check = path.with_name(f"{path.stem}.check.npz")
    arrays = {"images": images[0], "labels": expected[0][0], "scores": expected[0][1]}

    def write_check(target: Path) -> None:
        np.savez_compressed(target, **arrays)

    return write_atomic(check, write_check), max(differences)


@contextmanager
def naming_failures(form: str) -> Iterator[None]:
    """Raise whatever goes wrong inside as UserError: an operator that a format lacks, a program's guard of sizes."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"--format {form}: the network does not run so ({reason(error)}), so no file; {OTHER}"
        ) from error


def to_program(program: torch.export.ExportedProgram, target: Path, text: str) -> Run:
    """Save a program of torch.export, and load it again."""
    with quiet():
        torch.export.save(program, target, extra_files={"smooseg.json": text})
        module = torch.export.load(target).module()

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            labels, scores = module(torch.from_numpy(images))
        return labels.numpy(), scores.numpy()

    return run


def to_onnx(program: torch.export.ExportedProgram, target: Path, text: str) -> Run:
    """Save a program as ONNX with all its weights inside, and open it with onnxruntime."""
    import onnxruntime

    with quiet():
        result = torch.onnx.export(program, input_names=INPUTS, output_names=OUTPUTS, dynamo=True, optimize=True)
    assert result is not None
    result.model.metadata_props["smooseg"] = text
    result.save(target, external_data=False)
    session = onnxruntime.InferenceSession(str(target), providers=["CPUExecutionProvider"])

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        labels, scores = session.run(OUTPUTS, {INPUTS[0]: images})
        return labels, scores

    return run


@contextmanager
def quiet() -> Iterator[None]:
    """Keep from the terminal what exporters tell of their steps, and the graphs of those that fail."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(level)
