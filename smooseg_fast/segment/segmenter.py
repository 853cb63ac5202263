"""A trained segmenter: an image of any size in, a label for every pixel out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..backbones import Backbone, build_vit, load_backbone
from ..backbones.base import naming
from ..backbones.shifts import interleaved
from ..backbones.upsampler import Upsampler
from ..backbones.weights import is_pickle
from ..config import FIT, REFINE, Refine, TrainConfig, legal_scales, scale_words
from ..datasets import IGNORE
from ..datasets.cutting import Cutting
from ..datasets.images import ImageError, picture_of, read_picture, require_patch
from ..datasets.reading import Picture
from ..errors import UserError
from ..system.host import plain_torch
from .checkpoint import Checkpoint, read_checkpoint
from .model import Head, project
from .names import Group, Names
from .notebook import Displayed
from .parts import parts_at
from .published import read_published
from .refine import Plane, Refiner, refined_bands
from .tiles import TILE, TOP, Start, Tile, all_faded, band_starts, code_bands, label_bands
from .views import Views

ImageLike = Picture | np.ndarray | Image.Image | str | Path
Scale = str | float | Sequence[str | float]


class Segmenter(Displayed):
    """A frozen backbone with learnt projection and prototypes, from `fit` or, by `Segmenter.load`, from a file."""

    path: Path | None = None  # the file it was loaded from
    upsampler: Upsampler | None = None
    names = Names(0)  # of the groups, and which of them are merged

    def __init__(self, checkpoint: Checkpoint, backbone: Backbone, upsampler: Upsampler | None = None):
        given, learnt = backbone.dim * len(checkpoint.config.scale), checkpoint.head.dim
        if given != learnt:
            raise UserError(
                f"--backbone {backbone.name}: gives {given} channels, but the checkpoint was trained on {learnt} of "
                f"{checkpoint.backbone_name}; give that backbone"
            )
        self.checkpoint, self.backbone, self.upsampler = checkpoint, backbone, upsampler
        self.grouping = checkpoint.grouping
        self.head, self.names = self.grouping.head.to(backbone.device).eval(), checkpoint.names
        self.names = checkpoint.names  # of the groups, and which of them are merged

    def __repr__(self) -> str:
        granularity, path = self.config.granularity, self.path
        return (
            f"Segmenter(groups={len(self.groups)}, backbone={self.backbone.name!r}, size={self.config.sides[1]}, "
            f"device={str(self.backbone.device)!r}, step={self.checkpoint.step}"
            + ("" if granularity is None else f", granularity={granularity[0]}")
            + ("" if path is None else f", path={str(path)!r}")
            + ")"
        )

    @classmethod
    @plain_torch()
    def load(
        cls,
        path: str | Path,
        *,
        backbone: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        exact: bool = False,
        upsampler: str | None = None,
    ) -> Segmenter:
        """Read a checkpoint or a published SmooSeg .ckpt without executing anything in it.

        Args:
            backbone: required if the checkpoint was trained on a `module:callable`; may name a local copy of a hub
                model.
            device: "auto", or any device of PyTorch.
            precision: number format of a ViT backbone, see `backbones.load_backbone`. For a checkpoint that the paper's
                authors published, "auto" is float32, as they computed: bfloat16 labels up to 0.8 % of pixels otherwise.
            exact: "auto" is float32 for every checkpoint.
            upsampler: a `module:callable` that refines features by the picture, see `backbones.upsampler`.

        Raises:
            UserError: for a damaged or foreign file, and when the backbone is missing.
        """
        path, device, vit = Path(path).expanduser(), pick_device(device), None
        if is_pickle(path):
            with naming(f"--checkpoint {path}"):
                checkpoint, vit = read_published(path)
        else:
            checkpoint = read_checkpoint(path)
        published = vit is not None or "published" in checkpoint.report
        if precision == "auto" and (exact or published) and ":" not in (backbone or checkpoint.backbone_name):
            precision = "float32"
        if vit is not None and backbone is None:
            frozen = build_vit(str(path), vit, device, precision)
        elif backbone is None and ":" in checkpoint.backbone_name:
            raise UserError(
                f"--backbone: missing; {path} was trained on {checkpoint.backbone_name}, and a checkpoint never "
                f"imports code by itself: add --backbone {checkpoint.backbone_name}"
            )
        else:
            frozen = load_backbone(backbone or _next_to(path, checkpoint.backbone_name), device, precision)
        scales = len(checkpoint.config.scale)
        segmenter = cls(checkpoint, frozen, None if upsampler is None else Upsampler(upsampler, frozen, scales))
        segmenter.path = path
        return segmenter

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint that `load` reads. UserError when it cannot be written."""
        return self.checkpoint.write(path)

    @property
    def config(self) -> TrainConfig:
        """The settings it was trained with."""
        return self.checkpoint.config

    @property
    def groups(self) -> list[Group]:
        """The groups after merging, each with its number in the labels, name, colour and share, by their numbers."""
        return self.names.listed(self.checkpoint.shares)

    def named(self, names: Names) -> Segmenter:
        """The same segmenter with these names, colours and merges. UserError for numbers that it does not have."""
        segmenter = Segmenter(self.checkpoint.named(names.checked("names")), self.backbone, self.upsampler)
        segmenter.path = self.path
        return segmenter

    def at(self, groups: int | None = None, *, cut: float | None = None, share: float | None = None) -> Segmenter:
        """The same segmenter with another number of groups, at once, without training: looked up in the tree of the
        groups that training began with. A group keeps its label where it does not split.

        Args:
            groups: their number; 1 is one group for everything, and that of training is the trained head.
            cut: a height of the tree instead; groups merge above it.
            share: the least share of the area that a group needs, 0 to 1; smaller parts join their nearest group.
                Alone: every group that has it. None keeps that of this segmenter.

        Raises:
            UserError: when it was learnt without a tree, or the tree has no such cut.
        """
        segmenter = Segmenter(self.checkpoint.at(groups, cut, share), self.backbone, self.upsampler)
        segmenter.path = self.path
        return segmenter

    def refinement(self, refine: Refine | None) -> Refine:
        """The refinement that `refine` asks for; None is the default: none for a checkpoint that the paper's authors
        published, whose labels are not refined, else "guided". UserError for one that there is not."""
        if refine not in (None, *get_args(Refine)):
            *others, last = get_args(Refine)
            raise UserError(f"refine: must be {', '.join(others)} or {last}, got {refine!r}")
        return refine or ("none" if "published" in self.checkpoint.report else REFINE)

    @property
    def same_backbone(self) -> bool:
        """True when the backbone has the very weights that the checkpoint was trained on."""
        return self.backbone.digest == self.checkpoint.backbone_digest

    @property
    def digest(self) -> str:
        """That of `Checkpoint.digest`."""
        return self.checkpoint.digest

    @plain_torch()
    def predict(
        self,
        image: ImageLike,
        *,
        mirror: bool = True,
        shifts: int = 1,
        short_side: int | None = None,
        scale: Scale | None = None,
        refine: Refine | None = None,
    ) -> np.ndarray:
        """Label every pixel of an image -> uint8 [H,W], a number of `groups`, or 255 where the image has no data.

        Memory: the image, the labels, and some bands of tiles, however large the image is; another copy of an image
        that has places without data.

        Args:
            image: uint8 [H,W,3] RGB, uint8 [H,W] grey, a Pillow image (not turned), a path (turned upright by EXIF), or
                a `Picture`, which tells where there is no data.
            mirror: average the codes with those of the mirrored image, as the paper does, in twice the time.
            shifts: 2 or 4 see the image as often, each time moved by half a patch, on a grid of half patches; borders
                follow the image more closely, in as many times the time.
            short_side: pixels of the short side when features are computed, at least one patch; by default the
                evaluation size of training. More pixels give finer detail and less context. For the scale "fit" alone.
            scale: "fit", "native" or a factor, as in training; as many as there, largest first. By default those of
                training, or "fit" where `short_side` is given.
            refine: how labels follow the picture's edges: "none", "guided" (guided filter), "joint" (joint bilateral
                upsampling), "crf" (dense CRF on a lattice) or "crf-exact" (over all pairs of pixels). See `refinement`
                for the default.

        Raises:
            UserError: where `picture` raises it, for a scale, short side or refinement that cannot be, and when memory
                runs out.
        """
        picture = self.picture(image)
        with self.memory(image, scale, short_side):
            bands = self.bands(picture, mirror=mirror, shifts=shifts, short_side=short_side, scale=scale, refine=refine)
            return whole(bands, picture)

    @plain_torch()
    def predict_at(self, image: ImageLike, groups: Sequence[int], **options: Any) -> dict[int, np.ndarray]:
        """Label an image at several numbers of groups in one pass of the backbone -> {number: uint8 [H,W]}.

        Each mask is the one that `at(number).predict(image)` gives; options and errors are those of both. Memory: as
        for `predict`, and the masks.
        """
        picture, cuts = self.picture(image), [self.at(number) for number in groups]
        labels = [np.empty(picture.pixels.shape[:2], np.uint8) for _ in cuts]
        with self.memory(image, options.get("scale"), options.get("short_side")):
            for place, part in parts_at(cuts, picture, **options):
                labels[place][part.place.inside] = part.labels
        return dict(zip(groups, labels))

    @plain_torch()
    def predict_proba(self, image: ImageLike, **options: Any) -> np.ndarray:
        """How likely each of `groups` is at every pixel of an image -> float32 [H,W,len(groups)], 1 in all; NaN without
        data.

        They are refined as labels are, from softmax(10 cos) of the upsampled codes and the prototypes (2 cos for a
        CRF); those of merged groups are added. Options and errors are those of `predict`, whose label is the likeliest
        group before merging.
        """
        picture = self.picture(image)
        with self.memory(image, options.get("scale"), options.get("short_side")):
            probs = np.empty((*picture.pixels.shape[:2], len(self.groups)), np.float32)
            for _, part in parts_at([self], picture, soft=True, **options):
                probs[part.place.inside] = part.probs
            return probs

    @contextmanager
    def memory(self, image: ImageLike, scale: Scale | None, short_side: int | None) -> Iterator[None]:
        """UserError that names the image and advises a smaller size where memory runs out."""
        try:
            yield
        except MemoryError as error:
            name = image if isinstance(image, (str, Path)) else "image"
            cutting = self.cutting(scale, short_side)
            fits = cutting.scale == (FIT,)
            at = f"with its short side at {cutting.size} pixels" if fits else f"at --scale {' '.join(cutting.scale)}"
            advice = f"give a smaller {'--short-side' if fits else '--scale'}, or cut it into tiles"
            raise ImageError(name, f"does not fit into memory {at}", advice) from error

    def bands(self, picture: Picture, **options: Any) -> Iterator[np.ndarray]:
        """Label a picture -> bands uint8 [n,W] from top to bottom, IGNORE without data; options as for `predict`."""
        return (part.labels for _, part in parts_at([self], picture, **options))

    def band_start(self, views: Views, row: int) -> int:
        """The row of cells where the band of `code_bands` begins that holds a row of cells."""
        return max(start for start in band_starts(views.grid[0], self.tile_side(views), views.step) if start <= row)

    def tile_side(self, views: Views) -> int:
        """Cells of a tile's side, at most."""
        return max(1, TILE // self.backbone.patch) * views.density

    def code_bands(
        self, views: Views, heads: Sequence[Head], mirror: bool, first: int = 0
    ) -> Iterator[tuple[Tensor, ...]]:
        """The codes [n,w,Z] of a picture in bands of cells from top to bottom, of each of these heads; from row `first`
        of the cells on, one of `band_start`."""
        sizes = [head.teacher.shape[1] for head in heads]

        def codes(tile: Tile) -> Tensor:
            sides = [views.features(tile, side) for side in ((False, True) if mirror else (False,))]
            rows = torch.stack([torch.cat([project(head, side) for head in heads], -1) for side in sides]).float()
            shifted = rows.mean(0).unflatten(1, views.map_of(tile))
            return interleaved(shifted, self.backbone.patch)

        bands = code_bands(views.grid, self.tile_side(views), codes, views.step, first)
        return map(lambda band: tuple(band.split(sizes, -1)), bands)  # which keeps no band while the next one is made

    def label_bands(
        self, views: Views, codes: Iterable[Tensor], picture: Picture, refine: Refine, start: Start = TOP
    ) -> Iterator[np.ndarray]:
        """Label the pixels of a picture by bands of its codes -> bands uint8 [n,W], IGNORE without data; from `start`
        on."""
        bands = self.unmerged_bands(views, codes, picture, refine, start)
        return map(self.names.table.__getitem__, bands) if self.names.merge else bands

    def unmerged_bands(
        self, views: Views, codes: Iterable[Tensor], picture: Picture, refine: Refine, start: Start
    ) -> Iterator[np.ndarray]:
        """Yield the bands of `label_bands`, with the numbers of groups before merging."""
        scores: Iterator[Tensor] = map(self.grouping.scores, codes)
        if refine != "none":
            plane = Plane(views.grid, views.size, views.shape, views.density)
            yield from refined_bands(scores, Refiner(refine, self.grouping, plane), picture, views.patches, start)
            return
        if views.patches is not None:
            scores = all_faded(scores, torch.from_numpy(views.patches), start.cell)
        first = start.pixel
        for band in label_bands(scores, self.grouping.prototypes, views.grid[0], views.size, views.shape, start):
            labels = band.cpu().numpy()
            if views.valid is not None:
                labels[~views.valid[first : first + len(labels)]] = IGNORE
            first += len(labels)
            yield labels

    def cutting(
        self, scale: Scale | None = None, short_side: int | None = None, argument: str = "--short-side"
    ) -> Cutting:
        """How an image is seen with these options of `predict`. UserError where they cannot be; `argument` is the flag
        that gives `short_side`."""
        config, patch = self.config, self.backbone.patch
        if scale is None:
            scale = FIT if short_side is not None and len(config.scale) == 1 else config.scale
        scales = scale_words(scale)
        legal_scales(scales, "--scale")
        text, trained = " ".join(scales), " ".join(config.scale)
        if len(scales) != len(config.scale):
            raise UserError(
                f"--scale {text}: the checkpoint was trained at {len(config.scale)} ({trained}); give as many"
            )
        if scales != (FIT,):
            if short_side is not None:
                raise UserError(f"{argument} {short_side}: belongs to --scale fit, not to {text}; give one of the two")
            side = config.sides[0]  # in training too, an image below it is enlarged
        else:
            side = config.sides[1] if short_side is None else short_side
            if side < patch:
                raise UserError(f"{argument}: must be at least one patch, {patch} pixels, got {side}")
        return Cutting(size=side, resample=config.resample, scale=scales, margin=config.margin)

    def picture(self, image: ImageLike, page: int | None = None) -> Picture:
        """Read what `predict` takes, as the images of training were read; `page` of a stack, from 1.

        ImageError, a UserError, for a file that cannot be decoded and for an image smaller than one patch of the
        backbone; UserError for other arrays.
        """
        name: str | Path = "image"
        if isinstance(image, Picture):
            picture = image
        elif isinstance(image, (str, Path)):
            name, picture = image, read_picture(image, self.checkpoint.reading, page)
        elif isinstance(image, Image.Image):  # np.asarray would give the palette indices of some
            picture = picture_of(image, self.checkpoint.reading)
        else:
            pixels = np.asarray(image)
            if pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)) or pixels.ndim < 2:
                plain = pixels.dtype != object and pixels.ndim
                got = f"{pixels.dtype} {list(pixels.shape)}" if plain else type(image).__name__
                raise UserError(f"image: must be uint8 [H,W,3] RGB or [H,W] grey, a Pillow image, or a path; got {got}")
            picture = Picture(np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels)
        require_patch(picture.pixels, self.backbone.patch, name)
        return picture

    def about(self) -> dict[str, Any]:
        """Return its backbone, the licence of the backbone's weights, step, groups and report, ready for JSON."""
        return {
            "backbone": self.checkpoint.backbone_name,
            "licence": self.checkpoint.backbone_licence,
            "step": self.checkpoint.step,
            "groups": len(self.groups),
            **self.checkpoint.report,
        }


def whole(bands: Iterable[np.ndarray], picture: Picture) -> np.ndarray:
    """Labels uint8 [H,W] of a picture from their bands."""
    labels, first = np.empty(picture.pixels.shape[:2], np.uint8), 0
    for band in bands:
        labels[first : first + len(band)] = band
        first += len(band)
    return labels


def _next_to(checkpoint: Path, name: str) -> str:
    """Find a backbone with a relative path next to the checkpoint first, so that the two can be moved together."""
    place = checkpoint.parent / name
    if (place / "config.json").is_file() or is_pickle(place):
        return str(place)
    if name.startswith("./") and not Path(name).exists():
        raise UserError(
            f"--backbone: missing; {checkpoint} names {name}, and no such folder is next to it: give that folder, "
            "wherever it is now, or the file that it was made from"
        )
    return name


def pick_device(name: str) -> str:
    """Choose the device called `name`: "auto" is the first CUDA or ROCm GPU, else Apple's, else the CPU."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
