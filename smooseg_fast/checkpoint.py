"""Checkpoints: one .safetensors file with what was learnt, its configuration as JSON in the header, and the optimiser to go on from.

Written whole by one rename. Nothing in it is executed, and nothing in it names code to import: a `module:callable` backbone is kept for
display and has to be given again.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .config import TrainConfig
from .errors import UserError
from .files import finite, write_atomic
from .model import Head

KEY, FORMAT = "smooseg_fast.checkpoint", 1


@dataclass
class Checkpoint:
    """What a file holds. `config` has every choice resolved (number of prototypes, sizes that fit the patch)."""

    config: TrainConfig
    head: Head
    step: int
    backbone_name: str
    backbone_digest: str
    class_names: tuple[str, ...] | None = None
    report: dict[str, Any] = field(default_factory=dict)  # figures of the run, ready for JSON
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def write(self, path: str | Path) -> Path:
        header = {
            "format": FORMAT,
            "step": self.step,
            "backbone": {"name": self.backbone_name, "digest": self.backbone_digest},
            "class_names": self.class_names,
            "config": dataclasses.asdict(self.config),
            "report": self.report,
        }
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()}
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        return write_atomic(path, save(tensors, {KEY: json.dumps(finite(header))}))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """UserError in one line for a missing, damaged or foreign file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"--checkpoint {path}: no such file; give the checkpoint.safetensors that training wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(KEY)
            if header is None:
                raise UserError(
                    f"--checkpoint {path}: a safetensors file of another kind; give a checkpoint.safetensors that training wrote"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the file is no dict)
        return _checkpoint(json.loads(header), tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(f"--checkpoint {path}: cut short, damaged or no safetensors file ({error}); copy it again or train anew") from error
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--checkpoint {path}: written by another version ({reason}); train anew with this one") from error


def _checkpoint(header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    if header["format"] != FORMAT:
        raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
    config = TrainConfig(**header["config"])
    weights = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
    head = Head(weights["projection.linear.weight"].shape[1], *weights["student"].shape)
    head.load_state_dict(weights)
    names = header["class_names"]
    return Checkpoint(
        config=config,
        head=head,
        step=header["step"],
        backbone_name=header["backbone"]["name"],
        backbone_digest=header["backbone"]["digest"],
        class_names=None if names is None else tuple(names),
        report=header["report"],
        optimizer={name.removeprefix("optimizer."): v for name, v in tensors.items() if name.startswith("optimizer.")},
    )


def optimizer_tensors(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state as flat names: the parameter's place and the moment."""
    states = optimizer.state_dict()["state"]
    return {f"{place}.{name}": torch.as_tensor(value) for place, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Adam, tensors: dict[str, Tensor]) -> None:
    whole = optimizer.state_dict()
    whole["state"] = {}
    for name, value in tensors.items():
        place, key = name.split(".")
        whole["state"].setdefault(int(place), {})[key] = value
    optimizer.load_state_dict(whole)
