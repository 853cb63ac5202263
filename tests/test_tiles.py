"""Whole pictures at a scale: bands and tiles against the whole, margins, several scales, and what the commands do."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_trainer import SMALL
from textures import draw

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast import evaluate, predict, train
from smooseg_fast.backbones import Backbone
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import images, pillow
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.features.batches import Batches, Square
from smooseg_fast.learn import runpictures
from smooseg_fast.segment import segmenter, tiles
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.segment.tiles import Tile, label_bands
from smooseg_fast.segment.views import Views
from smooseg_fast.show import streamed

PATCH = 8


class Blurred(Backbone):
    """The mean colour of a patch and of those up to `reach` away, borders black: what a tile's border would spoil."""

    def __init__(self, reach):
        super().__init__(name="blurred", digest="blurred", patch=PATCH, dim=3)
        self.reach = reach

    def extract(self, images):
        means = F.avg_pool2d(images, PATCH) - 0.5
        return F.avg_pool2d(means, 2 * self.reach + 1, 1, self.reach).flatten(2).mT


def untrained(reach=0, **settings):
    """A segmenter whose codes are the features, with seven prototypes of random colours."""
    chosen = object.__new__(Segmenter)
    chosen.checkpoint = SimpleNamespace(
        config=TrainConfig(**{"size": 64, "eval_size": 64, **settings}), report={"published": {}}
    )  # whose labels are not refined
    dim = 3 * len(chosen.config.scale)
    prototypes = torch.randn(7, dim, generator=torch.Generator().manual_seed(0))
    chosen.head = SimpleNamespace(
        teacher=prototypes, student=prototypes, projection=lambda features: features, basis=None
    )
    chosen.backbone, chosen.grouping = Blurred(reach), Grouping(chosen.head)
    return chosen


def noise(height, width, seed=0):
    """Random colours that change slowly, so that neighbouring patches are alike."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


@pytest.mark.parametrize("strip", [1 << 22, 300])
@pytest.mark.parametrize(
    ("grid", "size", "shape"),
    [
        ((7, 9), (56, 72), (50, 70)),
        ((13, 11), (333, 77), (330, 75)),
        ((40, 30), (77, 55), (77, 55)),
        ((1, 1), (3, 2), (2, 2)),
    ],
)
def test_labels_in_bands_are_those_of_the_whole(monkeypatch, grid, size, shape, strip):
    monkeypatch.setattr(tiles, "STRIP_ELEMENTS", strip)
    g = torch.Generator().manual_seed(0)
    codes, prototypes = torch.randn(*grid, 16, generator=g), torch.randn(5, 16, generator=g)
    whole = sk.assign(codes.flatten(0, 1)[None], prototypes, grid=grid, size=size)[0, : shape[0], : shape[1]]
    for parts in {1, 2, 3, grid[0]}:
        bands = [band for band in codes.tensor_split(parts) if len(band)]
        labels = list(label_bands(bands, prototypes, grid[0], size, shape))
        assert all(band.dtype == torch.uint8 for band in labels)
        assert torch.equal(torch.cat(labels), whole.to(torch.uint8))


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("scale", ["fit", "native", "0.6", "1.7"])
def test_tiles_leave_no_seam_where_the_margin_is_as_wide_as_the_features_see(monkeypatch, scale, mirror):
    image, tile = noise(150, 230), 5 * PATCH
    whole = untrained(reach=2, scale=scale, eval_size=120, margin=2 * PATCH).predict(image, mirror=mirror)
    assert whole.shape == (150, 230)
    assert whole.dtype == np.uint8
    assert len(np.unique(whole)) > 3
    monkeypatch.setattr(segmenter, "TILE", tile)
    tiled = untrained(reach=2, scale=scale, eval_size=120, margin=2 * PATCH).predict(image, mirror=mirror)
    assert (tiled != whole).mean() < 1e-3  # ties
    # without the margin the black beyond a tile's border shows
    seams = untrained(reach=2, scale=scale, eval_size=120).predict(image, mirror=mirror)
    assert (seams != whole).mean() > 0.02


@pytest.mark.parametrize("scale", [("native",), ("0.5",), ("1", "0.5"), ("1.5", "1", "0.3")])
@pytest.mark.parametrize("margin", [0, PATCH])
def test_a_tile_has_the_features_of_a_square_at_its_place(scale, margin):
    image = noise(200, 280)
    cutting = Cutting(size=64, crops="tiles", scale=scale, margin=margin)
    backbone = Blurred(reach=1)
    views = Views(Picture(image), cutting, backbone)
    for place, pixels, _ in cutting.squares(Picture(image)):
        if place[0] % PATCH or place[1] % PATCH:
            continue
        (square,) = Batches(backbone, (8, 8), False, cutting.ratios()).features(
            [Square("x", place, pixels)], 1, lambda count: None
        )
        tile = Tile(place[0] // PATCH, place[1] // PATCH, 8, 8)
        torch.testing.assert_close(views.features(tile), square)
        assert square.shape == (1, 64, 3 * len(scale))


@pytest.mark.parametrize("scale", [("1", "0.5"), ("1", "0.5", "0.25"), ("0.8", "0.2")])
def test_several_scales_leave_no_seam(monkeypatch, scale):
    image = (
        noise(320, 384) if scale[0] == "1" else noise(400, 480)
    )  # the whole has coarser patches where tiles have them
    whole = untrained(scale=scale, margin=PATCH).predict(image)
    assert len(np.unique(whole)) > 3
    monkeypatch.setattr(segmenter, "TILE", 16 * PATCH)
    assert (untrained(scale=scale, margin=PATCH).predict(image) != whole).mean() < 1e-3


def test_scales_and_short_sides_that_cannot_be():
    chosen, image = untrained(scale="native"), noise(64, 80)
    assert (chosen.predict(image, short_side=32) == chosen.predict(image, short_side=32, scale="fit")).all()
    assert (chosen.predict(image, scale=1) == chosen.predict(image)).all()
    with pytest.raises(UserError, match=r"^--short-side 32: belongs to --scale fit, not to 0.5; give one of"):
        chosen.predict(image, scale=0.5, short_side=32)
    with pytest.raises(UserError, match=r"^--scale native 0.5: the checkpoint was trained at 1 \(native\); give as"):
        chosen.predict(image, scale=("native", 0.5))
    with pytest.raises(UserError, match=r"^--scale: give fit alone, or native and factors"):
        chosen.predict(image, scale="huge")


def test_reading_row_by_row_changes_no_pixel(tmp_path, monkeypatch):
    image = noise(50, 33)
    Image.fromarray(image).save(tmp_path / "x.png")
    monkeypatch.setattr(pillow, "ROWS", 7)
    np.testing.assert_array_equal(images.read_image(tmp_path / "x.png"), image)


@pytest.fixture
def native(labelled):
    """The checkpoint of a short run at native scale with a margin."""
    options = ["--scale", "native", "--margin", "8", "--size", "32", "--eval-size", "32", "--out", "native"]
    assert run(train.main, ["--data", str(labelled), *SMALL, *options]) == 0
    return labelled.parent / "native" / "checkpoint.safetensors"


def test_a_run_at_native_scale_predicts_and_evaluates_whole_images(native, labelled, capsys, monkeypatch):
    monkeypatch.setattr(streamed, "OVERLAY_PIXELS", 40 * 50)
    monkeypatch.setattr(streamed, "BAND", 16)
    photos = labelled / "val" / "images"
    args = ["--checkpoint", str(native), "--images", str(photos), "--out", "made"]
    assert run(predict.main, args) == 0
    chosen = smooseg_fast.Segmenter.load(native, device="cpu")
    assert chosen.config.scale == ("native",)
    assert chosen.config.margin == 8
    labels = chosen.predict(photos / "5.png")
    np.testing.assert_array_equal(np.array(Image.open("made/masks/5.png")), labels)
    width, height = Image.open("made/overlays/5.jpg").size  # of 96 x 72
    assert width * height <= 40 * 50 * 1.05
    assert json.load(open("made/predict.json"))["scale"] == ["native"]
    assert run(predict.main, [*args, "--scale", "0.5"]) == 2  # another scale in the same folder
    assert run(evaluate.main, ["--checkpoint", str(native), "--data", str(labelled)]) == 0
    assert "labelled pixels of whole images at scale native" in capsys.readouterr().out
    scores = json.load(open(native.parent / "evaluation" / "scores.json"))
    expected = np.zeros((len(chosen.groups), 2), int)
    for number in (5, 6, 7):
        image, label = draw(number)
        label[:2] = 255
        np.add.at(expected, (chosen.predict(image)[label < 2], label[label < 2]), 1)
    np.testing.assert_array_equal(scores["confusion"], expected)
    assert json.load(open(native.parent / "report.json"))["scores"]["kmeans"]["pixels"] > 0


def test_whole_images_of_a_checkpoint_that_fits(trained, labelled, capsys):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--whole", "--no-mirror", "--eval-size"]
    assert run(evaluate.main, [*args, "48"]) == 0
    assert "labelled pixels of whole images at 48 px, no mirror" in capsys.readouterr().out
    assert json.load(open(trained.parent / "evaluation" / "scores.json"))["hungarian"]["pixels"] == 3 * 70 * 96
    assert run(evaluate.main, [*args, "4"]) == 2
    assert "error: --eval-size: must be at least one patch, 8 pixels, got 4" in capsys.readouterr().err
    for path in (labelled / "val" / "labels").iterdir():
        Image.fromarray(np.full((72, 96), 255, np.uint8)).save(path)
    assert run(evaluate.main, [*args, "48"]) == 2
    assert "no pixel of the labels of" in capsys.readouterr().err


def test_pictures_of_a_run_show_the_middle_of_large_images(monkeypatch):
    monkeypatch.setattr(runpictures, "LARGEST", 30)
    image = noise(100, 40)
    for scale, shape in (("fit", (100, 40)), ("native", (30, 30)), ("0.5", (60, 40))):
        setting = SimpleNamespace(config=TrainConfig(scale=scale), backbone=Blurred(0))
        middle = runpictures.Shown.middle(SimpleNamespace(setting=setting), image)
        assert middle.shape[:2] == shape
        top, left = (100 - shape[0]) // 2, (40 - shape[1]) // 2
        np.testing.assert_array_equal(middle, image[top : top + shape[0], left : left + shape[1]])
