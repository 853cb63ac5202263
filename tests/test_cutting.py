"""Squares at several scales, with margins, from a grid over the whole image: where they lie and what they hold."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from smooseg_fast.backbones.base import Backbone
from smooseg_fast.config import TrainConfig, preset, with_changes
from smooseg_fast.datasets import cutting, images, open_dataset
from smooseg_fast.datasets.cutting import TILES, TILES_OF_AN_IMAGE, Cutting, starts, tiles_of_an_image
from smooseg_fast.datasets.images import cut_squares, resize_short_side
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import TILES_BYTES, FeatureOptions, Job
from smooseg_fast.learn.stream import open_for_training
from smooseg_fast.show import scales


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slopes(height: int, width: int, per_pixel: float = 0.125) -> np.ndarray:
    """Red grows to the right and green downwards, so that a mean colour tells a place."""
    y, x = np.mgrid[:height, :width] * per_pixel
    return np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8)


class Means(Backbone):
    """The mean colour of each patch."""

    def __init__(self, patch: int):
        super().__init__(name="means", digest=f"means{patch}", patch=patch, dim=3)

    def extract(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(images * 255, self.patch).flatten(2).mT


@pytest.mark.parametrize("crops", ["center", "slide", "five"])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_fit_without_a_margin_cuts_what_it_always_has(crops, resample):
    image = noise(33, 71)
    cut = Cutting(size=16, crops=crops, resample=resample).squares(Picture(image))
    for (place, [square], _), (expected_place, expected) in zip(
        cut, cut_squares(image, 16, crops, resample), strict=True
    ):
        assert place == expected_place
        np.testing.assert_array_equal(square, expected)


@pytest.mark.parametrize("crops", ["center", "slide"])
@pytest.mark.parametrize("shape", [(33, 71), (71, 33), (40, 40)])
def test_a_margin_surrounds_the_same_squares(crops, shape):
    image = noise(*shape)
    plain, wide = (Cutting(size=16, crops=crops, margin=margin).squares(Picture(image)) for margin in (0, 8))
    for (place, [square], _), (same, [around], _) in zip(plain, wide, strict=True):
        assert place == same
        assert around.shape == (32, 32, 3)
        np.testing.assert_array_equal(around[8:-8, 8:-8], square)


def test_the_margin_is_real_where_the_image_goes_on_and_mirrored_where_it_ends():
    image = noise(64, 64)
    cutting = Cutting(size=16, crops="tiles", scale=("native",), margin=8)
    cut = {place: pixels for place, pixels, _ in cutting.squares(Picture(image))}
    np.testing.assert_array_equal(cut[16, 32][0], image[8:40, 24:56])
    np.testing.assert_array_equal(cut[0, 0][0], np.pad(image, ((8, 0), (8, 0), (0, 0)), mode="symmetric")[:32, :32])


@pytest.mark.parametrize("shape", [(64, 64), (65, 200), (16, 16), (17, 33), (300, 20)])
@pytest.mark.parametrize("scale", [("native",), ("0.5",), ("1.7",), ("fit",)])
def test_tiles_cover_the_whole_image(shape, scale):
    cutting = Cutting(size=16, crops="tiles", scale=scale)
    height, width = cutting.scaled(noise(*shape)).size
    seen = np.zeros((height, width), bool)
    for top, left in cutting.places(height, width):
        assert 0 <= top <= height - 16
        assert 0 <= left <= width - 16
        seen[top : top + 16, left : left + 16] = True
    assert seen.all()
    assert min(height, width) >= 16  # enlarged where it would be smaller


def test_a_large_grid_is_sampled_evenly_and_the_same_every_time():
    cutting = Cutting(size=16, crops="tiles", scale=("native",), most=64)
    places = cutting.places(1600, 1600)  # a grid of 100 x 100
    assert places == cutting.places(1600, 1600)
    assert len(set(places)) == 64
    tops, lefts = (np.array(axis) // 400 for axis in zip(*places))
    quarters = np.bincount(tops, minlength=4), np.bincount(lefts, minlength=4)
    assert min(map(min, quarters)) >= 8, "no part of the image is left out"
    assert tiles_of_an_image(1) == TILES
    assert tiles_of_an_image(10**6) == TILES_OF_AN_IMAGE


def test_starts_reach_both_ends():
    assert starts(16, 16, 16) == [0]
    assert starts(17, 16, 16) == [0, 1]
    assert starts(100, 16, 16) == [0, 14, 28, 42, 56, 70, 84]


def test_truth_lies_under_its_square():
    label = np.random.default_rng(5).integers(0, 9, (90, 130), dtype=np.uint8)
    for way in (
        Cutting(size=16, crops="tiles", scale=("native",), margin=8),
        Cutting(size=16, crops="tiles", scale=("0.6", "0.3")),
        Cutting(size=16, crops="slide", margin=8),
        Cutting(size=16, crops="center"),
    ):
        margin = way.margin
        for place, stack, _ in way.squares(Picture(np.repeat(label[..., None], 3, 2))):
            inner = stack[0, margin : margin + 16, margin : margin + 16, 0]
            np.testing.assert_array_equal(way.truth(label, place), inner)


@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("margin", [0, 1])
def test_every_scale_of_a_row_describes_the_place_of_its_patch(tmp_path, patch, mirror, margin):
    """Far from the border, the mean colours of a patch at the first scale and of its surroundings tell one place."""
    size = 6 * patch
    Image.fromarray(slopes(1000, 1000)).save(tmp_path / "a.png")
    options = FeatureOptions(
        size=size,
        crops="tiles",
        scale=("native", "0.5"),
        margin=margin * patch,
        mirror=mirror,
        cache=tmp_path / "cache",
        progress=False,
    )
    store = open_or_extract(open_dataset(tmp_path, "train"), Means(patch), options)
    assert (store.P, store.D) == (36, 6)
    rows = store.rows(range(len(store))).float()
    inner = [row for row, (y, x) in enumerate(store.crops) if min(y, x) > 2 * size and max(y, x) < 1000 - 3 * size]
    assert inner
    # rows of one length each: the share of red tells the direction of the place from the corner
    first, second = (torch.nn.functional.normalize(part, dim=-1) for part in rows[inner].split(3, dim=-1))
    y, x = np.divmod(np.arange(36), 6)
    for number, row in enumerate(inner):
        top, left = store.crops[row]
        truth = np.arctan2(top + (y + 0.5) * patch - 0.5, left + (x + 0.5) * patch - 0.5)
        for part in (first[number], second[number]):
            angle = np.arctan2(part[:, 1].numpy(), part[:, 0].numpy())
            # a quarter of a patch, seen from the corner; colours are whole numbers, and features float16
            np.testing.assert_allclose(angle, truth, atol=patch / 4 / np.hypot(top, left), rtol=0)


def test_a_large_scan_is_never_resized_as_a_whole():
    image = np.zeros((4000, 4000, 3), np.uint8)
    cutting = Cutting(size=64, crops="tiles", resample="bilinear", scale=("0.9", "0.45"), margin=16, most=8)
    tracemalloc.start()
    squares = cutting.squares(Picture(image))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(squares) == 8
    assert peak < 2**21 < image.nbytes / 20


def test_scale_and_margin_decide_the_store(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    dataset, backbone = open_dataset(tmp_path, "train"), Means(8)
    choices = [{}, dict(scale=("native",)), dict(scale=("1", "0.5")), dict(margin=8), dict(crops="center")]
    options = [FeatureOptions(**dict(size=16, crops="tiles", progress=False) | choice) for choice in choices]
    jobs = [Job(dataset, backbone, option) for option in options]
    assert len({job.key() for job in jobs}) == len(jobs)
    assert jobs[2].channels == 6


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (dict(scale=("fit", "0.5")), "--scale: give fit alone, or native and factors"),
        (dict(scale=("0.5", "1")), "the largest first; got 0.5 1"),
        (dict(scale=("1", "native")), "each once"),
        (dict(scale=("0",)), "between 0.001 and 100"),
        (dict(scale=("nan",)), "between 0.001 and 100"),
        (dict(scale=("huge",)), "got huge"),
        (dict(scale=()), "--scale: give fit alone"),
        (dict(crops="five", scale=("native",)), "--crops five: are the paper's, which have no --scale"),
        (dict(crops="five", margin=8), "--crops five: are the paper's, which have no --margin"),
        (dict(margin=-8), "--margin: must be at least 0"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, error):
    with pytest.raises(UserError, match=error.replace("(", r"\(")):
        with_changes(preset("folder"), **settings)


def test_a_margin_of_broken_patches_is_refused(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="--margin 12: not a multiple of the backbone's patch, 8 pixels; take 8 or 16"):
        Job(open_dataset(tmp_path, "train"), Means(8), FeatureOptions(size=16, margin=12))


def test_one_scale_may_be_a_word_or_a_number():
    assert TrainConfig(scale="native").scale == ("native",)
    assert TrainConfig(scale=0.5).scale == ("0.5",)
    assert TrainConfig(scale=[1, 0.5]).scale == ("1", "0.5")


def test_a_run_says_how_many_tiles_it_takes_and_what_it_enlarges(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cutting, "TILES", 20)
    for name, side in (("a", 96), ("b", 12)):
        Image.fromarray(noise(side, side)).save(tmp_path / f"{name}.png")
    dataset, cache = open_dataset(tmp_path, "train"), tmp_path / "cache"
    options = FeatureOptions(size=16, crops="tiles", scale=("native",), cache=cache)
    assert len(open_or_extract(dataset, Means(8), options)) == 17
    err = capsys.readouterr().err
    assert "tiles      17 of the 37 that would cover the images, at most 16 of an image\n" in err
    assert "enlarged   1 images to a short side of 16 pixels; they are smaller at --scale native\n" in err
    open_or_extract(dataset, Means(8), FeatureOptions(size=16, cache=cache))
    assert not any(word in capsys.readouterr().err for word in ("tiles ", "enlarged"))


def test_the_features_of_one_image_fit_into_memory(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    dataset, options = open_dataset(tmp_path, "train"), FeatureOptions(size=224, crops="tiles", scale=("native",))
    small, large = Job(dataset, Means(8), options), Job(dataset, Means(8), options)
    large.backbone.dim = 1024
    assert small.cutting.most == TILES
    assert large.cutting.most < TILES
    assert large.cutting.most * large.square_bytes <= TILES_BYTES
    assert large.images_per_shard == 1


def test_a_part_of_the_images_has_as_many_tiles_of_each(tmp_path, monkeypatch):
    """Features that do not fit the cache are made in windows, whose number was foretold with the tiles of all."""
    for number in range(8):
        Image.fromarray(noise(160, 160)).save(tmp_path / f"{number}.png")
    dataset, backbone = open_dataset(tmp_path, "train"), Means(8)
    options = FeatureOptions(size=16, crops="tiles", scale=("native",), cache=tmp_path / "cache", progress=False)
    monkeypatch.setattr(cutting, "TILES", 64)
    rows = Job(dataset, backbone, options).cutting.most
    assert rows == 16 < 100
    limit = 8 * rows * Job(dataset, backbone, options).square_bytes
    settings = dict(batch_size=8, data_seed=0, in_use=0, resumed=False, windows=None, say=lambda line: None)
    sample, stream = open_for_training(dataset, backbone, replace(options, limit=limit), **settings)
    assert stream is not None
    assert len(sample) == rows * len(set(sample.names))
    stream.rows_of(0)
    assert len(stream.store) == rows * len(set(stream.store.names))
    stream.close()


def test_a_store_at_scale_fit_has_the_key_that_it_has_always_had(tmp_path):
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    job = Job(open_dataset(tmp_path, "train"), Means(8), FeatureOptions(size=16, progress=False))
    new = ("dataset", "backbone", "scale", "margin", "most", "exact", "shift")
    deciding = {name: value for name, value in job.describe().items() if name not in new}
    names = ["precision", "size", "crops", "resample", "mirror", "reading", "batch", "grid", "channels"]
    assert sorted([*deciding][5:]) == sorted(names)
    assert job.key() == hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:32]


def test_slide_becomes_tiles_where_squares_do_not_span_the_image():
    assert TrainConfig().grid_crops == "slide"
    assert TrainConfig(scale="native").grid_crops == "tiles"
    assert TrainConfig(scale="native", crops="center").grid_crops == "center"


@pytest.mark.parametrize("scale", scales.SCALES)
@pytest.mark.parametrize("shape", [(100, 140), (1300, 40), (33, 2500), (1200, 1300)])
def test_the_tiles_of_a_sheet_cover_the_part_that_it_shows(scale, shape):
    image = np.zeros((*shape, 3), np.uint8)
    scaled = cutting.first_scale(image, (scale,), 32, "nearest")
    region = scales.region_at(scaled, shape)
    ratio = np.array(scales.middle(image).shape[:2]) / (region.height, region.width)
    np.testing.assert_allclose(ratio, np.array(shape) / scaled.size, rtol=0.55)  # up to a pixel
    seen = np.zeros(scaled.size, bool)
    for top, left in scales.tiles_of(region, scaled.size, 32):
        assert 0 <= top <= scaled.size[0] - 32
        assert 0 <= left <= scaled.size[1] - 32
        seen[top : top + 32, left : left + 32] = True
    assert seen[region.top :, region.left :][: region.height, : region.width].all()


def test_the_groups_of_a_sheet_lie_where_the_colours_are_and_have_one_order(monkeypatch):
    monkeypatch.setattr(scales, "GROUPS", 2)
    image = np.full((80, 120, 3), (250, 200, 200), np.uint8)
    image[:, :64] = (0, 10, 90)
    for scale in scales.SCALES:
        [labels] = scales.groups_at(scale, [image], Means(8), 32)
        assert labels.shape == (80, 120)
        np.testing.assert_array_equal(labels[:, :48], 0)
        np.testing.assert_array_equal(labels[:, 80:], 1)


def test_a_sheet_leaves_out_a_scale_that_would_enlarge_every_image_to_fit(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        scales, "groups_at", lambda scale, images, *_: drawn.append(scale) or [image[..., 0] for image in images]
    )
    for side in (40, 64):  # half of it is no more than a square of 32 pixels
        scales.scales_sheet([np.zeros((side, side, 3), np.uint8)], ["a"], Means(8), 32)
    assert drawn == ["fit", "native", "fit", "native"]
    scales.scales_sheet([np.zeros((80, 80, 3), np.uint8)], ["a"], Means(8), 32)
    assert drawn[4:] == ["fit", "0.5", "native"]


def test_the_nearest_places_of_a_long_side_are_pillows():
    row = Image.fromarray(np.arange(1501, dtype=np.int32)[None])
    for width in (48_032, 128_871):
        expected = np.asarray(row.resize((width, 1), Image.Resampling.NEAREST))[0]
        assert np.array_equal(images._nearest(width, 1501), expected)


@pytest.mark.parametrize("shape", [(1, 1), (37, 61), (640, 480), (1080, 1920), (333, 1000), (7, 301)])
@pytest.mark.parametrize("side", [1, 8, 63, 224, 601])
def test_the_nearest_pixels_are_pillows(shape, side):
    image = np.random.default_rng(side).integers(0, 256, (*shape, 3), np.uint8)
    height, width = (n * side // min(shape) for n in shape)
    expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))
    assert np.array_equal(resize_short_side(image, side), expected)
    assert np.array_equal(resize_short_side(image[..., 0], side, "bilinear"), expected[..., 0])
