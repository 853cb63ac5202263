"""Reads the weights files that DINO, DINOv2 and DINOv3 published, and checkpoints around them, as transformers' files.

Names and shapes alone tell which network it is: DINOv3 has rotary positions (see `dinov3`). DINOv2 has layer scales
(`ls1`), with registers also `register_tokens`, and the giant model has SwiGLU (`w12`). In DINO and DINOv2 a head has 64
channels and LayerNorm an epsilon of 1e-6.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import UserError
from . import dinov3
from .base import reason, require_finite
from .vitfiles import VitFiles
from .weights import read

STEM = "patch_embed.proj.weight"
HOLDERS = ("teacher", "state_dict", "model", "student")  # in this order: of two networks, the teacher was published
HEAD_DIM = 64
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H+", 1536: "g", 4096: "7B"}
NEEDS = "give a DINO, DINOv2 or DINOv3 .pth, or the folder of a transformers ViT (config.json and model.safetensors)"

# names of the original -> names in transformers' files
TRUNK = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
DINO = {"norm1": "layernorm_before", "norm2": "layernorm_after"}
DINO |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
DINOV2 = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
SWIGLU = {"norm1": "norm1", "norm2": "norm2", "mlp.w12": "mlp.weights_in", "mlp.w3": "mlp.weights_out"}


def read_original(path: Path) -> VitFiles:
    """The network in a file of torch.save. Executes nothing. UserErrors are one line."""
    value = read(path)
    tables: list[Any] = [value.get(holder) for holder in HOLDERS] + [value] if isinstance(value, dict) else []
    for table in filter(lambda table: isinstance(table, dict), tables):
        names = [name for name in table if isinstance(name, str) and name.endswith(STEM)]
        if names:
            return vit_files(below(min(sorted(names), key=len).removesuffix(STEM), table))
    raise UserError(f"no vision transformer of DINO, DINOv2 or DINOv3 is in it (no {STEM}); {NEEDS}")


def below(prefix: str, table: Mapping[Any, Any]) -> dict[str, Any]:
    """The items whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in table.items()
        if isinstance(name, str) and name.startswith(prefix)
    }


def vit_files(weights: Mapping[str, Any]) -> VitFiles:
    """The network in tensors by original names. Raises UserError if it is incomplete or another one."""
    # DINOv2 trains blocks in chunks: blocks.CHUNK.NUMBER; mask token and classifier do not affect the patch tokens
    weights = {re.sub(r"^blocks\.\d+\.(?=\d)", "blocks.", name): value for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if name != "mask_token" and not name.startswith("head.")}
    third = dinov3.is_dinov3(weights)
    for name, value in sorted(weights.items()):
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            raise UserError(f"its {name} is no tensor of floating point; {NEEDS}")
    config = _dinov3_config(weights) if third else _config(weights)
    names = dinov3.names_of(config) if third else _names(config)
    if third:
        weights = {name: value for name, value in weights.items() if not dinov3.UNUSED.fullmatch(name)}
    require_finite(weights, "download it again")
    missing, unknown = sorted(names.keys() - weights.keys()), sorted(weights.keys() - names.keys())
    if missing or unknown:
        problem = f"{missing[0]} is missing" if missing else f"{unknown[0]} has no place in it"
        raise UserError(f"not a whole {title(config)}, or another network ({problem}); {NEEDS}")
    files: dict[str, Tensor] = {}
    for name, parts in names.items():
        # copies: safetensors does not write two parts of one storage, and a mapped file may be removed
        files |= {part: rows.clone() for part, rows in zip(parts, weights[name].chunk(len(parts))) if part}
    return VitFiles(config, files)


def title(config: Mapping[str, Any]) -> str:
    """The network's name as people say it, such as "DINOv2 ViT-L/14 with 4 registers"."""
    family = {"vit": "DINO", "dinov3_vit": "DINOv3"}.get(config["model_type"], "DINOv2")
    size, registers = config["hidden_size"], config.get("num_register_tokens")
    tail = f" with {registers} registers" if registers else ""
    return f"{family} ViT-{SIZES.get(size, size)}/{config['patch_size']}{tail}"


def _config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of transformers' config.json, from the shapes."""

    def shape(name: str, sides: int) -> tuple[int, ...]:
        sizes = tuple(weights[name].shape) if name in weights else ()
        if len(sizes) != sides or 0 in sizes:
            problem = f"its {name} is {list(sizes)}" if sizes else f"it has no {name}"
            raise UserError(f"{problem}, so it is no DINO or DINOv2; {NEEDS}")
        return sizes

    dim, _, patch, _ = shape(STEM, 4)
    side = math.isqrt(shape("pos_embed", 3)[1] - 1)
    gated, scaled = "blocks.0.mlp.w12.weight" in weights, "blocks.0.ls1.gamma" in weights
    registers = shape("register_tokens", 3)[1] if "register_tokens" in weights else 0
    hidden = shape("blocks.0.mlp.w3.weight", 2)[1] if gated else shape("blocks.0.mlp.fc1.weight", 2)[0]
    # transformers derives the width of SwiGLU from the channels in this way
    fits = hidden == (int(dim * 4 * 2 / 3) + 7) // 8 * 8 if gated else hidden % dim == 0
    if dim % HEAD_DIM or not fits or (not scaled and (gated or registers)):
        raise UserError(f"a ViT of {dim} channels with {hidden} in its MLPs is no DINO or DINOv2; {NEEDS}")
    config = {
        "model_type": "dinov2_with_registers" if registers else "dinov2" if scaled else "vit",
        "hidden_size": dim,
        "num_hidden_layers": 1
        + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))),
        "num_attention_heads": dim // HEAD_DIM,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": side * patch,
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
    }
    if not scaled:
        return config | {"intermediate_size": hidden}
    config |= {"mlp_ratio": 4 if gated else hidden // dim, "use_swiglu_ffn": gated}
    return config | ({"num_register_tokens": registers} if registers else {})


def _dinov3_config(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        return dinov3.config_of(weights)
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"not a whole DINOv3, or another network ({reason(error)}); {NEEDS}") from error


def _names(config: Mapping[str, Any]) -> Mapping[str, list[str | None]]:
    """The original name of every tensor -> the names of its parts in transformers' files."""
    names: dict[str, list[str | None]] = {name: [renamed] for name, renamed in TRUNK.items()}
    if "num_register_tokens" in config:
        names["register_tokens"] = ["embeddings.register_tokens"]
    scaled = config["model_type"] != "vit"
    layers = {"attn.proj": "attention.output.dense"}
    layers |= (SWIGLU if config["use_swiglu_ffn"] else DINOV2) if scaled else DINO
    for i in range(config["num_hidden_layers"]):
        block, renamed = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            attention = f"{renamed}.attention.attention"
            names[f"{block}.attn.qkv.{kind}"] = [f"{attention}.{part}.{kind}" for part in ("query", "key", "value")]
            names |= {f"{block}.{name}.{kind}": [f"{renamed}.{theirs}.{kind}"] for name, theirs in layers.items()}
        for n in (1, 2) if scaled else ():
            names[f"{block}.ls{n}.gamma"] = [f"{renamed}.layer_scale{n}.lambda1"]
    return names
