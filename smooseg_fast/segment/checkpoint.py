"""The two .safetensors files of a run: a head to predict with, and the state that an unfinished run resumes from.

Both carry their configuration as JSON in the header and are written whole by one rename. Reading them executes nothing
and imports nothing: a `module:callable` backbone is kept for display and has to be given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..backbones.original import below
from ..config import GROUPS, TrainConfig
from ..errors import UserError
from ..system.fields import check_fields
from ..system.files import finite, write_atomic
from .model import Head, Heads

T = TypeVar("T")
KEY, FORMAT = "smooseg_fast.checkpoint", 1


@dataclass(frozen=True)
class Kind:
    """A kind of file, and how errors speak of it."""

    key: str  # names its header
    usual: str  # its usual name
    argument: str  # the flag that names it, at the start of an error
    advice: str  # the end of an error


CHECKPOINT = Kind(KEY, "checkpoint.safetensors", "--checkpoint ", "copy it again or train again")
STATE = Kind(  # nobody names this file: it lies in --out
    "smooseg_fast.training",
    "training.safetensors",
    "",
    "take it away to train from the first step, or give another --out",
)


@dataclass
class Checkpoint:
    """One head. `config` describes it alone, with every choice resolved (number of prototypes, sizes that fit)."""

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
        return _write(
            path, CHECKPOINT, header, {f"head.{name}": value for name, value in self.head.state_dict().items()}
        )


@dataclass
class TrainingState:
    """An unfinished run after `step` steps.

    Nothing random needs saving: the draws of a step depend on its number and the seeds alone.

    Args:
        heads: the state of all H heads, [H,...] under a head's names.
        optimizer: Adam's state as `optimizer_tensors` gives it.
        losses: those of the last step, by their names in SmooSegLoss.
        windows: number of windows that the features are streamed through, and steps in each; None without streaming.
    """

    config: TrainConfig
    step: int
    heads: Mapping[str, Tensor]
    optimizer: dict[str, Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)
    windows: tuple[int, int] | None = None

    def write(self, path: str | Path) -> Path:
        config = dataclasses.asdict(self.config)
        header = {"format": FORMAT, "step": self.step, "config": config, "windows": self.windows}
        parts = {"heads": self.heads, "optimizer": self.optimizer, "losses": self.losses}
        tensors = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        return _write(path, STATE, header, tensors)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """UserError in one line for a missing, damaged or foreign file."""
    return _read(Path(path).expanduser(), CHECKPOINT, _checkpoint)


def read_training_state(path: str | Path) -> TrainingState:
    """UserError in one line for a missing, damaged or foreign file."""
    return _read(Path(path), STATE, _training_state)


def _write(path: str | Path, kind: Kind, header: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return write_atomic(path, save(tensors, {kind.key: json.dumps(finite(header))}))


def _read(path: Path, kind: Kind, build: Callable[[dict[str, Any], dict[str, Tensor]], T]) -> T:
    place = f"{kind.argument}{path}"
    if not path.is_file():
        raise UserError(f"{place}: no such file; give the {kind.usual} that training wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(kind.key)
            tensors = {} if text is None else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if text is not None:
            header = json.loads(text)
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
            return build(header, tensors)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{place}: cut short, damaged or no safetensors file ({error}); {kind.advice}") from error
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, UserError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{place}: damaged, or written by another version ({reason}); {kind.advice}") from error
    raise UserError(f"{place}: a safetensors file of another kind; give a {kind.usual} that training wrote")


def _checkpoint(header: dict[str, Any], tensors: dict[str, Tensor]) -> Checkpoint:
    step, backbone, names, report = (header[name] for name in ("step", "backbone", "class_names", "report"))
    texts = [backbone["name"], backbone["digest"], *([] if names is None else names)]
    if type(step) is not int or not isinstance(report, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its header holds values of the wrong kind")
    config = TrainConfig(**header["config"])
    check_fields(config)
    return Checkpoint(
        config=config,
        head=head_of(below("head.", tensors)),
        step=step,
        backbone_name=backbone["name"],
        backbone_digest=backbone["digest"],
        class_names=None if names is None else tuple(names),
        report=report,
    )


def head_of(weights: Mapping[str, Tensor]) -> Head:
    """The head with this state. ValueError or KeyError where names, shapes or values do not fit."""
    (K, Z), (_, D) = weights["student"].shape, weights["projection.linear.weight"].shape
    if not 1 <= K <= GROUPS:
        raise ValueError(f"{K} prototypes, and 1 to {GROUPS} are possible")
    with torch.device("meta"):  # shapes alone: a small file may claim a network that fits into no memory
        expected = Head(D, K, Z).state_dict()
    for name, like in expected.items():
        value = weights[name]
        if value.shape != like.shape or not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)} and not numbers {list(like.shape)}")
        if not value.float().isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite")
    head = Head(D, K, Z)
    head.load_state_dict(weights)
    return head


def _training_state(header: dict[str, Any], tensors: dict[str, Tensor]) -> TrainingState:
    heads, optimizer, losses = (below(f"{part}.", tensors) for part in ("heads", "optimizer", "losses"))
    Heads.from_state(heads)  # raises where names or shapes do not fit
    windows = header.get("windows")
    config = TrainConfig(**header["config"])
    return TrainingState(config, header["step"], heads, optimizer, losses, None if windows is None else tuple(windows))


def optimizer_tensors(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state under flat names: the parameter's number, a dot and the moment."""
    states = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value) for number, state in states.items() for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Loads the state that `optimizer_tensors` gave."""
    state = optimizer.state_dict()
    state["state"] = {}
    for name, value in tensors.items():
        number, moment = name.split(".")
        state["state"].setdefault(int(number), {})[moment] = value
    optimizer.load_state_dict(state)
