"""Places without data: no patch of them is learnt from or counted, and masks hold 255 there."""

from __future__ import annotations

import functools
import json
import operator
import signal

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from replayed import play_graphs_on_the_cpu
from test_processes import pair  # noqa: F401
from test_store import FakeBackbone, P, extract, shards, small, small_shards  # noqa: F401
from test_trainer import SMALL, call
from textures import draw

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast import evaluate, predict
from smooseg_fast.command import run
from smooseg_fast.datasets import IGNORE, open_dataset
from smooseg_fast.datasets.cutting import Cutting, neutral, valid_patches
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.sample import Batch, batches, sample_patches
from smooseg_fast.features.store import Contents, DamagedShard, FeatureStore, Shard, packed, read_shard, write_shard
from smooseg_fast.learn import loop as loops
from smooseg_fast.learn.grow import moments_of_parts
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.learn.step import make_optimizer, train_step
from smooseg_fast.measure.closeness import similarity
from smooseg_fast.measure.confusion import count_picture, of_data
from smooseg_fast.measure.health import health
from smooseg_fast.segment.colours import palette
from smooseg_fast.segment.model import Head, Heads
from smooseg_fast.segment.tiles import FAINT, faded
from smooseg_fast.show import pictures
from smooseg_fast.show.overlays import overlay
from smooseg_fast.show.predictions import mean_shares

CPU = torch.device("cpu")
HOLE = np.array((255, 0, 255), np.uint8)  # pixels that the pictures of these tests have in no other place


def marked(height, width, valid, seed=0):
    """A picture with HOLE where it has no data."""
    pixels = np.random.default_rng(seed).integers(0, 250, (height, width, 3), dtype=np.uint8)
    pixels[~valid] = HOLE
    return Picture(pixels, valid)


def holes(height, width, seed=0):
    """Where about half of the blocks of 5 x 7 pixels have data."""
    blocks = np.random.default_rng(seed).random((-(-height // 5), -(-width // 7))) < 0.5
    return np.kron(blocks, np.ones((5, 7), bool))[:height, :width].astype(bool)


def transparent(folder, count=6, height=72, width=96, share=0.5):
    """Photos whose right part is transparent."""
    for number in range(count):
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        pixels = np.dstack([draw(number, height, width)[0], np.full((height, width), 255, np.uint8)])
        pixels[:, round(width * (1 - share)) :, 3] = 0
        Image.fromarray(pixels, "RGBA").save(folder / ("sub" if number % 2 else ".") / f"{number}.png")
    return folder


# squares


@pytest.mark.parametrize("shape", [(33, 71), (71, 33), (48, 48)])
@pytest.mark.parametrize(
    "way",
    [
        dict(crops="center"),
        dict(crops="slide"),
        dict(crops="five"),
        dict(crops="slide", margin=8),
        dict(crops="tiles", scale=("native",)),
        dict(crops="tiles", scale=("0.6", "0.3"), margin=4),
    ],
    ids=str,
)
def test_a_square_knows_its_pixels_without_data_and_a_backbone_does_not_see_them(shape, way):
    cutting, valid = Cutting(size=16, **way), holes(*shape)
    picture = marked(*shape, valid)
    colour = np.rint(picture.pixels[valid].mean(0))
    raw = {cut.place: cut.pixels for cut in cutting.squares(Picture(picture.pixels))}
    cuts, inner = cutting.squares(picture), slice(cutting.margin, cutting.margin + 16)
    assert cuts
    for place, pixels, square in cuts:
        np.testing.assert_array_equal(square, (raw[place][0, inner, inner] != HOLE).any(2))
        seen = (raw[place] == HOLE).all(-1)
        assert (pixels[seen] == colour).all()
        np.testing.assert_array_equal(pixels[~seen], raw[place][~seen])
    assert (picture.pixels[~valid] == HOLE).all(), "the picture itself stays"


def test_tiles_are_taken_from_where_there_is_data():
    valid = np.zeros((640, 640), bool)
    valid[:, 320:] = True
    cutting = Cutting(size=16, crops="tiles", scale=("native",), most=100)
    cuts = cutting.squares(marked(640, 640, valid))
    assert len({place for place, *_ in cuts}) == 100
    assert all(square.all() for _, _, square in cuts)


def test_a_patch_counts_from_half_of_its_pixels_on():
    valid = np.zeros((8, 12), bool)
    valid[:2, :4], valid[:4, 4:6], valid[4:, 8:] = True, True, True
    valid[4, 0:4], valid[5, 0:3] = True, True
    assert valid_patches(valid, 4).tolist() == [[True, True, False], [False, False, True]]


def test_a_picture_without_any_data_is_grey():
    assert (neutral(marked(4, 4, np.zeros((4, 4), bool))) == 128).all()
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert neutral(Picture(pixels)) is pixels


# stores


def test_shards_keep_which_patches_show_data(tmp_path):
    valid = np.random.default_rng(0).random((3, 10)) < 0.5
    contents = Contents((0, 2), (2, 5), ("a", "a", "b"), ((0, 0),) * 3, (), batch=2, valid=packed(valid))
    write_shard(tmp_path / "x", contents, torch.zeros(3, 10, 4))
    store = FeatureStore([read_shard(tmp_path / "x")])
    assert store.masked
    np.testing.assert_array_equal(store.valid([2, 0, 0]), valid[[2, 0, 0]])
    with pytest.raises(IndexError, match="row 3 of a store of 3 rows"):
        store.valid([3])
    plain = Contents((2, 3), (2, 5), ("c",), ((0, 0),), (), batch=2)
    write_shard(tmp_path / "y", plain, torch.zeros(1, 10, 4))
    assert b"valid" not in (tmp_path / "y").read_bytes()
    assert FeatureStore([read_shard(tmp_path / "y")]).valid([0]) is None
    both = FeatureStore([read_shard(tmp_path / name) for name in "xy"])
    assert both.valid([3]).all()
    assert [both.marked(row) for row in range(4)] == [True, True, True, False]
    write_shard(tmp_path / "z", Contents(**vars(plain) | {"valid": packed(valid)}), torch.zeros(1, 10, 4))
    with pytest.raises(DamagedShard):
        read_shard(tmp_path / "z")


def test_extraction_leaves_out_what_shows_no_data(tmp_path, capsys):
    alpha = np.zeros((16, 40), np.uint8)
    alpha[:, 14:] = 255
    for name, opacity in (("a.png", alpha), ("b.png", alpha * 0), ("c.png", alpha * 0 + 9)):
        pixels = np.random.default_rng(0).integers(0, 256, (16, 40, 4), dtype=np.uint8)
        pixels[..., 3] = opacity
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels, "RGBA").save(tmp_path / "photos" / name)
    settings = dict(crops="tiles", scale=("native",))  # 2 x 5 tiles of 8 pixels, of which the first 2 are empty
    store = extract(tmp_path / "photos", tmp_path / "cache", **settings)
    assert store.names == ("a.png",) * 8 + ("c.png",) * 10
    (name, reason), *more = store.skipped
    assert (name, more) == ("b.png", [])
    assert reason.startswith("shows no data")
    assert "no data    2 squares without any data in them are left out" in capsys.readouterr().err
    first = [row for row in range(8) if store.crops[row][1] == 8]  # columns 8 to 15, data from 14 on: half of a patch
    assert store.valid(first).tolist() == [[False, True, False, True]] * 2
    assert store.valid(range(18)).sum() == 18 * P - 4
    before = [path.read_bytes() for path in shards(tmp_path / "cache")]
    again = extract(tmp_path / "photos", tmp_path / "cache", **settings)
    assert torch.equal(again.valid(range(18)), store.valid(range(18)))
    mirrored = extract(tmp_path / "photos", tmp_path / "cache", mirror=True, **settings)
    assert torch.equal(mirrored.valid(range(18)), store.valid(range(18)))  # their columns are mirrored back
    assert before == [path.read_bytes() for path in shards(tmp_path / "cache") if path.parent == again.folder]


def test_a_folder_without_any_data(tmp_path):
    transparent(tmp_path / "photos", count=1, share=1.0)
    with pytest.raises(UserError, match=r"none of the 1 images can be used \(first: 0.png: shows no data"):
        extract(tmp_path / "photos", tmp_path / "cache")


# what is taken from a store


N, GRID, D = 12, (4, 6), 7
KEPT = [place for place in range(24) if place % 6 < 3]  # the left half of a square


@pytest.fixture
def stores():
    """A store whose squares have data in their left halves, and another scene on the right; and those halves alone."""
    g = torch.Generator().manual_seed(0)
    features = (torch.randn(N, 24, D, generator=g) + 2 * torch.randn(N, 1, D, generator=g)).half()
    features[:, [place for place in range(24) if place not in KEPT]] -= 9
    valid = np.zeros((N, 24), bool)
    valid[:, KEPT] = True

    def store(rows, grid, valid=None):
        contents = Contents((0, N), grid, tuple(map(str, range(N))), ((0, 0),) * N, (), 1, valid)
        return FeatureStore([Shard(contents, rows, 0)])

    return store(features, GRID, packed(valid)), store(features[:, KEPT].contiguous(), (4, 3))


def test_samples_have_patches_with_data_alone(stores):
    masked, kept = stores
    sample = sample_patches(masked, 0, images=N, patches=N * 12)
    assert len(sample) == N * 12
    assert {tuple(row) for row in sample.tolist()} == {tuple(row) for row in kept.load().flatten(0, 1).float().tolist()}
    few = sample_patches(masked, 0, images=N, patches=N * 5)
    assert len(few) == N * 5
    assert {tuple(row) for row in few.tolist()} < {tuple(row) for row in sample.tolist()}


def test_trees_figures_and_closeness_are_those_of_the_patches_with_data(stores):
    head = Head(D, 5, 4, 0)
    head.start_from_features(sample_patches(stores[0], 0))
    one, other = (functools.reduce(operator.add, moments_of_parts(head, store)) for store in stores)
    np.testing.assert_allclose(one.shares, other.shares, atol=1e-6)
    for pair_set in ("within", "across", "all", "objective"):
        a, b = (moments.pairs(pair_set) for moments in (one, other))
        np.testing.assert_allclose(a.closeness, b.closeness, atol=1e-6)
        np.testing.assert_allclose(a.weight, b.weight, atol=1e-6)
    states = [health(Heads([head]), batches(store, CPU))[0] for store in stores]
    assert states[0].figures() == pytest.approx(states[1].figures(), abs=1e-5)
    assert states[0].shares == pytest.approx(states[1].shares)
    ours, alone = (similarity(store, CPU, progress=False) for store in stores)
    for one, other in ((ours.within, alone.within), (ours.across, alone.across)):
        assert one.mean == pytest.approx(other.mean, abs=1e-6)
        assert one.pairs == other.pairs == N * 144
        assert (one.counts - other.counts).abs().sum() <= 4  # values on the edge of a bin


def test_patches_without_data_do_not_move_the_figures():
    features = torch.randn(2, 6, D)
    heads, valid = Heads([Head(D, 3, 4, 0)]), torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    spoilt = torch.where(valid[..., None], features, -features)
    assert health(heads, [Batch(features, valid)]) == health(heads, [Batch(spoilt, valid)])


# steps


@pytest.mark.parametrize("impl", ["dense", "torch"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_step_is_that_of_the_patches_with_data(stores, impl, dropout):
    """The dense oracle on the kept patches, its gradients through the optimiser's step."""
    masked, kept = stores
    settings, thresholds, results = Settings(True, dropout=dropout, impl=impl), torch.tensor([[0.05, 0.05]]), []
    for store, how in ((masked, settings), (kept, Settings(True, dropout=dropout, impl="dense"))):
        heads = Heads([Head(D, 5, 4, 0)])
        optimizer = make_optimizer(heads, 1e-2, 1e-2)
        draws = Schedule(N, 8, 3).draws(0, store.P, D, how, CPU)
        features = store.load(dtype=torch.float32)
        losses = train_step(heads, optimizer, features, draws, thresholds, how, valid=store.valid(range(N)))
        results.append((losses, heads))
    for one, other in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    # Adam's first step has the sign of the gradient
    for one, other in zip(results[0][1].parameters(), results[1][1].parameters()):
        assert ((one - other).abs() > 1e-3).float().mean() < 0.02


def test_drawn_patches_come_with_their_marks(stores, monkeypatch):
    masked, taken, loss = stores[0], [], sk.smooseg_loss
    monkeypatch.setattr(sk, "smooseg_loss", lambda *args, **options: taken.append(options) or loss(*args, **options))
    draws = Schedule(N, 4, 3).draws(0, 24, D, Settings(True, patches=9), CPU)
    heads = Heads([Head(D, 5, 4, 0)])
    train_step(
        heads,
        make_optimizer(heads, 1e-2, 1e-2),
        masked.load(),
        draws,
        torch.zeros(1, 2),
        Settings(True, patches=9),
        valid=masked.valid(range(N)),
    )
    expected = torch.isin(draws.patches, torch.tensor(KEPT)).float()
    assert torch.equal(taken[0]["patch_weight"], expected)


def test_a_batch_without_a_drawn_patch_that_shows_data_teaches_nothing():
    """A sample may miss the few patches with data of all its squares."""
    heads = Heads([Head(D, 3, 4, 0)])
    before = {name: value.clone() for name, value in heads.state_dict().items()}
    draws = Schedule(3, 3, 0).draws(0, 5, D, Settings(True), CPU)
    losses = train_step(
        heads,
        make_optimizer(heads, 1e-2, 1e-2),
        torch.randn(3, 5, D),
        draws,
        torch.zeros(1, 2),
        Settings(True),
        valid=torch.zeros(3, 5, dtype=torch.bool),
    )
    assert all(value.isfinite().all() for value in losses)
    for name, value in heads.state_dict().items():
        torch.testing.assert_close(value, before[name], msg=name)


class Windows(Schedule):
    """Three steps to a window, in every other of which all patches show data."""

    opened = 0

    def ready(self, step):
        return step // 3 == self.opened

    def rows_of(self, step):
        self.opened = step // 3
        return super().rows_of(step)


def loop_of(store, *, resident, capture, windows=False):
    schedule = (Windows if windows else Schedule)(N, 4, 5)
    features = store.load(dtype=torch.float32)
    valid = store.valid(range(N)) if resident else store.valid
    if windows:
        valid = lambda rows: None if schedule.opened % 2 else store.valid(rows)  # noqa: E731
    return Loop(
        Heads([Head(D, 4, 8, 0)]),
        features if resident else lambda rows: features[rows],
        (store.P, D),
        schedule,
        torch.full((1, 2), 0.1),
        Settings(relative=True, patches=16),
        lr=2**-10,
        lr_prototypes=2**-8,
        valid=valid,
        capture=capture,
    )


@pytest.mark.parametrize("resident", [True, False])
def test_captured_steps_take_the_marks_of_their_rows(stores, monkeypatch, resident):
    graphs = play_graphs_on_the_cpu(monkeypatch)
    captured, plain = (loop_of(stores[0], resident=resident, capture=capture) for capture in (True, False))
    unaware = loop_of(stores[0], resident=resident, capture=False)
    unaware.marks = None
    for number in range(60, 68):
        total = plain.step(number).total
        assert torch.equal(captured.step(number).total, total), number
        assert not torch.allclose(unaware.step(number).total, total)
    for name, value in captured.heads.state_dict().items():
        assert torch.equal(value, plain.heads.state_dict()[name]), name
    assert len(graphs) == 1


def test_a_window_without_marks_between_those_with_some(stores, monkeypatch):
    graphs = play_graphs_on_the_cpu(monkeypatch)
    captured, plain = (loop_of(stores[0], resident=False, capture=capture, windows=True) for capture in (True, False))
    for number in range(9):
        assert torch.equal(captured.step(number).total, plain.step(number).total), number
    for name, value in captured.heads.state_dict().items():
        assert torch.equal(value, plain.heads.state_dict()[name]), name
    assert [graph.replays for graph in graphs] == [3, 3, 3]


# masks and scores


def test_pixels_next_to_places_without_data_are_labelled_by_those_with_some():
    codes = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[None].expand(2, -1, -1).contiguous()  # [2,2,2]: left and right
    valid = torch.tensor([[True, False], [True, False]])
    labels = sk.assign(faded(codes, valid).view(1, 4, 2), torch.eye(2), grid=(2, 2), size=(40, 40))
    assert (labels[0, :, :29] == 0).all()
    assert labels[0, 0, -1] == 1, "what no patch with data reaches, the others label"
    assert FAINT < 0.01


@pytest.mark.parametrize("scale", [None, "native"])
def test_masks_hold_255_and_shares_leave_it_out(trained, tmp_path, scale):
    photos = transparent(tmp_path / "photos", count=2, share=0.3)
    pixels = np.dstack([draw(7)[0], np.zeros((72, 96), np.uint8)])
    Image.fromarray(pixels, "RGBA").save(photos / "empty.png")
    args = ["--checkpoint", str(trained), "--images", str(photos), "--out", "made", "--no-mirror"]
    assert run(predict.main, args + (["--scale", scale] if scale else [])) == 0
    shares = json.load(open("made/shares.json"))
    for name in ("0", "sub/1"):
        mask = np.array(Image.open(f"made/masks/{name}.png"))
        assert (mask[:, 67:] == IGNORE).all()
        assert (mask[:, :67] < 255).all()
        expected = {str(k): (mask[:, :67] == k).mean() for k in np.unique(mask[:, :67])}
        assert shares["images"][f"{name}.png"] == pytest.approx(expected, abs=1e-6)
        overlay = np.array(Image.open(f"made/overlays/{name}.jpg"))
        assert (overlay[:, 72:] > 250).all()
    assert (np.array(Image.open("made/masks/empty.png")) == IGNORE).all()
    assert shares["images"]["empty.png"] == {}
    assert sum(shares["mean"].values()) == pytest.approx(1, abs=1e-4)
    assert run(predict.main, args + (["--scale", scale] if scale else [])) == 0  # all are done


def test_shares_of_nothing():
    assert mean_shares([{"0": 0.5, "1": 0.5}, {}]) == {"0": 0.5, "1": 0.5}
    assert mean_shares([{}]) == {}


def test_labels_without_data_are_white_and_an_overlay_leaves_them():
    image, colours = np.full((8, 8, 3), 40, np.uint8), palette(3)
    labels = np.zeros((8, 8), np.uint8)
    labels[:, 4:] = IGNORE
    assert (np.asarray(overlay(image, labels, colours))[:, 4:] == 40).all()
    assert (pictures.by_label(colours)[labels][:, 4:] == 255).all()


def test_the_same_labels_as_without_the_missing_part(trained):
    """Patches of the filter bank see a little around them, so the pixels next to the border may differ."""
    segmenter = smooseg_fast.Segmenter.load(trained, device="cpu")
    image = draw(9, 128, 256)[0]
    valid = np.ones((128, 256), bool)
    valid[:, 128:] = False
    image[:, 128:] = 255
    labels = segmenter.predict(Picture(image, valid), scale="native")
    alone = segmenter.predict(np.ascontiguousarray(image[:, :128]), scale="native")
    assert (labels[:, 128:] == IGNORE).all()
    assert (labels[:, :104] == alone[:, :104]).mean() > 0.97


def test_pixels_without_data_are_measured_nowhere(trained, labelled):
    paths = sorted((labelled / "val" / "images").iterdir())
    labels = [np.array(Image.open(labelled / "val" / "labels" / f"{path.stem}.png")) for path in paths]
    for path in paths:
        rgb = np.array(Image.open(path).convert("RGB"))
        alpha = np.full(rgb.shape[:2], 255, np.uint8)
        alpha[:, :41] = 0
        Image.fromarray(np.dstack([rgb, alpha]), "RGBA").save(path)
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--no-mirror"]
    assert run(evaluate.main, [*args, "--whole", "--out", "whole"]) == 0
    confusion = np.array(json.load(open("whole/scores.json"))["confusion"])
    assert confusion.sum() == sum((label[:, 41:] != IGNORE).sum() for label in labels)
    assert run(evaluate.main, [*args, "--eval-size", "72", "--out", "squares"]) == 0
    confusion = np.array(json.load(open("squares/scores.json"))["confusion"])
    assert confusion.sum() == sum((label[:, 12:84][:, 29:] != IGNORE).sum() for label in labels)


def test_a_label_where_its_picture_has_no_data():
    label = np.arange(6, dtype=np.uint8).reshape(2, 3)
    valid = np.array([[1, 0, 1], [1, 1, 0]], bool)
    assert of_data(label, Picture(np.zeros((2, 3, 3), np.uint8), valid)).tolist() == [[0, 255, 2], [3, 4, 255]]
    assert of_data(label, Picture(np.zeros((2, 3, 3), np.uint8))) is label
    counts = np.zeros((2, 7), np.int64)
    count_picture([counts], [iter([np.array([[0, 255, 1], [1, 0, 255]], np.uint8)])], label)
    assert counts.sum() == 4


# whole runs


@pytest.mark.parametrize("streamed", [False, True])
def test_a_run_that_stops_resumes_to_the_same_end(tmp_path, monkeypatch, streamed):
    monkeypatch.chdir(tmp_path)
    photos = transparent(tmp_path / "photos", count=12)
    more = ["--prototypes", "5", "--patches", "20", *(["--cache-limit", "400KB"] if streamed else [])]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    assert call("--data", photos, "--out", "whole", *SMALL, *more) == 0
    step, calls = loops.train_step, []

    def interrupted(*args, **options):
        calls.append(options["valid"])
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **options)

    monkeypatch.setattr(loops, "train_step", interrupted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "two"))
    assert call("--data", photos, "--out", "cut", *SMALL, *more) == 130
    assert call("--data", photos, "--out", "cut", *SMALL, *more) == 0
    assert len(calls) == 6
    assert all(0 < valid.float().mean() < 1 for valid in calls)
    whole, cut = (safetensors.torch.load_file(f"{name}/training.safetensors") for name in ("whole", "cut"))
    for name, value in whole.items():
        assert torch.equal(value, cut[name]), name
    assert open("whole/metrics.jsonl").read() == open("cut/metrics.jsonl").read()
    groups = np.array(Image.open("whole/groups.png"))
    assert groups.size


def made_by_both(processes, photos, cache):
    small()
    options = FeatureOptions(size=8, crops="tiles", scale=("native",), cache=cache, processes=processes, progress=False)
    store = open_or_extract(open_dataset(photos, "train"), FakeBackbone(), options)
    return store.names, store.valid(range(len(store)))


def test_two_processes_make_the_shards_of_one(tmp_path, pair, small_shards):  # noqa: F811
    photos = transparent(tmp_path / "photos", height=16, width=30, share=0.45)
    one = extract(photos, tmp_path / "one", crops="tiles", scale=("native",), batch_size=None)
    for names, valid in pair(made_by_both, photos, tmp_path / "two"):
        assert names == one.names
        assert torch.equal(valid, one.valid(range(len(one))))
    assert 0 < valid.float().mean() < 1
    alone, both = ([path.read_bytes() for path in shards(tmp_path / name)] for name in ("one", "two"))
    assert alone == both
    assert len(both) > 1
