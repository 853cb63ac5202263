"""Settings of a run: one flat, typed configuration that is saved with every checkpoint, and presets to start from.

Every field declares its legal values (system/fields): the command line, `fit` and the headers of checkpoints are held
against the same.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from numbers import Real
from typing import Annotated, Any, Literal

from .errors import UserError
from .system.commandline import nearest
from .system.fields import Bounds, Group, OneOf, Value, check_fields, fields_of
from .system.readingflags import WORDS, Bands, Intensity, Pages
from .system.sizes import parse_size
from .system.stores import place

GROUPS = 255  # the most that an 8-bit mask holds
FINE = 64  # prototypes that a tree merges, by default
REFINE: Refine = "guided"  # how labels are refined by the picture: border F gained on each of five sets, with six seeds
PAPER_REFINE: Refine = "crf"  # the second row of the paper's tables
TUNING = 60  # steps after a tree, where they help

PresetName = Literal["demo", "folder", "cityscapes", "cocostuff27", "potsdam"]
Impl = Literal["auto", "triton", "torch", "dense"]
Precision = Literal["auto", "float32", "bfloat16"]
BackbonePrecision = Literal["auto", "float32", "bfloat16", "float16"]
Init = Literal["tree", "pca-kmeans", "random"]
Crops = Literal["center", "slide", "five", "tiles"]
Resample = Literal["nearest", "bilinear"]
Refine = Literal["none", "guided", "joint", "crf", "crf-exact"]
Side = Annotated[int, Bounds(8, 1 << 16, " pixels")]
CLOSENESS = Bounds(-2.0, 2.0)  # cosines differ by no more
SHARE = Bounds(0.0, 1.0)  # of the area
SEEDS = Bounds(0, 2**63 - 1)
Seed = Annotated[int, SEEDS]
AtLeastOne = Annotated[int, Bounds(1)]
Folder = Annotated[str, Value("FOLDER")]
Device = Annotated[str, Value("DEVICE")]
Backbone = Annotated[str, Value("NAME")]
FIT, NATIVE = "fit", "native"
AUTO = "auto"  # the backbone that `backbones.auto` chooses
Ignored = Annotated[tuple[int, ...], Value("NUMBER"), Bounds(0, 0xFFFFFF)]
SHIFTS = OneOf((1, 2, 4))
Shifts = Annotated[int, Value("{1,2,4}"), SHIFTS]
CacheLimit = Annotated[str, Value("SIZE"), parse_size]


def distinct(granularity: tuple[float, ...], flag: str) -> None:
    """UserError when heads would be called alike."""
    if len({f"{value:g}" for value in granularity}) < max(1, len(granularity)):
        raise UserError(f"{flag}: give one or more different numbers, got {granularity}")


def scale_factor(scale: str) -> float | None:
    """The factor of an image's height and width; None for "fit"."""
    return None if scale == FIT else 1.0 if scale == NATIVE else float(scale)


def scale_words(scale: Any) -> Any:
    """Scales as --scale has them: a word or a number is a list of one; what is neither stays for `legal_scales`."""
    scales = (scale,) if isinstance(scale, (str, Real)) else scale
    if not isinstance(scales, (list, tuple)) or not all(scales):
        return scale
    return tuple(f"{item:g}" if isinstance(item, Real) else item for item in scales)


def legal_scales(scales: tuple[str, ...], flag: str) -> None:
    """UserError unless it is "fit" alone, or one or several factors, largest first."""
    try:
        factors = [scale_factor(scale) for scale in scales]
    except ValueError:
        factors = []
    if factors == [None]:
        return
    sizes = [factor for factor in factors if factor is not None and 0.001 <= factor <= 100]
    if not sizes or len(sizes) < len(factors) or sorted(set(sizes), reverse=True) != sizes:
        legal = "fit alone, or native and factors between 0.001 and 100, each once and the largest first"
        raise UserError(f"{flag}: give {legal}; got {' '.join(map(str, scales)):.80}")


@dataclass(frozen=True)
class Thresholds:
    """Closeness above which a pair of patches is pulled together and below which it is pushed apart.

    within, across: for patches of one image, and of two. relative: they are an excess over the measured mean closeness,
    so b = M + threshold.
    """

    within: float
    across: float
    relative: bool


@dataclass(frozen=True)
class Variant:
    """The seed and thresholds that distinguish one head of a run from the others."""

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
    """Learn to segment a folder of images without labels; without arguments, the embedded demo.

    The defaults shown are those of the chosen preset: folder with --data, demo without.
    """

    data: Annotated[str | None, Group("data"), Value("FOLDER", usual=True, stores=True)] = None
    """Folder of images in any nesting, or its URL (s3://, gs://, hf://, https://, zip://), or shard-{000..010}.tar; or
    DIR/images and DIR/labels, with train/, val/ or test/ above them; or Cityscapes, COCO-Stuff, Potsdam or PASCAL VOC
    as their owners pack them (smooseg data check DIR tells what it finds)."""
    preset: PresetName = "folder"
    """Settings to start from; the flags that are given change them."""
    ignore: Ignored = ()
    """Numbers in the label files that count as not labelled, such as 0 for a background; 255 does anyway, unless it is
    one of several grey values from black to white."""
    size: Side | None = None
    """Short side in pixels for training; images are cut into squares of this side. By default, what suits the
    backbone: 224 for most."""
    eval_size: Side | None = None
    """Short side in pixels for evaluation and prediction. By default, what suits the backbone: 320 for most."""
    crops: Crops = "slide"
    """slide cuts squares along the long side, so that the whole image is seen. center cuts the middle square alone.
    five cuts the corners and the centre at half the height and width, as the paper does for Cityscapes and
    COCO-Stuff. tiles lays a grid over the whole image, and takes a sample of it where it is large; a scale other than
    fit needs tiles or center, and takes tiles for slide."""
    scale: Annotated[tuple[str, ...], Value("SCALE"), legal_scales] = (FIT,)
    """fit resizes every image so that its short side is --size; native keeps its own pixels; a number is the factor of
    its height and width. Several, as in --scale 1 0.5, stand side by side in the features: the first is cut into
    squares, and the others add the surroundings of each."""
    margin: Annotated[int, Bounds(0, 1024, " pixels")] = 0
    """Pixels of context on every side of a square, real where the image goes on and mirrored where it ends, whose
    features are thrown away. It takes the trace of the border out of the features, which helps some pictures and hurts
    others."""
    resample: Resample = "nearest"
    """How images are resized; the paper takes nearest."""
    intensity: Intensity = ("data",)
    """Values that become black and white, in images of more than 8 bits: data takes one range for all images, image one
    for each; or give LOW HIGH."""
    bands: Bands | None = None
    """Bands to show as red, green and blue, e.g. 4 3 2, or one as grey [the first three]."""
    pages: Pages = "1"
    """Page of a stack (TIFF, WebP) to read; all makes an image of every page."""

    backbone: Annotated[Backbone, Group("features")] = AUTO
    """Frozen features: auto (the best that is on this machine), filterbank (built in), efficientnet-lite0 (from a
    wheel), a transformers ViT by hub name or folder, a DINO, DINOv2 or DINOv3 .pth, or module:callable. smooseg
    backbones lists them."""
    backbone_precision: BackbonePrecision = "auto"
    """Number format of a ViT backbone. auto takes half precision on a GPU and on a CPU with matrix units (AMX), where
    it needs a third of the time, and float32 elsewhere."""
    device: Device = "auto"
    """cpu, cuda, cuda:1, mps, or auto: a GPU if there is one."""
    cache: Folder | None = None
    """Folder of the feature cache [~/.cache/smooseg_fast]."""
    cache_limit: CacheLimit | None = None
    """Maximum size of the feature cache, e.g. 50GB (default: unlimited). Least recently used features go first. If the
    features of this run alone exceed it, training streams: each pass recomputes them, one part of the images after
    another."""

    prototypes: Annotated[
        int | None, Group("learning"), Bounds(2, GROUPS, ", the most that an 8-bit mask can hold")
    ] = None
    """Number of fine groups that the tree merges, or the maximum number of groups with another --init [64 with a tree,
    else the number of classes, or 16 without labels]."""
    groups: Annotated[int | None, Bounds(1, GROUPS)] = None
    """Number of groups [chosen without labels]. Any other number can be looked up in the tree later, at once, with
    smooseg choose."""
    granularity: Annotated[tuple[float, ...] | None, CLOSENESS, distinct] = (0.0,)
    """How training moves the groups: patches pull together when their closeness exceeds the measured mean by this much.
    Lower values merge groups, higher values split them. Several values are learnt at once, each by a head of its own;
    the first one predicts. Replaces both thresholds."""
    threshold_within: Annotated[float | None, CLOSENESS] = None
    """Closeness above which patches of the same image pull together, as an absolute number; needs
    --threshold-across."""
    threshold_across: Annotated[float | None, CLOSENESS] = None
    """Closeness above which patches of different images pull together; needs --threshold-within."""
    temperature: Annotated[float, Bounds(1e-6, 1e6)] = 0.1
    """Temperature of the softmax over cosines to the teacher's prototypes."""
    steps: Annotated[int | None, Bounds(0)] = None
    """Optimiser steps. After a tree they move the borders of its groups; 0 leaves the groups as the tree has them. By
    default 60 for colour pictures seen by a network, where they helped, and 0 for others, where they hurt."""
    batch_size: Annotated[int, Bounds(2)] = 16
    """Squares per step; fewer if there are not as many."""
    patches: AtLeastOne | None = 196
    """Random patches of each square per step; None takes all. 196 learn as well as all 784 at a quarter of the cost."""
    lr: Annotated[float, Bounds(0.0, 1e3)] = 1e-4
    """Learning rate of the projection (Adam)."""
    lr_prototypes: Annotated[float, Bounds(0.0, 1e3)] = 5e-4
    """Learning rate of the student's prototypes (Adam)."""
    dropout: Annotated[float, Bounds(0.0, 0.99)] = 0.2
    """Share of the feature channels that each mask hides from an image."""
    teacher_decay: Annotated[float, Bounds(0.0, 1.0)] = 0.998
    """How slowly the teacher's prototypes follow the student's: the share that they keep in each step."""
    channels: Annotated[int | None, Bounds(2)] = 128
    """Channels of the features that the projection sees: their leading singular directions; None takes all. Its
    time grows with the square of their number. The objective sees all channels."""
    code_dim: Annotated[int, Bounds(1, 4096)] = 64
    """Channels of a code, which the projection computes from the features of a patch."""
    init: Init = "tree"
    """Start of learning. tree sorts patches into fine groups, and merges these by a tree that can be cut into any
    number, then and later. pca-kmeans sorts them into the groups at once; both keep the features' leading singular
    vectors. random is the paper's."""
    heads: Annotated[int, Bounds(1, 1000)] = 1
    """Number of seeds to learn at once, from --seed upwards, on the same batches; every granularity gets as many."""
    seed: Seed = 0
    """Seed of the initial weights."""
    data_seed: Seed = 0
    """Seed of the batches, partners and masks."""
    on_drift: Literal["warn", "stop"] = "warn"
    """warn says when the labels of a head drift; stop ends the run early (all outputs are still written) once every
    head labels whole images instead of the things in them."""
    impl: Impl = "auto"
    """How to compute the objective; triton fuses the projection too. A choice that cannot run is refused."""
    precision: Precision = "auto"
    """Number format of the projection's matrix products; weights, sums and the objective stay in float32. auto takes
    bfloat16 on a GPU and float32 elsewhere. On a CPU with AMX, bfloat16 takes about 0.6 of the time (384 channels, 784
    patches)."""
    deterministic: bool = False
    """Make reruns on a GPU equal bit for bit, a little slower; on a CPU they always are."""

    out: Annotated[Folder | None, Group("output")] = None
    """Folder for all outputs [runs/NAME]. The same command on the same folder resumes an unfinished run."""
    log: Literal["tensorboard", "wandb"] | None = None
    """Show the curves in TensorBoard, too (files in tensorboard/ below --out), or in Weights & Biases (WANDB_MODE)."""
    log_every: AtLeastOne = 20
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: AtLeastOne = 100
    """Steps between checkpoints."""
    verbose: bool = False
    """Print the figures for experts too: energies, closeness, perplexity, modularity. metrics.jsonl and report.json
    always hold them."""

    @property
    def tree(self) -> bool:
        """Whether groups come from a tree, at the start and at other numbers later."""
        return self.init == "tree"

    @property
    def limit(self) -> int | None:
        """Maximum size of the feature cache in bytes; None is unlimited."""
        return None if self.cache_limit is None else parse_size(self.cache_limit, "--cache-limit")

    @property
    def grid_crops(self) -> Crops:
        """`crops`, but tiles for slide at a scale other than fit, where squares do not span the short side."""
        return "tiles" if self.crops == "slide" and self.scale != (FIT,) else self.crops

    def __post_init__(self) -> None:
        values = (self.granularity,) if isinstance(self.granularity, Real) else self.granularity
        if isinstance(values, (list, tuple)) and all(isinstance(value, Real) for value in values):
            # a number is a list of one, and -0.0 is 0.0; `check` refuses what is no number
            object.__setattr__(self, "granularity", tuple(float(value) + 0.0 for value in values))
        object.__setattr__(self, "scale", scale_words(self.scale))
        for name, words in WORDS.items():
            object.__setattr__(self, name, words(getattr(self, name)))
        numbers = (self.ignore,) if isinstance(self.ignore, int) else self.ignore
        object.__setattr__(self, "ignore", tuple(numbers) if isinstance(numbers, list) else numbers)
        for name in ("data", "out"):  # one name for one folder, however it is typed
            value = getattr(self, name)
            if isinstance(value, str) and value:
                object.__setattr__(self, name, str(place(value)))

    @property
    def sides(self) -> tuple[int, int]:
        """Short sides in pixels for training and for evaluation. ValueError before `trainer.resolve` has chosen
        them."""
        if self.size is None or self.eval_size is None:
            raise ValueError("the sizes are not resolved")
        return self.size, self.eval_size

    def thresholds(self) -> tuple[Thresholds, ...]:
        """One for every granularity, or the one pair of absolute thresholds; none for a published checkpoint."""
        if self.granularity is not None:
            return tuple(Thresholds(value, value, relative=True) for value in self.granularity)
        if self.threshold_within is None or self.threshold_across is None:
            return ()
        return (Thresholds(self.threshold_within, self.threshold_across, relative=False),)

    def variants(self) -> tuple[Variant, ...]:
        """The heads of a run: every granularity (or the one pair of thresholds) with every seed."""
        seeds = range(self.seed, self.seed + self.heads)
        return tuple(Variant(seed, thresholds) for thresholds in self.thresholds() for seed in seeds)

    def alone(self, variant: Variant) -> TrainConfig:
        """The settings of a run that learns this head and no other."""
        granularity = None if variant.granularity is None else (variant.granularity,)
        return dataclasses.replace(self, granularity=granularity, seed=variant.seed, heads=1)

    def check(self) -> None:
        """UserError for the first value that is not legal; names the flag, the value and the legal ones."""
        check_fields(self)
        SEEDS.check("--seed", self.seed + self.heads - 1)  # the last head's seed
        if self.crops == "five" and (self.scale != (FIT,) or self.margin):
            other = "--margin" if self.scale == (FIT,) else "--scale"
            raise UserError(f"--crops five: are the paper's, which have no {other}; take --crops tiles with it")
        given = [value is not None for value in (self.granularity, self.threshold_within, self.threshold_across)]
        if given not in ([True, False, False], [False, True, True]):
            raise UserError("--granularity: give either it alone, or both --threshold-within and --threshold-across")
        if not self.steps and not self.tree:
            raise UserError(
                f"--steps 0: --init {self.init} makes no groups without training; give --steps, such as 200"
            )
        groups, most = self.groups, self.prototypes or FINE
        if groups is not None and not self.tree:
            raise UserError(f"--groups {groups}: is a cut of the tree; with --init {self.init}, give --prototypes")
        if groups is not None and groups > most:
            raise UserError(f"--groups {groups}: is more than the {most} prototypes; give more --prototypes")

    def learning(self) -> dict[str, Any]:
        """The values that decide what is learnt: everything except output, logging and the machine."""
        output = ("out", "cache", "cache_limit", "log", "log_every", "checkpoint_every", "verbose")
        skip = (*output, "device", "backbone_precision", "precision", "impl", "deterministic")
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in skip}


CITYSCAPES = TrainConfig(
    preset="cityscapes",
    size=224,
    eval_size=320,
    granularity=None,
    patches=None,
    channels=None,
    threshold_within=-0.02,
    threshold_across=0.5,
    prototypes=27,
    init="random",
    crops="five",
    batch_size=32,
    steps=3000,
    backbone="facebook/dino-vits8",
    checkpoint_every=500,
    log_every=50,
)
# its images are tiles already
TILES: dict[str, Any] = dict(
    backbone="facebook/dino-vitb8", crops="center", prototypes=3, eval_size=224, threshold_within=0.1
)
PRESETS: dict[str, TrainConfig] = {
    # made-up textures have many classes of equal size: finer than photos, and more to learn, so longer and faster
    "demo": TrainConfig(
        preset="demo",
        backbone="filterbank",
        size=224,
        eval_size=224,
        granularity=(0.2,),
        init="pca-kmeans",
        lr=3e-4,
        steps=600,
        patches=196,
    ),
    "folder": TrainConfig(),
    "cityscapes": CITYSCAPES,
    "cocostuff27": dataclasses.replace(CITYSCAPES, preset="cocostuff27", threshold_across=0.48, steps=8000),
    "potsdam": dataclasses.replace(CITYSCAPES, preset="potsdam", **TILES),
}


def preset(name: str) -> TrainConfig:
    """UserError for a name that is none."""
    fields_of(TrainConfig)["preset"].check(name)
    return PRESETS[name]


def with_changes(base: TrainConfig, **changes: Any) -> TrainConfig:
    """`base` with changes; giving thresholds switches the granularity off, and the other way round. UserError for
    illegal values."""
    known = fields_of(TrainConfig)
    for name in changes:
        if name not in known:
            raise UserError(f"{name}: is not a setting{nearest(name, known) or '; known are ' + ', '.join(known)}")
    changes = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in changes.items()}
    if changes.get("granularity") is not None:
        changes = {"threshold_within": None, "threshold_across": None, **changes}
    elif changes.get("threshold_within") is not None or changes.get("threshold_across") is not None:
        changes = {"granularity": None, **changes}
    config = dataclasses.replace(base, **changes)
    config.check()
    return config
