"""The names and the configuration of DINOv3's own weights files, by shapes: `storage_tokens` are its registers.

Positions are rotary, so there is no table of them. Keys have no bias. ViT-S+ and ViT-H+ have gated MLPs (`w1`, `w2`,
`w3`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

REGISTERS, PERIODS = "storage_tokens", "rope_embed.periods"
BASE = 100.0  # of the rotary periods in all that was published
# the bias of the keys is masked out; the last norm of local crops is for training
UNUSED = re.compile(r"rope_embed\.periods|local_cls_norm\..*|.*\.attn\.qkv\.bias_mask")
TRUNK = {
    "cls_token": "embeddings.cls_token",
    REGISTERS: "embeddings.register_tokens",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
PLAIN = {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
GATED = {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}


def is_dinov3(weights: Mapping[str, Tensor]) -> bool:
    return PERIODS in weights


def config_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The content of transformers' config.json. UserError where the rotary periods are not DINOv3's, KeyError or
    ValueError where a tensor is missing or has other dimensions."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    _, registers, _ = weights[REGISTERS].shape
    gated = "blocks.0.mlp.w1.weight" in weights
    hidden, _ = weights["blocks.0.mlp.w1.weight" if gated else "blocks.0.mlp.fc1.weight"].shape
    periods = weights[PERIODS].flatten().float()
    head_dim = 4 * len(periods)
    expected = BASE ** (torch.arange(len(periods)) * 4 / head_dim)
    if not torch.allclose(periods, expected, rtol=0.01):  # they are in bfloat16
        raise UserError(f"its {PERIODS} are not those of DINOv3, whose base is {BASE:g}; use a released .pth")
    bias = "blocks.0.attn.qkv.bias" in weights
    return {
        "model_type": "dinov3_vit",
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_hidden_layers": 1
        + max(int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))),
        "num_attention_heads": dim // head_dim,
        "hidden_act": "silu" if gated else "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": BASE,
        "image_size": 224,
        "patch_size": patch,
        "num_channels": 3,
        "query_bias": bias,
        "key_bias": False,
        "value_bias": bias,
        "use_gated_mlp": gated,
        "num_register_tokens": registers,
    }


def names_of(config: Mapping[str, Any]) -> dict[str, list[str | None]]:
    """The original name of every tensor -> the names of its parts in transformers' files, None for an unused part."""
    names: dict[str, list[str | None]] = {name: [renamed] for name, renamed in TRUNK.items()}
    layers = {"norm1": "norm1", "norm2": "norm2", "attn.proj": "attention.o_proj"}
    layers |= GATED if config["use_gated_mlp"] else PLAIN
    for i in range(config["num_hidden_layers"]):
        block, renamed = f"blocks.{i}", f"layer.{i}"
        query, key, value = (f"{renamed}.attention.{part}_proj" for part in "qkv")
        names[f"{block}.attn.qkv.weight"] = [f"{part}.weight" for part in (query, key, value)]
        if config["query_bias"]:
            names[f"{block}.attn.qkv.bias"] = [f"{query}.bias", None, f"{value}.bias"]
        for kind in ("weight", "bias"):
            names |= {f"{block}.{name}.{kind}": [f"{renamed}.{theirs}.{kind}"] for name, theirs in layers.items()}
        for n in (1, 2):
            names[f"{block}.ls{n}.gamma"] = [f"{renamed}.layer_scale{n}.lambda1"]
    return names
