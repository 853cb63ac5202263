"""Two kinds of .safetensors files, each with its configuration as JSON in the header: a head to predict with, and the state to go on from.

Written whole by one rename. Nothing in it is executed, and nothing in it names code to import: a `module:callable` backbone is kept for
display and has to be given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..config import GROUPS, TrainConfig
from ..errors import UserError
from ..system.fields import check_fields
from ..system.files import finite, write_atomic
from .model import Head, Heads

T = TypeVar("T")
KEY, STATE_KEY, FORMAT = "smooseg_fast.checkpoint", "smooseg_fast.training", 1


@dataclass
class Checkpoint:
    """One head. `config` has every choice resolved (number of prototypes, sizes that fit the patch) and names this head alone."""

    config: TrainConfig
    head: Head
    step: int
    backbone_name: str
    backbone_digest: str
    class_names: tuple[str, ...] | None = None
    report: dict[str, Any] = field(default_factory=dict)  # figures of the run, ready for JSON

    def write(self, path: str | Path) -> Path:
        header = {
            "format": FORMAT,
            "step": self.step,
            "backbone": {"name": self.backbone_name, "digest": self.backbone_digest},
            "class_names": self.class_names,
            "config": dataclasses.asdict(self.config),
            "report": self.report,
        }
        return _write(path, KEY, header, {f"head.{name}": value for name, value in self.head.state_dict().items()})


@dataclass
class TrainingState:
    """All heads of an unfinished run after `step` steps, what Adam remembers of them, and the losses of that step.

    Nothing random needs saving: what is drawn for a step depends on its number and the seeds alone.
    """

    config: TrainConfig
    step: int
    heads: Heads
    optimizer: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)  # by their names in SmooSegLoss
    windows: tuple[int, int] | None = None  # how many windows the features are streamed through, and the steps in each

    def write(self, path: str | Path) -> Path:
        header = {
            "format": FORMAT,
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "windows": self.windows,
        }
        tensors = {f"heads.{name}": value for name, value in self.heads.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.items()}
        return _write(
            path, STATE_KEY, header, tensors | {f"losses.{name}": value for name, value in self.losses.items()}
        )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """UserError in one line for a missing, damaged or foreign file."""
    return _read(Path(path).expanduser(), KEY, "checkpoint.safetensors", _checkpoint)


def read_training_state(path: str | Path) -> TrainingState:
    """UserError in one line for a missing, damaged or foreign file."""
    try:
        return _read(Path(path), STATE_KEY, "training.safetensors", _training_state)
    except UserError as error:  # nobody names the file: it lies in --out
        what = str(error).removeprefix("--checkpoint ").rpartition(";")[0]
        raise UserError(f"{what}; take it away to train from the first step, or give another --out") from error


def _write(path: str | Path, key: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return write_atomic(path, save(tensors, {key: json.dumps(finite(header))}))


def _read(path: Path, key: str, usual: str, build: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> T:
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file; give the {usual} that training wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(key)
            if header is None:
                raise UserError(
                    f"--checkpoint {path}: a safetensors file of another kind; give a {usual} that training wrote"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        header = json.loads(header)
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
        return build(header, tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"--checkpoint {path}: cut short, damaged or no safetensors file ({error}); copy it again or train anew"
        ) from error
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
        AttributeError,
        OverflowError,
        UserError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"--checkpoint {path}: damaged, or written by another version ({reason}); copy it again or train anew"
        ) from error


def _checkpoint(header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    step, backbone, names, report = (header[name] for name in ("step", "backbone", "class_names", "report"))
    texts = [backbone["name"], backbone["digest"], *([] if names is None else names)]
    if type(step) is not int or not isinstance(report, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its header holds values of the wrong kind")
    config = TrainConfig(**header["config"])
    check_fields(config)
    return Checkpoint(
        config=config,
        head=_head(_below("head.", tensors)),
        step=step,
        backbone_name=backbone["name"],
        backbone_digest=backbone["digest"],
        class_names=None if names is None else tuple(names),
        report=report,
    )


def _head(weights: dict[str, Tensor]) -> Head:
    (K, Z), (_, D) = weights["student"].shape, weights["projection.linear.weight"].shape
    if not 1 <= K <= GROUPS:
        raise ValueError(f"{K} prototypes, where 1 to {GROUPS} can be")
    with torch.device("meta"):  # shapes alone: a small file may claim a network that no memory holds
        wanted = Head(D, K, Z).state_dict()
    for name, like in wanted.items():
        value = weights[name]
        if value.shape != like.shape or not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)} and not numbers {list(like.shape)}")
        if not value.float().isfinite().all():
            raise ValueError(f"{name} has numbers that are not finite")
    head = Head(D, K, Z)
    head.load_state_dict(weights)
    return head


def _training_state(header: dict[str, Any], tensors: dict[str, Tensor]) -> TrainingState:
    weights = _below("heads.", tensors)
    dim, (_, K, Z) = weights["projection.linear.weight"].shape[2], weights["student"].shape
    heads = Heads([Head(dim, K, Z) for _ in range(len(weights["student"]))])
    heads.load_state_dict(weights)
    parts = (_below(f"{part}.", tensors) for part in ("optimizer", "losses"))
    windows = header.get("windows")
    return TrainingState(
        TrainConfig(**header["config"]), header["step"], heads, *parts, None if windows is None else tuple(windows)
    )


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state as flat names: the parameter's place and the moment."""
    states = optimizer.state_dict()["state"]
    return {
        f"{place}.{name}": torch.as_tensor(value) for place, state in states.items() for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        place, key = name.split(".")
        whole["state"].setdefault(int(place), {})[key] = value
    optimizer.load_state_dict(whole)
