"""The two .safetensors files of a run: a head to predict with, and the state that an unfinished run resumes from.

Both carry their configuration as JSON in the header and are written whole by one rename. A SHA-256 in the JSON covers
the rest of it and every tensor, and is verified on reading: a changed bit is refused. It guards against accidents, not
against people, who can compute another. Reading executes nothing and imports nothing: a `module:callable` backbone is
kept for display and has to be given again.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..backbones.base import digest_of
from ..config import AUTO, GROUPS, SHARE, TrainConfig
from ..datasets.reading import PLAIN, Reading
from ..errors import UserError
from ..system.fields import check_fields
from ..system.files import finite, write_atomic
from .grouping import Grouping
from .model import Head, Heads
from .names import UNNAMED, Group, Names, Naming
from .tree import Pairs, Tree

T = TypeVar("T")
Parts = Mapping[str, Mapping[str, Tensor]]
KEY, STATE_KEY, FORMAT = "smooseg_fast.checkpoint", "smooseg_fast.training", 7


@dataclass(frozen=True)
class Fine:
    """An untrained head with fine prototypes, their tree, and the patch nearest to each, uint8 [K0,S,S,3], if known."""

    head: Head
    tree: Tree
    typical: Tensor | None = None

    @property
    def most(self) -> int:
        """The most groups that the tree can be cut into."""
        return len(self.tree.splits()) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a file."""
        pairs, tree = self.tree.pairs, self.tree
        arrays = {"closeness": pairs.closeness, "weight": pairs.weight, "lengths": pairs.lengths, "shares": tree.shares}
        arrays["temper"] = np.array([tree.temper])
        typical = {} if self.typical is None else {"typical": self.typical}
        tensors = {name: torch.from_numpy(value) for name, value in arrays.items()}
        return {f"head.{name}": value.cpu() for name, value in self.head.state_dict().items()} | tensors | typical

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Fine:
        """From `tensors`; the tree is grown again. ValueError or KeyError where something does not fit."""
        weights = {name.removeprefix("head."): value for name, value in tensors.items() if name.startswith("head.")}
        head = head_of(weights)
        K, values = len(head.teacher), {}
        shapes = {"closeness": (K, K), "weight": (K, K), "lengths": (K,), "shares": (K,), "temper": (1,)}
        for name, shape in shapes.items():
            values[name] = tensors[name].numpy()
            if values[name].shape != shape or values[name].dtype != np.float64 or not np.isfinite(values[name]).all():
                raise ValueError(f"{name} of the tree is not finite float64 {list(shape)}")
        typical = tensors.get("typical")
        if typical is not None and (typical.dtype != torch.uint8 or len(typical) != K or typical.shape[3:] != (3,)):
            raise ValueError(f"typical patches of the tree are not uint8 [{K},S,S,3]")
        pairs = Pairs(values["closeness"], values["weight"], values["lengths"])
        return cls(head, Tree.grow(pairs, values["shares"], float(values["temper"][0])), typical)


@dataclass
class Checkpoint:
    """One head. `config` describes it alone, with every choice resolved (number of prototypes, backbone, sizes).

    backbone_licence: of the weights that the features came from, or "unknown".
    fine: the groups that the head started from, and the tree that gives any other number of them. None for a head
        whose prototypes were groups from the start.
    reading: how the files of images became pictures; new images are read alike.
    groups: the number of groups in use; None for as many as the head was trained for.
    share: the least share of the area that a group needs; parts of the tree below it join their nearest group.
    naming: what people call the groups.
    """

    config: TrainConfig
    head: Head
    step: int
    backbone_name: str
    backbone_digest: str
    backbone_licence: str = "unknown"
    class_names: tuple[str, ...] | None = None
    report: dict[str, Any] = field(default_factory=dict)  # figures of the run, ready for JSON
    fine: Fine | None = None
    groups: int | None = None
    share: float = 0.0
    reading: Reading = PLAIN
    naming: Naming = UNNAMED

    @property
    def trained(self) -> int:
        """The number of groups of the head."""
        return len(self.head.teacher)

    @property
    def grouping(self) -> Grouping:
        """How features are labelled: by the trained head, or by fine prototypes where nothing was trained, at other
        numbers of groups, and with a least share."""
        if self.fine is None or (self.step and not self.share and self.groups in (None, self.trained)):
            return Grouping(self.head)
        return Grouping(self.fine.head, self.fine.tree.cut(self.groups or self.trained, least_share=self.share))

    @property
    def cut(self) -> np.ndarray:
        """The group of every fine group, int64 [K0]; of every prototype where there is no tree."""
        if self.fine is None:
            return np.arange(self.trained)
        return self.fine.tree.cut(self.groups or self.trained, least_share=self.share)

    @property
    def names(self) -> Names:
        """The names, colours and merges of the groups in use."""
        return self.naming.at(self.cut, self.share)

    @property
    def shares(self) -> list[float] | None:
        """The share of the training images' area in every group before merging; None where nobody measured it."""
        measured = self.report.get("health", {}).get("shares")
        if measured is not None and self.groups in (None, self.trained) and not self.share:
            return measured  # training has moved them
        return None if self.fine is None else np.bincount(self.cut, self.fine.tree.shares).tolist()

    @property
    def listed(self) -> list[Group]:
        """The groups after merging, in the order of their numbers in a mask."""
        return self.names.listed(self.shares)

    @property
    def proposed(self) -> dict[str, str] | None:
        """The names, by group, that the labels of training proposed; None without labels, and of other groups."""
        if self.groups is not None or self.share or self.names.merge:
            return None
        return self.report.get("scores", {}).get("proposed")

    @property
    def digest(self) -> str:
        """A hex digest of all that was learnt, of its groups before merging, of how images are resized, and of the
        margin, without the backbone."""
        grouping, config = self.grouping, self.config
        groups = [] if grouping.groups is None else grouping.groups.tolist()
        return digest_of(grouping.head.state_dict(), config.resample, str(config.margin), str(groups))

    def named(self, names: Names) -> Checkpoint:
        """The same run with these names in place of those of its groups in use, or, where they are of another number of
        groups or another least share, of that cut. UserError where the tree has no such cut."""
        here = (names.groups, names.least_share) == (self.names.groups, self.share)
        place = self if here else self.at(names.groups, share=names.least_share)
        return dataclasses.replace(self, naming=self.naming.changed(place.cut, names))

    def at(self, groups: int | None = None, threshold: float | None = None, share: float | None = None) -> Checkpoint:
        """The same run with so many groups, with its tree cut at a height, or, where a least share is all that is
        given, with every group that has it. Without one, the least share stays. UserError where there is no such cut.
        """
        flag = "--groups" if groups is not None else "--share" if threshold is None else "--cut"
        flag += f" {next(value for value in (groups, threshold, share, 0) if value is not None):g}"
        if self.fine is None:
            raise UserError(f"{flag}: the checkpoint was learnt without a tree; its {self.trained} groups are fixed")
        share = self.share if share is None else float(share)
        SHARE.check("--share", share)
        most = len(self.fine.tree.splits(share)) + 1
        if threshold is not None:
            groups = int(self.fine.tree.cut(threshold=threshold, least_share=share).max()) + 1
        groups = most if groups is None else groups
        if not 1 <= groups <= most:
            large = f" of at least {100 * share:g} % of the area" if share else ""
            raise UserError(f"{flag}: the tree can be cut into 1 to {most} groups{large}; give such a number")
        return dataclasses.replace(self, groups=None if groups == self.trained else groups, share=share)

    def write(self, path: str | Path) -> Path:
        header = {
            "step": self.step,
            "backbone": {
                "name": self.backbone_name,
                "digest": self.backbone_digest,
                "licence": self.backbone_licence,
            },
            "class_names": self.class_names,
            "config": dataclasses.asdict(self.config),
            "report": self.report,
            "groups": self.groups,
            "share": self.share,
            "reading": self.reading.as_json(),
            "naming": self.naming.as_json(),
        }
        parts = {"head": self.head.state_dict()} | ({} if self.fine is None else {"fine": self.fine.tensors()})
        return _write(path, KEY, header, parts)


@dataclass
class TrainingState:
    """An unfinished run after `step` steps.

    Nothing random needs saving: the draws of a step depend on its number and the seeds alone.
    """

    config: TrainConfig
    step: int
    heads: Mapping[str, Tensor]  # the state of all H heads, [H,...] under a head's names
    optimizer: Mapping[str, Tensor]  # Adam's state as `optimizer_tensors` gives it
    losses: Mapping[str, Tensor]  # those of the last step, by their names in SmooSegLoss
    fine: Mapping[int, Fine]  # what the heads of each seed started from; empty without a tree
    reasons: dict[str, Any] | None  # for the number of groups, ready for JSON
    windows: tuple[int, int] | None  # number of windows that features are streamed through, and steps in each

    def write(self, path: str | Path) -> Path:
        header = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "windows": self.windows,
            "reasons": self.reasons,
        }
        parts = {"heads": self.heads, "optimizer": self.optimizer, "losses": self.losses}
        return _write(path, STATE_KEY, header, parts | {f"fine {s}": fine.tensors() for s, fine in self.fine.items()})


def read_checkpoint(path: str | Path, *, advice: str | None = None) -> Checkpoint:
    """UserError in one line for a missing, damaged or foreign file; `advice` says what to do about a damaged one."""
    path = Path(path).expanduser()
    if advice is not None:
        return _read(path, KEY, _checkpoint, place=str(path), advice=advice)
    return _read(path, KEY, _checkpoint, place=f"--checkpoint {path}", advice="copy it again or train again")


def read_training_state(path: str | Path) -> TrainingState:
    """UserError in one line for a missing, damaged or foreign file."""
    advice = "remove it to train from the first step, or give another --out"
    return _read(Path(path), STATE_KEY, _training_state, place=str(path), advice=advice)


def _write(path: str | Path, key: str, header: dict[str, Any], parts: Parts) -> Path:
    tensors = {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, values in parts.items()
        for name, value in values.items()
    }
    return write_atomic(path, save(tensors, {key: sealed({"format": FORMAT, **header}, tensors)}))


def sealed(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The JSON of `header`, with a digest of it and of the `tensors` of the file."""
    header = finite(header) | {"digest": None}
    return json.dumps(header | {"digest": digest_of(json.dumps(header), tensors)})


def _read(path: Path, key: str, build: Callable[[dict[str, Any], Parts], T], *, place: str, advice: str) -> T:
    usual = key.rpartition(".")[2] + ".safetensors"
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{place}: {what}; give the {usual} that training wrote")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(key)
            if text is not None:
                header = json.loads(text)
                if header["format"] != FORMAT:
                    raise ValueError(f"format {header['format']}, this version reads {FORMAT}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if text != sealed(header, tensors):
                    raise ValueError("it has changed since it was written")
                parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
                for full_name, tensor in tensors.items():
                    part, name = full_name.split(".", 1)
                    parts[part][name] = tensor
                return build(header, parts)
    except Exception as error:  # whatever a damaged or foreign file makes fail
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{place}: damaged, or written by another version ({reason}); {advice}") from error
    raise UserError(f"{place}: a safetensors file of another kind; give a {usual} that training wrote")


def _checkpoint(header: dict[str, Any], parts: Parts) -> Checkpoint:
    step, backbone, names, report = (header[name] for name in ("step", "backbone", "class_names", "report"))
    texts = [backbone["name"], backbone["digest"], backbone["licence"], *(names or ())]
    if type(step) is not int or not isinstance(report, dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError("its header holds values of the wrong kind")
    config = TrainConfig(**header["config"])
    check_fields(config)
    if None in (config.size, config.eval_size) or config.backbone == AUTO:
        raise ValueError("its sizes or its backbone are not chosen")
    checkpoint = Checkpoint(
        config=config,
        head=head_of(parts["head"]),
        step=step,
        backbone_name=backbone["name"],
        backbone_digest=backbone["digest"],
        backbone_licence=backbone["licence"],
        class_names=None if names is None else tuple(names),
        report=report,
        fine=Fine.of(parts["fine"]) if "fine" in parts else None,
        reading=Reading.from_json(header["reading"]),
    )
    checkpoint.naming = Naming.from_json(header["naming"], len(checkpoint.cut))
    groups, share = header["groups"], header["share"]
    if type(share) is not float:
        raise ValueError("its header holds values of the wrong kind")
    return checkpoint if groups is None and not share else checkpoint.at(groups or checkpoint.trained, share=share)


def head_of(weights: Mapping[str, Tensor]) -> Head:
    """The head with this state. ValueError or KeyError where names, shapes or values do not fit."""
    head = _head_for(weights)
    for name, value in weights.items():
        if not value.float().isfinite().all():
            raise ValueError(f"{name} has values that are NaN or infinite")
    head.load_state_dict(weights)
    return head


def _head_for(weights: Mapping[str, Tensor]) -> Head:
    """A head that takes this state. ValueError or KeyError where names or shapes do not fit."""
    (K, Z), (_, N), basis = weights["student"].shape, weights["projection.linear.weight"].shape, weights.get("basis")
    if not 1 <= K <= GROUPS:
        raise ValueError(f"{K} prototypes, and 1 to {GROUPS} are possible")
    # before a head is made: a small file may claim a network that fits into no memory
    shapes: dict[str, tuple[int, ...]] = {"student": (K, Z), "teacher": (K, Z)}
    if basis is not None:
        shapes["basis"] = (N, basis.shape[1])
    for layer, (rows, columns) in {"linear": (Z, N), "hidden": (N, N), "outer": (Z, N)}.items():
        shapes |= {f"projection.{layer}.weight": (rows, columns), f"projection.{layer}.bias": (rows,)}
    for name, shape in shapes.items():
        value = weights[name]
        if value.shape != shape or not value.is_floating_point():
            raise ValueError(f"{name} is {value.dtype} {list(value.shape)} and not numbers {list(shape)}")
    return Head(N, K, Z, basis=basis)


def _training_state(header: dict[str, Any], parts: Parts) -> TrainingState:
    config = TrainConfig(**header["config"])
    check_fields(config)
    step, windows, reasons = (header[name] for name in ("step", "windows", "reasons"))
    two = windows is None or (isinstance(windows, list) and len(windows) == 2)
    natural = two and all(type(number) is int and number >= 0 for number in (step, *(windows or ())))
    if not natural or config.steps is None or step > config.steps or not isinstance(reasons, dict | None):
        raise ValueError("its header holds values of the wrong kind")
    heads, optimizer = parts["heads"], parts["optimizer"]
    _head_for({name: value[0] for name, value in heads.items()})
    Heads.from_state(heads)  # raises where names or shapes do not fit
    several = [value for part in (heads, optimizer) for value in part.values() if value.ndim]
    # a head may have diverged, and the others continue; none can be left out of the file
    if not any(all(value[h].isfinite().all() for value in several) for h in range(len(heads["student"]))):
        raise ValueError("every head has values that are NaN or infinite")
    return TrainingState(
        config=config,
        step=step,
        heads=heads,
        optimizer=optimizer,
        losses=parts["losses"],
        reasons=reasons,
        fine={int(name[5:]): Fine.of(tensors) for name, tensors in parts.items() if name.startswith("fine ")},
        windows=None if windows is None else tuple(windows),
    )


def optimizer_tensors(optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """Adam's state under flat names: the parameter's number, a dot and the moment."""
    states = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Adam, tensors: Mapping[str, Tensor]) -> None:
    """Loads the state that `optimizer_tensors` gave. ValueError where it is another optimiser's."""
    states: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        parameter, moment = name.split(".")
        states[int(parameter)][moment] = value
    parameters = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for number, state in states.items():
        if {state[name].shape for name in ("exp_avg", "exp_avg_sq")} != {parameters[number].shape}:
            raise ValueError(f"the moments of parameter {number} do not fit")
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
