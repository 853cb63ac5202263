"""The checkpoints that the paper's authors published: Lightning files with head, backbone and omegaconf's settings, as ours.

Of their layout only names and shapes are used: `net.model.*` is the backbone, `projection.cluster1.0` is W1, `projection.cluster2.0` and
`.2` are W2 and W3 (1x1 convolutions), `prediction.local_clusters` is the student and `prediction.global_clusters` the teacher.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbones.original import Architecture, vit_files
from ..backbones.vitfiles import VitFiles
from ..config import GROUPS, PRESETS, TrainConfig
from ..errors import UserError
from ..pickles import plain, read
from .checkpoint import Checkpoint
from .model import Head

BACKBONE = "net.model."
LAYERS = {"projection.cluster1.0": "linear", "projection.cluster2.0": "hidden", "projection.cluster2.2": "outer"}
STUDENT, TEACHER = "prediction.local_clusters", "prediction.global_clusters"
DATASETS = {"cityscapes": "cityscapes", "coco": "cocostuff27", "potsdam": "potsdam"}  # a word of theirs -> our preset


@dataclass(frozen=True)
class Published:
    """What such a file holds.

    Attributes:
        checkpoint: the head; its config has the paper's protocol of prediction, and no thresholds, which only training needs.
        architecture, vit: of the backbone.
        settings: hyper-parameters by their own names, "a.b" for b below a, ready for JSON.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    vit: VitFiles
    settings: dict[str, Any]


def read_published(path: Path, source: str) -> Published:
    """Nothing in the file is executed. UserError in one line that begins with `source` for a damaged file or one of another layout."""
    value = read(path, source)
    table = value.get("state_dict") if isinstance(value, dict) else None
    if not isinstance(table, dict) or TEACHER not in table:
        raise UserError(
            f"{source}: no checkpoint of SmooSeg (no state_dict with {TEACHER}); give a published .ckpt or the checkpoint.safetensors of "
            "training; weights of a backbone alone go with --backbone"
        )
    head = _head(table, source)
    below = {
        name.removeprefix(BACKBONE): item
        for name, item in table.items()
        if isinstance(name, str) and name.startswith(BACKBONE)
    }
    architecture, vit = vit_files(below, source)
    (K, Z), dim = head.teacher.shape, head.projection.linear.in_features
    if architecture.dim != dim:
        raise UserError(
            f"{source}: its projection takes {dim} channels, its backbone gives {architecture.dim}; download it again"
        )
    settings = _flat(plain(value.get("hyper_parameters")))
    features = _setting(settings, "dino_feat_type")
    if features not in (None, "feat"):
        raise UserError(
            f"{source}: was trained on {features!r} of the backbone, not on its last tokens (feat), which alone are read here"
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


def _head(table: dict[str, Any], source: str) -> Head:
    def tensor(name: str, *shape: int | None) -> Tensor:
        """In float32; None in `shape` is any number."""
        value = table.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise UserError(
                f"{source}: no checkpoint of SmooSeg: its {name} is {'missing' if value is None else 'no tensor'}"
            )
        value = value.flatten(1) if value.ndim == 4 and value.shape[2:] == (1, 1) else value
        fits = (
            value.ndim == len(shape)
            and all(want in (None, n) for want, n in zip(shape, value.shape))
            and 0 not in value.shape
        )
        if not fits or not value.isfinite().all():
            what = "finite" if fits else " x ".join("any" if n is None else str(n) for n in shape)
            raise UserError(f"{source}: its {name} is {list(value.shape)} and not {what}; download it again")
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
    """The paper's protocol: 320 pixels, Potsdam at 224, whatever else the data set is."""
    known = [preset for word, preset in DATASETS.items() if isinstance(dataset, str) and word in dataset.lower()]
    base = PRESETS[known[0]] if known else dataclasses.replace(PRESETS["cityscapes"], preset="folder")
    # the thresholds of a preset are those of one backbone; which ones a file was trained with it does not say
    unknown = dict(threshold_within=None, threshold_across=None)
    return dataclasses.replace(base, prototypes=K, code_dim=Z, backbone=backbone, **unknown)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dicts in dicts as one, with dotted names."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.")
    return flat


def _setting(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of `names` that is there, at any depth."""
    for wanted in names:
        for name, value in settings.items():
            if name.split(".")[-1] == wanted:
                return value
    return None
