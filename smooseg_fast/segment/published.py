"""Reads the checkpoints that the paper's authors published: Lightning files with a head, its backbone and settings.

It relies on names and shapes alone: `net.model.*` is the backbone, `projection.cluster1.0` is W1,
`projection.cluster2.0` and `.2` are W2 and W3 (1x1 convolutions), `prediction.local_clusters` is the student and
`prediction.global_clusters` the teacher.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backbones.original import Architecture, vit_files
from ..backbones.vitfiles import VitFiles
from ..backbones.weights import Inert, read
from ..config import GROUPS, PRESETS, TrainConfig
from ..errors import UserError
from .checkpoint import Checkpoint
from .model import Head

BACKBONE = "net.model."
LAYERS = {"projection.cluster1.0": "linear", "projection.cluster2.0": "hidden", "projection.cluster2.2": "outer"}
STUDENT, TEACHER = "prediction.local_clusters", "prediction.global_clusters"
DATASETS = {"cityscapes": "cityscapes", "coco": "cocostuff27", "potsdam": "potsdam"}  # a word of theirs -> our preset
SETTINGS_DEPTH, SETTINGS_NODES, TEXT_LENGTH = 64, 20_000, 2_000  # a small file can refer to one list very often


@dataclass(frozen=True)
class Published:
    """A published checkpoint, read.

    Attributes:
        checkpoint: the head; its config has the paper's protocol of prediction and no thresholds (for training only).
        architecture, vit: the backbone.
        settings: hyper-parameters by their own names, "a.b" for b below a, ready for JSON.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    vit: VitFiles
    settings: dict[str, Any]


def read_published(path: Path, source: str) -> Published:
    """Executes nothing. Raises UserError, one line that begins with `source`, for a damaged file or another layout."""
    value = read(path, source)
    weights = value.get("state_dict") if isinstance(value, dict) else None
    if not isinstance(weights, dict) or TEACHER not in weights:
        raise UserError(
            f"{source}: no checkpoint of SmooSeg (no state_dict with {TEACHER}); give a published .ckpt or the "
            "checkpoint.safetensors of training; weights of a backbone alone go with --backbone"
        )
    head = _head(weights, source)
    backbone = {
        name.removeprefix(BACKBONE): item
        for name, item in weights.items()
        if isinstance(name, str) and name.startswith(BACKBONE)
    }
    architecture, vit = vit_files(backbone, source)
    (K, Z), dim = head.teacher.shape, head.projection.linear.in_features
    if architecture.dim != dim:
        raise UserError(
            f"{source}: its projection takes {dim} channels, its backbone gives {architecture.dim}; download it again"
        )
    settings = _flat(plain(value.get("hyper_parameters")))
    features = _setting(settings, "dino_feat_type")
    if features not in (None, "feat"):
        raise UserError(
            f"{source}: was trained on {features!r} of the backbone; only its last tokens (feat) are supported"
        )
    step = value.get("global_step")
    checkpoint = Checkpoint(
        config=_config(_setting(settings, "dataset_name", "dataset"), K, Z, str(path)),
        head=head,
        step=step if type(step) is int and 0 <= step < 2**63 else 0,
        backbone_name=str(path),
        backbone_digest=vit.digest(),
        report={"published": {"file": path.name, "hyper_parameters": settings}},
    )
    return Published(checkpoint, architecture, vit, settings)


def _head(weights: dict[str, Any], source: str) -> Head:
    def tensor(name: str, *shape: int | None) -> Tensor:
        """In float32; None in `shape` is any number."""
        value = weights.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            problem = "missing" if value is None else "no tensor"
            raise UserError(f"{source}: no checkpoint of SmooSeg: its {name} is {problem}")
        value = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        fits = (
            value.ndim == len(shape)
            and all(expected in (None, n) for expected, n in zip(shape, value.shape))
            and 0 not in value.shape
        )
        if not fits or not value.isfinite().all():
            expected = "finite" if fits else " x ".join("any" if n is None else str(n) for n in shape)
            raise UserError(f"{source}: its {name} is {list(value.shape)} and not {expected}; download it again")
        return value.float()

    teacher = tensor(TEACHER, None, None)
    K, Z = teacher.shape
    dim = tensor("projection.cluster1.0.weight", Z, None).shape[1]
    if K > GROUPS:
        raise UserError(
            f"{source}: has {K} prototypes; at most {GROUPS}, the most that an 8-bit mask can hold, are read"
        )
    rows = {"linear": Z, "hidden": dim, "outer": Z}
    state = {"student": tensor(STUDENT, K, Z), "teacher": teacher}
    for theirs, ours in LAYERS.items():
        state[f"projection.{ours}.weight"] = tensor(f"{theirs}.weight", rows[ours], dim)
        state[f"projection.{ours}.bias"] = tensor(f"{theirs}.bias", rows[ours])
    head = Head(dim, K, Z)
    head.load_state_dict(state)
    return head


def _config(dataset: Any, K: int, Z: int, backbone: str) -> TrainConfig:
    """The paper's protocol: 224 pixels for Potsdam, 320 for everything else."""
    presets = [preset for word, preset in DATASETS.items() if isinstance(dataset, str) and word in dataset.lower()]
    base = PRESETS[presets[0]] if presets else dataclasses.replace(PRESETS["cityscapes"], preset="folder")
    # a preset's thresholds suit one backbone; the file does not tell which ones it was trained with
    return dataclasses.replace(
        base, prototypes=K, code_dim=Z, backbone=backbone, threshold_within=None, threshold_across=None
    )


def plain(value: Any) -> Any:
    """`value` for JSON: omegaconf's trees, namespaces and paths by their content, other objects as "<module.Class>"."""
    left = SETTINGS_NODES

    def walk(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > SETTINGS_DEPTH or (isinstance(value, int) and value.bit_length() > 1000):
            return "..."  # Python writes no such number as text
        if isinstance(value, str):
            return value[:TEXT_LENGTH]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, dict):
            return {
                str(walk(key, SETTINGS_DEPTH - 1)): walk(item, depth + 1) for key, item in value.items() if left > 0
            }
        if isinstance(value, (list, tuple, set)):
            return [walk(item, depth + 1) for item in value if left > 0]
        if isinstance(value, Tensor):
            return walk(value.item(), depth + 1) if value.ndim == 0 else f"{value.dtype} {list(value.shape)}"
        if isinstance(value, Inert):
            return walk(_content(value), depth + 1)
        if isinstance(value, type) and issubclass(value, Inert):
            return value.kind
        return str(value) if isinstance(value, (torch.dtype, torch.device)) else f"<{type(value).__name__}>"

    return walk(value, 0)


def _content(value: Inert) -> Any:
    """The settings in an object, one layer down."""
    if isinstance(value.state, dict):
        for name in ("_content", "_val"):  # omegaconf's containers and leaves
            if name in value.state:
                return value.state[name]
        if value.state and not any(str(name).startswith("_") for name in value.state):  # such as argparse.Namespace
            return value.state
    if value.kind.startswith("pathlib.") and all(isinstance(part, str) for part in value.args):
        return "/".join(value.args).replace("//", "/")
    return repr(value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dicts in dicts as one, with dotted names."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.")
    return flat


def _setting(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of `names` that occurs, at any depth."""
    for name in names:
        for dotted, value in settings.items():
            if dotted.split(".")[-1] == name:
                return value
    return None
