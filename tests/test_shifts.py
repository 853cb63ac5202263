"""Pictures seen several times, half a patch apart, and features that a user's upsampler refines."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from smooseg_fast import evaluate, predict
from smooseg_fast.backbones import Backbone
from smooseg_fast.backbones.shifts import interleaved, offsets
from smooseg_fast.backbones.upsampler import Upsampler
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions, Job
from smooseg_fast.measure.confusion import shifted_codes
from smooseg_fast.segment import segmenter as module
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.segment.tiles import Tile
from smooseg_fast.segment.views import Views


class Means(Backbone):
    """The mean of a patch's pixels, 0..255: of a picture of coordinates, the place of the patch."""

    def __init__(self, patch=8):
        super().__init__(name="means", digest="means", patch=patch, dim=3)

    def extract(self, images):
        means = torch.nn.functional.avg_pool2d(images, self.patch)
        return 255 * means.flatten(2).mT


class Card(Means):
    """Stands for a card, which takes all shifts at once; counts the images of each call."""

    device = SimpleNamespace(type="cuda")

    def __init__(self):
        self.name, self.patch, self.dim, self.calls = "card", 8, 3, []

    def __call__(self, images):
        self.calls.append(len(images))
        return self.extract(images.float() / 255), (images.shape[2] // 8, images.shape[3] // 8)


def coordinates(height, width):
    """A picture whose first two colours are the row and the column of a pixel."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([rows, columns, np.full_like(rows, 100)], -1)


SIZES = {"scale": "native", "size": 32, "eval_size": 32}


def untrained(backbone, upsampler=None, **settings):
    """A segmenter whose codes are the features."""
    chosen = object.__new__(Segmenter)
    chosen.checkpoint = SimpleNamespace(config=TrainConfig(**SIZES | settings), report={})
    dim = 3 * len(chosen.config.scale)
    prototypes = torch.randn(5, dim, generator=torch.Generator().manual_seed(0))
    head = SimpleNamespace(teacher=prototypes, student=prototypes, projection=lambda x: x, basis=None)
    chosen.backbone, chosen.head, chosen.grouping, chosen.upsampler = backbone, head, Grouping(head), upsampler
    return chosen


def cells_of(segmenter, picture, shifts, mirror=True):
    """Codes of all cells [h,w,Z]."""
    views = Views(picture, segmenter.cutting(), segmenter.backbone, shifts, segmenter.upsampler)
    with torch.no_grad():
        return views, torch.cat([codes for (codes,) in segmenter.code_bands(views, [segmenter.head], mirror)])


@pytest.mark.parametrize("shifts", [2, 4])
@pytest.mark.parametrize(("patch", "margin"), [(8, 0), (8, 8), (6, 0), (14, 14), (2, 0)])
@pytest.mark.parametrize("mirror", [True, False])
def test_a_cell_has_the_code_of_its_very_place(monkeypatch, shifts, patch, margin, mirror):
    chosen = untrained(Means(patch), margin=margin, size=patch)
    for tile in (640, 6 * patch) if patch % 4 == 0 else (640,):
        monkeypatch.setattr(module, "TILE", tile)
        views, cells = cells_of(chosen, Picture(coordinates(15 * patch, 17 * patch)), shifts, mirror)
        assert views.grid == tuple(cells.shape[:2]) == (30, 34)
        # pixel 0 has its centre at 0; cells at the border see mirrored content, and others are filled from them. Two
        # shifts have one neighbour alone for the cell in a tile's corner, which counts least
        atol = 0.2 if shifts == 2 and tile < 640 else 1e-3
        rows, columns = ((torch.arange(3, n - 3) + 0.5) * patch / 2 - 0.5 for n in views.grid)
        inner = cells[3:-3, 3:-3]
        torch.testing.assert_close(inner[..., 0], rows[:, None].expand(-1, 28), atol=atol, rtol=0)
        torch.testing.assert_close(inner[..., 1], columns.expand(24, -1), atol=atol, rtol=0)


def test_cells_are_those_of_the_shifts_and_two_shifts_fill_the_others():
    a, b, c, d = views = torch.randn(4, 2, 3, 5, 7)
    assert torch.equal(interleaved([a], 8), a)
    four, two = interleaved(views, 8), interleaved([a, b], 8)
    for cells in (four, two):
        assert cells.shape == (2, 6, 10, 7)
        assert torch.equal(cells[:, ::2, ::2], a)
        assert torch.equal(cells[:, 1::2, 1::2], b)
    assert torch.equal(four[:, ::2, 1::2], c)
    assert torch.equal(four[:, 1::2, ::2], d)
    torch.testing.assert_close(two[:, 2, 3], (a[:, 1, 1] + a[:, 1, 2] + b[:, 0, 1] + b[:, 1, 1]) / 4)
    torch.testing.assert_close(two[:, 3, 2], (b[:, 1, 0] + b[:, 1, 1] + a[:, 1, 1] + a[:, 2, 1]) / 4)
    assert offsets(1, 7) == [(0, 0)]
    assert offsets(4, 8) == [(-2, -2), (2, 2), (-2, 2), (2, -2)]
    assert offsets(2, 14) == [(-3, -3), (4, 4)]
    for shifts, patch, words in ((2, 7, "has no half"), (3, 8, "must be one of 1, 2, 4"), (True, 8, "must be one of")):
        with pytest.raises(UserError, match=f"--shifts {shifts}|--shifts: {words}"):
            offsets(shifts, patch)


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("shifts", [1, 2, 4])
def test_cached_shifts_are_the_streamed_ones(tmp_path, shifts, mirror):
    rng, backbone = np.random.default_rng(0), Means()
    for number in range(3):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    dataset, chosen = open_dataset(tmp_path, "train"), untrained(backbone, scale="fit", eval_size=48)
    cache = tmp_path / "cache"

    def stored(shift, side):
        options = FeatureOptions(size=48, shift=shift, mirror=side, cache=cache, progress=False)
        assert Job(dataset, backbone, options).describe()["shift"] == list(shift)
        return open_or_extract(dataset, backbone, options)

    sides = (False, True)[: 1 + mirror]
    stores = [[stored(shift, side) for side in sides] for shift in offsets(shifts, 8)]
    assert len(list(cache.iterdir())) == len(sides) * shifts
    rows = shifted_codes(chosen.grouping, stores, 8)(torch.arange(3))
    for row, name in zip(rows, dataset.names):
        _, cells = cells_of(chosen, Picture(np.array(Image.open(tmp_path / name))), shifts, mirror)
        torch.testing.assert_close(row, cells.flatten(0, 1), atol=0.1, rtol=1e-3)  # the store has fp16


@pytest.mark.parametrize("scale", [("native",), ("1", "0.5")])
def test_a_card_takes_all_shifts_in_one_batch_with_the_same_features(scale):
    picture, cutting = Picture(coordinates(80, 96)), Cutting(size=32, scale=scale, crops="tiles")
    card, alone = Card(), Means()
    for mirror in (False, True):
        views = [Views(picture, cutting, backbone, 4) for backbone in (card, alone)]
        batch, single = (view.features(Tile(4, 8, 8, 12), mirror) for view in views)
        assert batch.shape == (4, 4 * 6, 3 * len(scale))
        torch.testing.assert_close(batch, single)
    assert card.calls == [4] * (2 * len(scale))


def test_places_without_data_stay_so_at_every_cell():
    picture = Picture(coordinates(64, 64), np.ones((64, 64), bool))
    picture.valid[:, :24] = False
    chosen = untrained(Means())
    assert Views(picture, chosen.cutting(), chosen.backbone, 4).patches.sum() == 16 * 10
    labels = chosen.predict(picture, shifts=4, refine="none")
    assert (labels[:, :24] == 255).all()
    assert (labels[:, 24:] < 5).all()


MODULE = """
import torch
from torch import nn

def finer(features, picture):
    # the mean colours of the quarters of a patch, whatever the features are
    means = nn.functional.avg_pool2d(picture.permute(2, 0, 1)[None].float(), 4)
    return means.permute(0, 2, 3, 1)

def few(features, picture):
    return features.repeat_interleave(2, 1)

def ragged(features, picture):
    n = 2 if len(picture) <= 32 else 1
    return features.repeat_interleave(n, 1).repeat_interleave(n, 2)

def nan(features, picture):
    return features * (float("nan") if len(picture) > 32 else 1)

def fails(features, picture):
    raise ValueError("no weights")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features, picture):
        return self.scale * features
"""


@pytest.fixture
def upsamplers(tmp_path, monkeypatch):
    (tmp_path / "finer_features.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "finer_features:"


def test_an_upsampler_gives_the_features_of_every_cell(upsamplers, monkeypatch):
    monkeypatch.setattr(module, "TILE", 48)
    upsampler = Upsampler(upsamplers + "finer", Means())
    assert upsampler.factor == 2
    chosen = untrained(Means(), upsampler)
    views, cells = cells_of(chosen, Picture(coordinates(88, 120)), 1)
    assert views.grid == (22, 30)
    torch.testing.assert_close(cells[..., 0], ((torch.arange(22) + 0.5) * 4 - 0.5)[:, None].expand(-1, 30))
    torch.testing.assert_close(cells[..., 1], ((torch.arange(30) + 0.5) * 4 - 0.5).expand(22, -1))
    labels, expected = (
        segmenter.predict(coordinates(88, 120), refine="none") for segmenter in (chosen, untrained(Means(4)))
    )
    assert (labels != expected).mean() < 0.01  # tiles overlap elsewhere
    with pytest.raises(UserError, match="--shifts 2: --upsampler gives a finer grid already"):
        chosen.predict(coordinates(88, 120), shifts=2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("few", r"gave float32 \[1, 8, 4, 3\] for \[1,4,4,3\]; it must give \[1,n\*4,n\*4,3\] in floating point"),
        ("fails", r"calling it with float32 \[1, 4, 4, 3\] failed \(ValueError: no weights\)"),
        ("missing", "importing it failed"),
        ("ragged", ".* but 2 times the height and width"),
        ("nan", "gave NaN or infinity"),
    ],
)
def test_an_upsampler_that_breaks_its_promise_is_refused_in_one_line(upsamplers, name, words):
    with pytest.raises(UserError, match=f"--upsampler finer_features:{name}: {words}"):
        untrained(Means(), Upsampler(upsamplers + name, Means())).predict(coordinates(88, 120))


def test_the_digest_of_an_upsampler_follows_its_weights(upsamplers):
    nets = [Upsampler(upsamplers + "Net", Means()) for _ in range(2)]
    assert nets[0].digest == nets[1].digest
    assert nets[0].factor == 1
    assert not any(weight.requires_grad for weight in nets[0].target.parameters())
    assert nets[0].digest != Upsampler(upsamplers + "finer", Means()).digest


def test_commands(trained, labelled, upsamplers, capsys):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror"]
    assert run(evaluate.main, [*args, "--shifts", "4", "--out", "four"]) == 0
    assert "no mirror, 4 shifts, " in capsys.readouterr().out
    assert run(evaluate.main, [*args, "--shifts", "4", "--whole", "--out", "whole"]) == 0
    four, whole = (json.load(open(f"{out}/scores.json")) for out in ("four", "whole"))
    assert four["shifts"] == whole["shifts"] == 4
    capsys.readouterr()
    for more, words in (
        (["--shifts", "3"], "error: --shifts: must be one of 1, 2, 4, got 3"),
        (["--shifts", "4", "--probes"], "error: --probes: see every square once; leave --shifts or --probes out"),
        (["--upsampler", upsamplers + "Net"], "error: --upsampler: central squares come from the cache"),
        (["--upsampler", upsamplers + "few", "--whole"], "error: --upsampler finer_features:few: gave"),
    ):
        assert run(evaluate.main, [*args, *more]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(words)
    photos = ["--checkpoint", str(trained), "--images", str(labelled / "val" / "images"), "--out", "masks"]
    assert run(predict.main, [*photos, "--shifts", "2"]) == 0
    capsys.readouterr()
    assert run(predict.main, [*photos, "--shifts", "2"]) == 0
    assert "are done in masks, by this checkpoint and with these settings" in capsys.readouterr().out
    assert run(predict.main, [*photos, "--upsampler", upsamplers + "Net"]) in (0, 2)
    assert "are done in masks" not in capsys.readouterr().out
