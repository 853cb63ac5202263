"""Reads the checkpoints that the paper's authors published: Lightning files with a head, its backbone and settings.

It relies on names and shapes alone: `net.model.*` is the backbone, `projection.cluster1.0` is W1,
`projection.cluster2.0` and `.2` are W2 and W3 (1x1 convolutions, absent from a linear projection),
`prediction.local_clusters` is the student and `prediction.global_clusters` the teacher.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from ..backbones.original import below, vit_files
from ..backbones.vitfiles import VitFiles
from ..backbones.weights import Inert, read
from ..config import PRESETS, TrainConfig
from ..errors import UserError
from .checkpoint import Checkpoint, head_of
from .model import Head

BACKBONE = "net.model."
TEACHER = "prediction.global_clusters"
LAYERS = {"projection.cluster1.0": "linear", "projection.cluster2.0": "hidden", "projection.cluster2.2": "outer"}
NAMES = {"prediction.local_clusters": "student", TEACHER: "teacher"} | {
    f"{theirs}.{kind}": f"projection.{ours}.{kind}" for theirs, ours in LAYERS.items() for kind in ("weight", "bias")
}
DATASETS = {"cityscapes": "cityscapes", "coco": "cocostuff27", "potsdam": "potsdam"}  # a word of theirs -> our preset
SETTINGS_DEPTH, MOST_SETTINGS, TEXT_LENGTH = 64, 20_000, 2_000  # a small file can refer to one list very often


def read_published(path: Path) -> tuple[Checkpoint, VitFiles]:
    """A published checkpoint and its backbone. Executes nothing.

    The configuration has the paper's protocol of prediction and no thresholds, which are for training only.
    `report["published"]["hyper_parameters"]` has the hyper-parameters by their own names, "a.b" for b below a. Raises
    UserError, one line, for a damaged file or another layout.
    """
    value = read(path)
    weights = value.get("state_dict") if isinstance(value, dict) else None
    if not isinstance(weights, dict) or TEACHER not in weights:
        raise UserError(
            f"no checkpoint of SmooSeg (no state_dict with {TEACHER}); give a published .ckpt or the "
            "checkpoint.safetensors of training; weights of a backbone alone go with --backbone"
        )
    head, vit = _head(weights), vit_files(below(BACKBONE, weights))
    (K, Z), dim = head.teacher.shape, head.projection.linear.in_features
    if vit.config["hidden_size"] != dim:
        raise UserError(
            f"its projection takes {dim} channels, its backbone gives {vit.config['hidden_size']}; download it again"
        )
    leaves = islice(settings_in(value.get("hyper_parameters")), MOST_SETTINGS)
    settings = {name: leaf for name, leaf in leaves if name}
    features = _setting(settings, "dino_feat_type")
    if features not in (None, "feat"):
        raise UserError(f"was trained on {features!r} of the backbone; only its last tokens (feat) are supported")
    step = value.get("global_step")
    checkpoint = Checkpoint(
        config=_config(_setting(settings, "dataset_name", "dataset"), K, Z, str(path)),
        head=head,
        step=step if type(step) is int and 0 <= step < 2**63 else 0,
        backbone_name=str(path),
        backbone_digest=vit.digest(),
        report={"published": {"file": path.name, "hyper_parameters": settings}},
    )
    return checkpoint, vit


def _head(weights: dict[str, Any]) -> Head:
    tensors = {}
    first = weights.get("projection.cluster1.0.weight")
    linear = not any("cluster2" in str(name) for name in weights)
    for theirs, ours in NAMES.items():
        value = weights.get(theirs)
        if linear and "cluster2" in theirs and isinstance(first, Tensor) and first.ndim > 1:
            # W3 SiLU(W2 f + b2) + b3 is 0 where all of them are
            (rows, columns), hidden = first.shape[:2], "hidden" in ours
            rows = columns if hidden else rows
            value = first.new_zeros((rows, columns) if ours.endswith("weight") else rows)
        if not isinstance(value, Tensor):
            raise UserError(f"no checkpoint of SmooSeg: its {theirs} is {'missing' if value is None else 'no tensor'}")
        tensors[ours] = value.flatten(1) if value.ndim > 2 else value  # 1x1 convolutions
    try:
        return head_of(tensors)
    except ValueError as error:
        raise UserError(f"no checkpoint of SmooSeg that can be used ({error}); download it again") from error


def _config(dataset: Any, K: int, Z: int, backbone: str) -> TrainConfig:
    """The paper's protocol: 224 pixels for Potsdam, 320 for everything else."""
    presets = [preset for word, preset in DATASETS.items() if word in str(dataset).lower()]
    base = PRESETS[presets[0]] if presets else dataclasses.replace(PRESETS["cityscapes"], preset="folder")
    # a preset's thresholds suit one backbone; the file does not tell which ones it was trained with
    return dataclasses.replace(
        base, prototypes=K, code_dim=Z, backbone=backbone, threshold_within=None, threshold_across=None
    )


def settings_in(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The leaves of dicts, lists and omegaconf's trees under dotted names, ready for JSON; other objects by class."""
    deeper = depth < SETTINGS_DEPTH and len(name) <= TEXT_LENGTH
    if isinstance(value, Inert) and deeper:
        yield from settings_in(_content(value), name, depth + 1)
    elif isinstance(value, (dict, list, tuple, set)) and value and deeper:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for number, (key, item) in enumerate(pairs):
            part = key[:TEXT_LENGTH] if isinstance(key, str) else str(number)
            yield from settings_in(item, f"{name}.{part}" if name else part, depth + 1)
    elif value is None or isinstance(value, float) or (isinstance(value, int) and value.bit_length() < 1000):
        yield name, value  # Python writes no larger number as text
    else:
        yield name, value[:TEXT_LENGTH] if isinstance(value, str) else f"<{type(value).__name__}>"


def _content(value: Inert) -> Any:
    """The settings in an object, one layer down."""
    state = value.state if isinstance(value.state, dict) else {}
    for name in ("_content", "_val"):  # omegaconf's containers and leaves
        if name in state:
            return state[name]
    if state and all(isinstance(name, str) and name[:1] != "_" for name in state):  # such as argparse.Namespace
        return state
    if value.kind.startswith("pathlib.") and all(isinstance(part, str) for part in value.args):
        return "/".join(value.args).replace("//", "/")
    return repr(value)


def _setting(settings: dict[str, Any], *names: str) -> Any:
    """The value of the first of `names` that occurs, at any depth."""
    matches = (value for name in names for dotted, value in settings.items() if dotted.split(".")[-1] == name)
    return next(matches, None)
