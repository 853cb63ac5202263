"""Reads the weights files that DINO and DINOv2 published, and checkpoints around them, as transformers' files.

Names and shapes alone tell which network it is: DINOv2 has layer scales (`ls1`), with registers also `register_tokens`,
and the giant model has SwiGLU (`w12`). In all of them a head has 64 channels and LayerNorm an epsilon of 1e-6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from .vitfiles import VitFiles
from .weights import read

STEM = "patch_embed.proj.weight"
HOLDERS = ("teacher", "state_dict", "model", "student")  # in this order: of two networks, the teacher was published
PREFIXES = ("", "backbone.", "module.backbone.", "module.", "net.model.")
HEAD_DIM = 64
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1536: "g"}
NEEDS = "give a DINO or DINOv2 .pth, or the folder of a transformers ViT (config.json and model.safetensors)"

# names of the original -> names in transformers' files; {} is the number of the block
COMMON = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
DINO = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
DINOV2 = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
SWIGLU = {"norm1": "norm1", "norm2": "norm2", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}


@dataclass(frozen=True)
class Architecture:
    """A network by its sizes: D `dim` channels, `hidden` inside an MLP, positions for images of `side` pixels."""

    dim: int
    depth: int
    patch: int
    side: int
    hidden: int
    scaled: bool  # layer scales: DINOv2
    gated: bool  # SwiGLU
    registers: int

    def __str__(self) -> str:
        family = "DINOv2" if self.scaled else "DINO"
        tail = f" with {self.registers} registers" if self.registers else ""
        return f"{family} ViT-{SIZES.get(self.dim, self.dim)}/{self.patch}{tail}"

    def config(self) -> dict[str, Any]:
        """The content of transformers' config.json."""
        common = {
            "hidden_size": self.dim,
            "num_hidden_layers": self.depth,
            "num_attention_heads": self.dim // HEAD_DIM,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "image_size": self.side,
            "patch_size": self.patch,
            "num_channels": 3,
            "qkv_bias": True,
        }
        if not self.scaled:
            return {"model_type": "vit", **common, "intermediate_size": self.hidden}
        common |= {"mlp_ratio": 4 if self.gated else self.hidden // self.dim, "use_swiglu_ffn": self.gated}
        if self.registers:
            return {"model_type": "dinov2_with_registers", **common, "num_register_tokens": self.registers}
        return {"model_type": "dinov2", **common}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the network by its original name."""
        D, H, P = self.dim, self.hidden, (self.side // self.patch) ** 2
        shapes: dict[str, tuple[int, ...]] = {
            "cls_token": (1, 1, D),
            "pos_embed": (1, 1 + P, D),
            STEM: (D, 3, self.patch, self.patch),
        }
        shapes |= {"patch_embed.proj.bias": (D,), "norm.weight": (D,), "norm.bias": (D,)}
        if self.registers:
            shapes["register_tokens"] = (1, self.registers, D)
        layers = {"attn.qkv": (3 * D, D), "attn.proj": (D, D)}
        layers |= {"mlp.w12": (2 * H, D), "mlp.w3": (D, H)} if self.gated else {"mlp.fc1": (H, D), "mlp.fc2": (D, H)}
        for i in range(self.depth):
            for name in ("norm1", "norm2"):
                shapes |= {f"blocks.{i}.{name}.weight": (D,), f"blocks.{i}.{name}.bias": (D,)}
            for name, shape in layers.items():
                shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
            if self.scaled:
                shapes |= {f"blocks.{i}.ls1.gamma": (D,), f"blocks.{i}.ls2.gamma": (D,)}
        return shapes


def read_original(path: Path, source: str) -> tuple[Architecture, VitFiles]:
    """The network in a file of torch.save. Executes nothing. UserErrors are one line that begins with `source`."""
    value = read(path, source)
    for table in _tables(value):
        present = {name.removesuffix(STEM) for name in table if name.endswith(STEM)}
        prefixes = [known for known in PREFIXES if known in present] or sorted(present)
        if prefixes:
            return vit_files(_below(table, prefixes[0]), source)
    raise UserError(f"{source}: no vision transformer of DINO or DINOv2 is in it (no {STEM}); {NEEDS}")


def vit_files(weights: Mapping[str, Any], source: str) -> tuple[Architecture, VitFiles]:
    """The network in tensors by original names. Raises UserError, beginning with `source`, if it is incomplete."""
    # DINOv2 trains blocks in chunks: blocks.CHUNK.NUMBER; mask token and classifier do not affect the patch tokens
    weights = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if name != "mask_token" and not name.startswith("head.")}
    for name, value in sorted(weights.items()):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(f"{source}: its {name} is no tensor of floating point; {NEEDS}")
    architecture = _architecture(weights, source)
    expected = architecture.shapes()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} has no place in it"
        raise UserError(f"{source}: not a whole {architecture}, or another network ({problem}); {NEEDS}")
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(
                f"{source}: its {name} is {list(weights[name].shape)}, where a {architecture} has {list(shape)}; "
                + NEEDS
            )
    return architecture, VitFiles(architecture.config(), dict(_renamed(weights, architecture)))


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    """The dicts that may hold a network, the likeliest first."""
    if isinstance(value, dict):
        for holder in HOLDERS:
            if isinstance(value.get(holder), dict):
                yield {name: item for name, item in value[holder].items() if isinstance(name, str)}
        yield {name: item for name, item in value.items() if isinstance(name, str)}


def _below(table: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in table.items() if name.startswith(prefix)}


def _architecture(weights: Mapping[str, Tensor], source: str) -> Architecture:
    def shape(name: str, sides: int) -> tuple[int, ...]:
        sizes = tuple(weights[name].shape) if name in weights else ()
        if len(sizes) != sides or 0 in sizes:
            problem = f"its {name} is {list(sizes)}" if sizes else f"it has no {name}"
            raise UserError(f"{source}: {problem}, so it is no DINO or DINOv2; {NEEDS}")
        return sizes

    dim, _, patch, _ = shape(STEM, 4)
    side = math.isqrt(shape("pos_embed", 3)[1] - 1)
    gated = "blocks.0.mlp.w12.weight" in weights
    hidden = shape("blocks.0.mlp.w3.weight", 2)[1] if gated else shape("blocks.0.mlp.fc1.weight", 2)[0]
    blocks = [int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))]
    architecture = Architecture(
        dim=dim,
        depth=1 + max(blocks),
        patch=patch,
        side=side * patch,
        hidden=hidden,
        scaled="blocks.0.ls1.gamma" in weights,
        gated=gated,
        registers=shape("register_tokens", 3)[1] if "register_tokens" in weights else 0,
    )
    # transformers derives the width of SwiGLU from the channels in this way
    fits = hidden == (int(dim * 4 * 2 / 3) + 7) // 8 * 8 if gated else hidden % dim == 0
    if dim % HEAD_DIM or not fits or (not architecture.scaled and (gated or architecture.registers)):
        raise UserError(f"{source}: a ViT of {dim} channels with {hidden} in its MLPs is no DINO or DINOv2; {NEEDS}")
    return architecture


def _renamed(weights: Mapping[str, Tensor], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    for name, renamed in COMMON.items():
        yield renamed, weights[name]
    if architecture.registers:
        yield "embeddings.register_tokens", weights["register_tokens"]
    if architecture.scaled:  # not used, but random if missing
        yield "embeddings.mask_token", weights["cls_token"].new_zeros(1, architecture.dim)
    names = SWIGLU if architecture.gated else DINOV2 if architecture.scaled else DINO
    layers = {"attn.proj": "attention.output.dense", **names}
    for i in range(architecture.depth):
        block, renamed = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            for part, rows in zip(("query", "key", "value"), weights[f"{block}.attn.qkv.{kind}"].chunk(3)):
                # a copy: safetensors does not write two parts of one storage
                yield f"{renamed}.attention.attention.{part}.{kind}", rows.clone()
            for name, theirs in layers.items():
                yield f"{renamed}.{theirs}.{kind}", weights[f"{block}.{name}.{kind}"]
        for n in (1, 2) if architecture.scaled else ():
            yield f"{renamed}.layer_scale{n}.lambda1", weights[f"{block}.ls{n}.gamma"]
