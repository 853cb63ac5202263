"""What a run is: one flat, typed configuration, saved with every checkpoint, and the presets that are starting points for it."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import UserError
from .system.sizes import parse_size

IMPLS = ("auto", "triton", "torch", "dense")
PRECISIONS = ("auto", "float32", "bfloat16")
BACKBONE_PRECISIONS = (*PRECISIONS, "float16")
INITS = ("random", "pca-kmeans")
CROPS = ("center", "slide", "five")
RESAMPLES = ("nearest", "bilinear")
LOGS = (None, "tensorboard")
ON_DRIFT = ("warn", "stop")
LARGEST = 1 << 16  # pixels of a side
GROUPS = 255  # the most that an 8-bit mask holds
KINDS = {
    str: (str, "text"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
}


@dataclass(frozen=True)
class Thresholds:
    """Closeness above which a pair of patches is pulled together and below which it is pushed apart.

    within, across: for patches of one image, and of two. relative: they are an excess over the measured mean closeness, so b = M + threshold.
    """

    within: float
    across: float
    relative: bool


@dataclass(frozen=True)
class Variant:
    """What distinguishes one head of a run from the others."""

    seed: int
    thresholds: Thresholds

    @property
    def granularity(self) -> float | None:
        """The one number behind relative thresholds; None for absolute ones."""
        return self.thresholds.within if self.thresholds.relative else None

    @property
    def name(self) -> str:
        """The stem of the head's file."""
        return self.label().replace(", ", "_").replace(" ", "_")

    def label(self) -> str:
        """Names the head in text."""
        seed = f"seed {self.seed}"
        return seed if self.granularity is None else f"granularity {self.granularity:g}, {seed}"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learn to segment a folder of images without labels.

    The defaults shown are those of the preset that was chosen: folder with --data, demo without.
    """

    preset: str = "folder"
    """Where the other defaults come from: demo, folder, cityscapes, cocostuff27 or potsdam."""
    data: str | None = None
    """Folder of images in any nesting; or DIR/images and DIR/labels, with train/, val/ or test/ above them; or Cityscapes, COCO-Stuff,
    Potsdam or PASCAL VOC as their owners pack them (python -m smooseg_fast.data check DIR)."""
    out: str | None = None
    """Folder for what the run makes [runs/NAME]. The same command on it resumes an unfinished run."""
    backbone: str = "filterbank"
    """Frozen features: filterbank (built in), a transformers ViT by hub name or folder, a DINO or DINOv2 .pth, or module:callable."""
    backbone_precision: str = "auto"
    """What a ViT backbone computes in: float32, bfloat16, float16, or auto: half precision on a GPU and on a CPU with matrix units (AMX,
    a third of the time there), else float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""
    impl: str = "auto"
    """How the objective is computed: auto, triton, torch or dense. Honoured or refused, never swapped."""
    precision: str = "auto"
    """Of the projection's matrix products: float32, bfloat16 (weights, sums and the objective stay in float32), or auto: bfloat16 on a GPU,
    else float32. On a CPU with AMX a step in bfloat16 takes about 0.6 of the time of one in float32 (384 channels, 784 patches)."""
    cache: str | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""
    cache_limit: str | None = None
    """Room that the cache may take, such as 50GB [all there is]. For it the features of other runs go, the longest unused first. Where
    those of this run alone take more, training streams: batches come from one part of the images after another, whose features are made
    anew in every pass."""

    size: int = 224
    """Pixels of the short side for training; squares of this side are cut."""
    eval_size: int = 320
    """Pixels of the short side for evaluation and prediction."""
    crops: str = "slide"
    """slide: squares along the long side, so that the whole image is seen. center: the middle square alone. five: the corners and
    the centre at half the height and width, as the paper does for Cityscapes and COCO-Stuff."""
    resample: str = "nearest"
    """nearest (as in the paper) or bilinear."""

    prototypes: int | None = None
    """Number of groups to look for, an upper bound [the number of classes, or 16 without labels]."""
    granularity: tuple[float, ...] | None = (0.06, -0.05, 0.0, 0.03, 0.1)
    """How fine the grouping is: patches pull together when their closeness exceeds the measured mean by this much. Lower merges
    (fewer groups in use), higher splits (more). Several values are learnt at once and shown side by side; the first is what predict uses.
    Takes the place of both thresholds."""
    threshold_within: float | None = None
    """Closeness above which patches of one image pull together, as an absolute number; goes with --threshold-across."""
    threshold_across: float | None = None
    """The same for patches of different images."""
    temperature: float = 0.1
    """Of the softmax over cosines to the teacher's prototypes."""

    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 16
    """Squares a step, at least 2; fewer if there are not as many. Several processes (torchrun) share them."""
    patches: int | None = None
    """Random patches of each square a step; all by default. 196 learn as well at a quarter of the cost."""
    lr: float = 1e-4
    """Adam's learning rate of the projection."""
    lr_prototypes: float = 5e-4
    """Adam's learning rate of the student's prototypes."""
    dropout: float = 0.2
    """Share of feature channels hidden from an image in each mask."""
    teacher_decay: float = 0.998
    """How slowly the teacher's prototypes follow the student's."""
    code_dim: int = 64
    """Channels of a code: what the projection makes of a patch's features."""
    init: str = "pca-kmeans"
    """Where learning starts: pca-kmeans (the features' leading singular vectors, and k-means; steadier) or random (as in the paper)."""
    heads: int = 1
    """How many seeds are learnt at once, from --seed upwards, on the same batches; with several granularities, as many of each."""
    seed: int = 0
    """Of the initial weights."""
    data_seed: int = 0
    """Of batches, partners and masks."""

    on_drift: str = "warn"
    """When labels turn into kinds of images (I(image;label)/H(label) well above its early value): warn, or stop once every head does.
    stop ends the run at that step, with everything a run ends with."""

    deterministic: bool = False
    """Bit-equal reruns on a GPU too, a little slower; on a CPU they always are."""
    log: str | None = None
    """tensorboard: write the curves for it too, into tensorboard/ below --out."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    verbose: bool = False
    """Print the figures for experts too: energies, closeness, perplexity, modularity. They are always in metrics.jsonl and report.json."""

    @property
    def limit(self) -> int | None:
        """Bytes of the cache."""
        return None if self.cache_limit is None else parse_size(self.cache_limit, "--cache-limit")

    @property
    def relative(self) -> bool:
        """Whether thresholds are an excess over the measured mean closeness."""
        return self.granularity is not None

    def __post_init__(self) -> None:
        if self.granularity is not None:  # a number is a list of one
            values = [self.granularity] if isinstance(self.granularity, (int, float)) else self.granularity
            object.__setattr__(self, "granularity", tuple(float(value) + 0.0 for value in values))  # -0.0 is 0.0
        for name in ("data", "out"):  # one name for one folder, however it is typed
            value = getattr(self, name)
            if isinstance(value, str) and value:
                object.__setattr__(self, name, str(Path(os.path.expanduser(value))))

    def thresholds(self) -> tuple[Thresholds, ...]:
        """One for every granularity, or the one pair of absolute thresholds."""
        if self.granularity is None:
            return (Thresholds(self.threshold_within, self.threshold_across, relative=False),)
        return tuple(Thresholds(value, value, relative=True) for value in self.granularity)

    def variants(self) -> tuple[Variant, ...]:
        """The heads of a run: every granularity (or the one pair of thresholds) with every seed."""
        seeds = range(self.seed, self.seed + self.heads)
        return tuple(Variant(seed, thresholds) for thresholds in self.thresholds() for seed in seeds)

    def alone(self, variant: Variant) -> TrainConfig:
        """The settings of a run that learns this head and no other."""
        granularity = None if variant.granularity is None else (variant.granularity,)
        return dataclasses.replace(self, granularity=granularity, seed=variant.seed, heads=1)

    def check(self) -> None:
        """UserError for the first value that cannot be; names the flag, the value and the legal ones."""
        self.check_values()
        self._check_thresholds()
        for name in ("data", "out", "cache"):
            if getattr(self, name) == "":
                raise UserError(f"{flag(name)}: is empty; give a folder, or leave it out")

    def check_values(self) -> None:
        """The part of `check` that looks at each value alone, and not at whether there are thresholds to train with."""
        for name, (kind, words, optional) in _kinds().items():
            value = getattr(self, name)
            if not (value is None and optional) and (
                not isinstance(value, kind) or (kind is not bool and isinstance(value, bool))
            ):
                raise UserError(f"{flag(name)}: must be {words}, got {value!r:.80}")
        choices = dict(
            impl=IMPLS, precision=PRECISIONS, backbone_precision=BACKBONE_PRECISIONS, init=INITS, crops=CROPS
        )
        choices |= dict(resample=RESAMPLES, log=LOGS, on_drift=ON_DRIFT)
        for name, legal in choices.items():
            if getattr(self, name) not in legal:
                raise UserError(
                    f"{flag(name)}: {getattr(self, name)!r} is not known; choose one of {', '.join(filter(None, legal))}"
                )
        if self.cache_limit is not None:
            parse_size(self.cache_limit, "--cache-limit")
        lowest = dict(
            heads=1,
            size=8,
            eval_size=8,
            prototypes=1,
            steps=1,
            batch_size=2,
            patches=1,
            code_dim=1,
            seed=0,
            data_seed=0,
            log_every=1,
            checkpoint_every=1,
        )
        for name, low in lowest.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UserError(f"{flag(name)}: must be at least {low}, got {value}")
        for name in ("size", "eval_size"):
            if getattr(self, name) > LARGEST:
                raise UserError(f"{flag(name)}: must be at most {LARGEST:,} pixels, got {getattr(self, name)}")
        for name, last in (("seed", self.seed + self.heads - 1), ("data_seed", self.data_seed)):
            if last >= 2**63:
                raise UserError(f"{flag(name)}: must be below 2^63, got {last}")
        if self.prototypes is not None and self.prototypes > GROUPS:
            raise UserError(
                f"--prototypes: must be at most {GROUPS}, the most that an 8-bit mask can hold, got {self.prototypes}"
            )
        if self.granularity is not None and len({f"{value:g}" for value in self.granularity}) < max(
            1, len(self.granularity)
        ):
            raise UserError(
                f"--granularity: give one or more different numbers, got {' '.join(map(str, self.granularity)) or 'none'}"
            )
        for name, low, high in (
            ("temperature", 1e-6, 1e6),
            ("lr", 0, 1e3),
            ("lr_prototypes", 0, 1e3),
            ("dropout", 0, 0.99),
            ("teacher_decay", 0, 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UserError(f"{flag(name)}: must be between {low:g} and {high:g}, got {value}")

    def _check_thresholds(self) -> None:
        if (self.threshold_within is None) != (self.threshold_across is None):
            missing = "threshold_within" if self.threshold_within is None else "threshold_across"
            raise UserError(f"{flag(missing)}: missing; absolute thresholds are given as a pair")
        if self.granularity is None and self.threshold_within is None:
            raise UserError("--granularity: missing; give it, or --threshold-within and --threshold-across")
        if self.granularity is not None and self.threshold_within is not None:
            raise UserError(
                "--granularity: takes the place of the thresholds; leave out either it or --threshold-within and --threshold-across"
            )
        for variant in self.variants():
            pair = variant.thresholds.within, variant.thresholds.across
            if not all(map(math.isfinite, pair)):
                raise UserError(f"--granularity or thresholds: must be finite, got {pair}")

    def learning(self) -> dict[str, Any]:
        """The values that decide what is learnt: everything except output, logging and the machine."""
        output = ("out", "cache", "cache_limit", "log", "log_every", "checkpoint_every", "verbose")
        skip = (*output, "device", "backbone_precision", "precision", "impl", "deterministic")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in skip}


@cache
def _kinds() -> dict[str, tuple[type, str, bool]]:
    """The fields of one value, each with its kind, the words for it, and whether it may be None."""
    found = {}
    for name, hint in get_type_hints(TrainConfig).items():
        parts = get_args(hint) or (hint,)
        if parts[0] in KINDS:
            found[name] = (*KINDS[parts[0]], type(None) in parts)
    return found


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


_PAPER = dict(
    granularity=None,
    init="random",
    crops="five",
    batch_size=32,
    steps=3000,
    backbone="facebook/dino-vits8",
    checkpoint_every=500,
    log_every=50,
)

PRESETS: dict[str, TrainConfig] = {
    # a hand-made backbone on made-up textures: many equal classes, so finer than photos, and more to learn, so longer and faster
    "demo": TrainConfig(preset="demo", granularity=(0.2,), lr=3e-4, steps=600, patches=196, eval_size=224),
    "folder": TrainConfig(),
    "cityscapes": TrainConfig(
        preset="cityscapes", threshold_within=-0.02, threshold_across=0.5, prototypes=27, **_PAPER
    ),
    "cocostuff27": TrainConfig(
        preset="cocostuff27", threshold_within=-0.02, threshold_across=0.48, prototypes=27, **{**_PAPER, "steps": 8000}
    ),
    "potsdam": TrainConfig(
        preset="potsdam",
        threshold_within=0.1,
        threshold_across=0.5,
        prototypes=3,
        eval_size=224,
        **{**_PAPER, "backbone": "facebook/dino-vitb8", "crops": "center"},  # its images are tiles already
    ),
}


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise UserError(f"--preset: {name!r} is not known; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


def with_changes(base: TrainConfig, **changes: Any) -> TrainConfig:
    """`base` with changes; thresholds that are named switch the granularity off, and the other way round."""
    unknown = set(changes) - {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown:
        raise UserError(
            f"{sorted(unknown)[0]}: is not a setting; known are {', '.join(f.name for f in dataclasses.fields(TrainConfig))}"
        )
    changes = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in changes.items()}
    named_thresholds = changes.get("threshold_within") is not None or changes.get("threshold_across") is not None
    if named_thresholds and "granularity" not in changes:
        changes["granularity"] = None
    if changes.get("granularity") is not None and not named_thresholds:
        changes |= {"threshold_within": None, "threshold_across": None}
    config = dataclasses.replace(base, **changes)
    config.check()
    return config
