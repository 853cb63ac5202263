"""Training against an independent oracle (iteration.py): the step, the loop, draws, and runs from their flags.

Every setting has a value of its own, far from the defaults, so that one that is lost, swapped or repeated changes the
weights by much more than rounding. In float64 a step agrees to 1e-9 of how far it moved a tensor; in float32, where
the oracle itself is off by 3e-6, to 1e-4.
"""

import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch
from iteration import (
    SIDE,
    D,
    Learner,
    P,
    Recipe,
    draw_rest,
    draw_rows,
    draw_streamed_rows,
    features_of_images,
    figures_of,
    learn,
    make_images,
    start,
    unit,
)
from PIL import Image
from replayed import play_graphs_on_the_cpu
from safetensors import safe_open
from safetensors.torch import load_file

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast import train
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import ArrayDataset
from smooseg_fast.features.cachefolder import CacheFolder
from smooseg_fast.features.room import Windows
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Draws, Schedule, Settings
from smooseg_fast.learn.step import make_optimizer, train_step
from smooseg_fast.learn.stream import Stream
from smooseg_fast.segment import model
from smooseg_fast.segment.kmeans import spherical_kmeans
from smooseg_fast.segment.model import Head, Heads

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
SEVERAL = [  # heads side by side: what tells them apart differs, all else is one run's
    Recipe(),
    Recipe(within=-0.08, across=0.27, seed=8),
    Recipe(within=0.12, across=0.05, seed=13),
]


# adapters: the only places that know the inner names of the trainer


def heads_of(recipes, dim=D):
    return Heads([Head(dim, recipe.prototypes, recipe.code_dim, recipe.seed) for recipe in recipes])


def tensors_of(heads, place):
    return {name: value[place] for name, value in heads.state_dict().items()}


def thresholds_of(recipes, dtype=torch.float32):
    return torch.tensor([(recipe.within, recipe.across) for recipe in recipes], dtype=dtype)


def settings_of(recipe, impl="auto"):
    return Settings(
        relative=recipe.relative,
        temperature=recipe.temperature,
        teacher_decay=recipe.teacher_decay,
        dropout=recipe.dropout,
        patches=recipe.patches,
        impl=impl,
    )


def schedule_of(recipe, rows):
    return Schedule(rows, recipe.batch_size, recipe.data_seed)


def loop_of(heads, features, recipes, rows, **options):
    (first, *_), dtype = recipes, heads.student.dtype
    schedule, thresholds = schedule_of(first, rows), thresholds_of(recipes, dtype)
    rates = dict(lr=first.lr, lr_prototypes=first.lr_prototypes)
    return Loop(heads, features, (P, D), schedule, thresholds, settings_of(first), **rates, **options)


def features_start(recipe, rows):
    """A head that starts at the leading directions of rows [N,D] and their k-means."""
    head = Head(rows.shape[1], recipe.prototypes, recipe.code_dim, recipe.seed)
    head.start_from_features(rows, recipe.seed)
    return head.state_dict()


def best_of_four(rows, K, seed):
    return spherical_kmeans(rows, K, starts=4, seed=seed).centres


def stream_of(recipe, images, windows, steps):
    """A streamed schedule over `images` images of one square, whose features are the image's number."""

    class Store:
        folder = None

        def __init__(self, part):
            self.numbers = torch.tensor(part.numbers)

        def __len__(self):
            return len(self.numbers)

        def rows(self, rows, dtype):
            return self.numbers[rows].to(dtype)[:, None, None]

        def close(self):
            pass

    dataset = ArrayDataset(make_images(images))
    return Stream(
        dataset,
        "a fingerprint",
        Windows(windows, steps),
        open=Store,
        batch_size=recipe.batch_size,
        data_seed=recipe.data_seed,
    )


def step_of(heads, recipes, impl):
    """A function from (features [B,P,D], partner, masks, patches) to the losses of one train_step."""
    first = recipes[0]
    optimizer = make_optimizer(heads, first.lr, first.lr_prototypes)
    thresholds, settings = thresholds_of(recipes, heads.student.dtype), settings_of(first, impl)

    def step(features, partner, masks, patches):
        draws = Draws(None, partner, None if masks is None else masks > 0, patches)
        return train_step(heads, optimizer, features, draws, thresholds, settings)

    return step


def figures(loss, head):
    """A loss's numbers for one head, by the names of metrics.jsonl."""
    pairs = dict(energy=loss.energy[head], distance=loss.distance[head], closeness=loss.mean)
    named = {f"{name}_{kind}": value[place] for name, value in pairs.items() for place, kind in enumerate(KINDS)}
    named |= {"total": loss.total[head], "data": loss.data[head]}
    return {name: float(value) for name, value in named.items()}


KINDS = ("within", "across")


# comparisons


def assert_same_head(got, learner, tolerance):
    """Every tensor, judged by how far learning has moved it."""
    begin = start(learner.recipe, got["projection.linear.weight"].shape[1])
    assert set(got) == set(begin)
    for name, truth in learner.head.items():
        moved = (truth - begin[name]).abs().max()
        error = (got[name].detach().cpu().double() - truth.double()).abs().max()
        assert error <= tolerance * moved, f"{name}: error {error:.3g}, moved by {moved:.3g}"


def assert_same_figures(got, truth, tolerance):
    for name, value in truth.items():
        assert got[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name


def assert_loop_learns_as_the_oracle(loop, recipes, features):
    steps = [0, 1, 2, 3, 7, 5]
    truths = [learn(recipe, features, steps) for recipe in recipes]
    for place, step in enumerate(steps):
        loss = loop.step(step)
        for head, (_, losses, _) in enumerate(truths):
            assert_same_figures(figures(loss, head), losses[place], 1e-4)
    for head, (learner, _, _) in enumerate(truths):
        assert_same_head(tensors_of(loop.heads, head), learner, 1e-4)


@pytest.fixture(scope="module")
def features():
    """float64 [7,P,D]: two batches of 3 an epoch, and one row left over."""
    return features_of_images(make_images(7))


# the step


@contextlib.contextmanager
def projection_by(path, monkeypatch):
    """The projection's paths: for a CPU, in one block or in several, and the one for a GPU."""
    with monkeypatch.context() as patch:
        if path == "small blocks":
            patch.setattr(model, next(name for name in vars(model) if name.startswith("BLOCK")), 1)
        if path == "general":
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("path", ["one block", "small blocks", "general"])
@pytest.mark.parametrize("change", [{}, {"relative": True}, {"patches": 5}, {"dropout": 0.0}], ids=str)
def test_the_step_is_the_iteration(features, dtype, path, change, monkeypatch):
    recipes = [dataclasses.replace(recipe, **change) for recipe in SEVERAL]
    heads, learners = heads_of(recipes).to(dtype), [Learner(recipe) for recipe in recipes]
    step = step_of(heads, recipes, "torch")
    with projection_by(path, monkeypatch):
        for number in range(3):
            batch, draws = features[draw_rows(number, len(features), recipes[0])], draw_rest(number, recipes[0])
            loss = step(batch.to(dtype), *draws)
            for head, learner in enumerate(learners):
                assert_same_figures(figures(loss, head), learner.step(batch, *draws), TOLERANCE[dtype])
    for head, learner in enumerate(learners):
        assert_same_head(tensors_of(heads, head), learner, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["dense", "torch"])
def test_the_step_is_the_iteration_for_each_implementation(features, impl):
    learner, heads = Learner(SEVERAL[1]), heads_of(SEVERAL[1:2]).double()
    step = step_of(heads, SEVERAL[1:2], impl)
    for number in range(2):
        batch, draws = features[draw_rows(number, 7, SEVERAL[1])], draw_rest(number, SEVERAL[1])
        step(batch, *draws)
        learner.step(batch, *draws)
    assert_same_head(tensors_of(heads, 0), learner, 1e-9)


# the loop


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("change", [{}, {"relative": True, "patches": 5}, {"dropout": 0.0}], ids=str)
def test_the_loop_is_the_iterations(features, change, resident):
    recipes = [dataclasses.replace(recipe, **change) for recipe in SEVERAL]
    source = features.half() if resident else lambda rows: features[rows].float()
    assert_loop_learns_as_the_oracle(loop_of(heads_of(recipes), source, recipes, 7), recipes, features)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("change", [{}, {"relative": True, "patches": 5}, {"dropout": 0.0}], ids=str)
def test_the_replayed_loop_is_the_iterations(features, change, resident, monkeypatch):
    graphs = play_graphs_on_the_cpu(monkeypatch)
    recipes = [dataclasses.replace(recipe, **change) for recipe in SEVERAL]
    source = features.float() if resident else lambda rows: features[rows].float()
    loop = loop_of(heads_of(recipes), source, recipes, 7, capture=True)
    assert_loop_learns_as_the_oracle(loop, recipes, features)
    assert loop.not_captured is None
    assert [graph.replays for graph in graphs] == [6]


@pytest.mark.gpu
@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("change", [{}, {"relative": True, "patches": 5}, {"dropout": 0.0}], ids=str)
def test_the_captured_loop_is_the_iterations(features, change, resident, capture):
    recipes = [dataclasses.replace(recipe, **change) for recipe in SEVERAL]
    source = features.float().cuda() if resident else lambda rows: features[rows].float()
    loop = loop_of(heads_of(recipes).cuda(), source, recipes, 7, capture=capture)
    assert_loop_learns_as_the_oracle(loop, recipes, features)
    assert loop.not_captured is None
    assert loop.capture == capture


# draws


def draws_of(recipe, steps, rows=23):
    schedule, settings = schedule_of(recipe, rows), settings_of(recipe)
    return [schedule.draws(step, P, D, settings, CPU) for step in range(steps)]


def test_draws_follow_the_rule_that_resumed_runs_depend_on():
    recipe = Recipe(batch_size=4, patches=5)
    for step, drawn in enumerate(draws_of(recipe, 12)):
        partner, masks, patches = draw_rest(step, recipe)
        assert torch.equal(drawn.rows, draw_rows(step, 23, recipe))
        assert torch.equal(drawn.partner, partner)
        assert torch.equal(drawn.masks, masks > 0)
        assert torch.equal(drawn.patches, patches)


def test_everything_that_is_drawn_differs_from_step_to_step():
    recipe = Recipe(batch_size=8, patches=5)
    steps = draws_of(recipe, 12)
    for name in ("rows", "partner", "masks", "patches"):
        assert len({str(getattr(drawn, name).tolist()) for drawn in steps}) == 12, name
    epochs = [torch.cat([drawn.rows for drawn in steps[first : first + 2]]).tolist() for first in range(0, 12, 2)]
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6
    assert {row for epoch in epochs for row in epoch} == set(range(23))  # no row is always the one left over
    assert all(
        (drawn.partner != torch.arange(8)).all() and set(drawn.partner.tolist()) <= set(range(8)) for drawn in steps
    )
    assert {str(drawn.rows.tolist()) for drawn in draws_of(dataclasses.replace(recipe, data_seed=12), 12)}.isdisjoint(
        str(drawn.rows.tolist()) for drawn in steps
    )


def test_masks_are_independent():
    """Between kinds, images and steps. A share p of the channels is hidden."""
    recipe, channels = Recipe(batch_size=4), 500
    schedule, settings = schedule_of(recipe, 23), settings_of(recipe)
    masks = torch.stack([schedule.draws(step, P, channels, settings, CPU).masks for step in range(10)])
    assert masks.shape == (10, 3, 4, channels)
    kept = masks.double().flatten(0, 2)
    assert kept.mean() == pytest.approx(1 - recipe.dropout, abs=0.01)
    assert (kept.mean(1) - (1 - recipe.dropout)).abs().max() < 0.1
    correlation = torch.corrcoef(kept).fill_diagonal_(0)
    assert correlation.abs().max() < 0.25  # over 120 rows of 500 numbers: 5.6 standard deviations


def test_sampled_patches_are_different_ones_and_all_alike():
    recipe = Recipe(batch_size=8, patches=5)
    chosen = torch.stack([drawn.patches for drawn in draws_of(recipe, 100)])
    assert all(len(set(image)) == 5 for step in chosen.tolist() for image in step)
    counts = chosen.flatten().bincount(minlength=P).double() / (100 * 8 * 5)
    assert (counts - 1 / P).abs().max() < 0.02
    assert len({tuple(image) for image in chosen[0].tolist()}) > 4


# streamed draws


def test_a_window_is_gone_through_in_another_order_every_time():
    recipe, images, windows, steps = Recipe(batch_size=4), 12, 2, 8  # 6 squares for 32 places: more than five rounds
    schedule = stream_of(recipe, images, windows, steps)
    seen = []
    for step in range(3 * windows * steps):
        rows = schedule.draws(step, P, D, settings_of(recipe), CPU).rows
        seen.append(schedule.features(rows)[:, 0, 0].long())
        assert torch.equal(seen[-1], draw_streamed_rows(step, images, recipe, windows, steps)), step
    orders = []
    for first in range(0, len(seen), steps):
        places = torch.cat(seen[first : first + steps]).tolist()
        rounds = [tuple(places[start : start + 6]) for start in range(0, 30, 6)]
        assert {frozenset(each) for each in rounds} == {frozenset(places)}  # each round has every square once
        orders += rounds
    assert len(set(orders)) == len(orders) == 30
    halves = {frozenset(schedule.images_of(2 * turn)) for turn in range(6)}
    assert len(halves) == 6  # another cut in every pass
    for turn in range(6):
        assert sorted(schedule.images_of(2 * turn) + schedule.images_of(2 * turn + 1)) == list(range(12))


# the start


def test_a_start_leaves_torchs_generator_alone():
    torch.manual_seed(99)  # no state that an earlier start could have left
    before = torch.get_rng_state()
    heads_of(SEVERAL)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_start_from_features():
    """W1 keeps the largest singular values of the rows, W3 is 0, and the prototypes are the best of four k-means."""
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) + 0.3
    recipe = Recipe(prototypes=20, code_dim=6, seed=4)
    head, begin = features_start(recipe, rows), start(recipe, 8)
    for name in ("linear.bias", "outer.weight", "outer.bias"):
        assert not head[f"projection.{name}"].any(), name
    assert torch.equal(head["projection.hidden.weight"].double(), begin["projection.hidden.weight"])
    codes = rows @ head["projection.linear.weight"].T
    singular = torch.linalg.svdvals(rows.double())[:6]
    torch.testing.assert_close((codes.T @ codes).double(), singular.square().diag(), rtol=1e-4, atol=1e-3)
    assert torch.equal(head["student"], best_of_four(codes, 20, seed=4))
    assert torch.equal(head["teacher"], head["student"])
    others = [best_of_four(codes, 20, seed=0), spherical_kmeans(codes, 20, starts=1, seed=4).centres]
    assert not any(torch.equal(head["student"], other) for other in others)


def test_each_seed_starts_from_patches_of_its_own(tmp_path, features):
    recipe = Recipe(lr=0.0, lr_prototypes=0.0, prototypes=12)
    out, _ = trained(tmp_path, recipe, 1, init="pca-kmeans", heads=2)
    for seed in (5, 6):
        g = torch.Generator().manual_seed(seed)
        rows = torch.cat([image[torch.randperm(P, generator=g)] for image in features]).float()
        truth = features_start(dataclasses.replace(recipe, seed=seed), rows)
        for name, value in head_in(out / "heads" / f"seed_{seed}.safetensors").items():
            if name != "teacher":  # a mean of two equal tensors, rounded
                assert torch.equal(value, truth[name]), name


# a whole run from its flags


def flags_of(recipe, steps, **more):
    """A recipe as flags of `train`. Thresholds are left out where `more` has a granularity."""
    flags = {name: value for name, value in dataclasses.asdict(recipe).items() if value is not None}
    flags = {name: value for name, value in flags.items() if name not in ("within", "across", "relative")}
    if "granularity" not in more:
        flags |= {"threshold_within": recipe.within, "threshold_across": recipe.across}
    flags |= dict(size=SIDE, eval_size=SIDE, backbone="iteration:features_of", init="random", steps=steps, log_every=1)
    flags |= dict(device="cpu", precision="float32", crops="center") | more
    words = []
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return words


def write_photos(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


def trained(folder, recipe, steps, *, images=7, **more):
    """A run in `folder` / "out", in a cache of its own. images: how many, or the images."""
    photos = folder / "photos"
    if not photos.exists():
        write_photos(photos, make_images(images) if isinstance(images, int) else images)
    flags = ["--data", str(photos), "--out", str(folder / "out"), "--cache", str(folder / "cache")]
    flags += flags_of(recipe, steps, **more)
    assert run(train.main, flags) == 0
    return folder / "out", flags


def head_in(path):
    """A checkpoint's tensors."""
    return {name.removeprefix("head."): value for name, value in load_file(path).items()}


def config_in(path):
    """Read (granularity, seed, heads) from a checkpoint."""
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["smooseg_fast.checkpoint"])["config"]
    return config["granularity"], config["seed"], config["heads"]


def metrics_of(out, head):
    return [record for record in map(json.loads, open(out / "metrics.jsonl")) if record["head"] == head]


def assert_run_learns_as_the_oracle(out, path, name, recipe, features, steps, watched=None, **stream):
    """The checkpoint at `path`, and the head's lines of metrics, whose label-free figures are of `watched`."""
    learner, losses, heads = learn(recipe, features, range(steps), **stream)
    assert_same_head(head_in(path), learner, 1e-4)
    records = metrics_of(out, name)
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    for record, truth, head in zip(records, losses, heads):
        assert_same_figures(record, truth | figures_of(head, features if watched is None else watched), 1e-4)


STEPS = 5


@pytest.fixture(scope="module")
def absolute(tmp_path_factory):
    """A run with thresholds, sampled patches and two seeds -> (its folder, its flags, its recipe)."""
    recipe = Recipe(patches=5)
    return *trained(tmp_path_factory.mktemp("absolute"), recipe, STEPS, heads=2), recipe


def test_thresholds_seeds_and_every_setting_reach_the_step(absolute, features):
    out, _, recipe = absolute
    assert sorted(path.name for path in (out / "heads").iterdir()) == ["seed_5.safetensors", "seed_6.safetensors"]
    for seed in (5, 6):
        own, path = dataclasses.replace(recipe, seed=seed), out / "heads" / f"seed_{seed}.safetensors"
        assert config_in(path) == (None, seed, 1)
        assert_run_learns_as_the_oracle(out, path, f"seed_{seed}", own, features, STEPS)
    assert (out / "checkpoint.safetensors").read_bytes() == (out / "heads" / "seed_5.safetensors").read_bytes()


def test_closeness_in_the_report(absolute, features):
    out, _, recipe = absolute
    u = unit(features)
    S = torch.einsum("nid,mjd->nmij", u, u)
    pairs = dict(within=torch.eye(7, dtype=torch.bool), across=~torch.eye(7, dtype=torch.bool))
    told = json.loads((out / "report.json").read_text())["closeness"]
    for kind, chosen in pairs.items():
        assert told[kind]["mean"] == pytest.approx(float(S[chosen].mean()), abs=1e-5)
        assert told[kind]["threshold"] == pytest.approx(getattr(recipe, kind))


def test_the_state_that_a_run_resumes_from(absolute, features):
    out, _, recipe = absolute
    tensors = load_file(out / "training.safetensors")
    for head in range(2):
        learner, losses, _ = learn(dataclasses.replace(recipe, seed=5 + head), features, range(STEPS))
        state = {k.removeprefix("heads."): v[head] for k, v in tensors.items() if k.startswith("heads.")}
        assert_same_head(state, learner, 1e-4)
        moments = [tensors[f"optimizer.{place}.exp_avg"][head] for place in range(7)]
        for name, got in zip(learner.learnt, moments):
            truth = learner.moments[name][0]
            assert (got - truth).abs().max() <= 1e-4 * truth.abs().max(), name
        assert float(tensors["losses.total"][head]) == pytest.approx(losses[-1]["total"], rel=1e-4)


def test_impl_reaches_the_objective(tmp_path, monkeypatch):
    loss, seen = sk.smooseg_loss, []

    def recorded(features, *args, impl="auto", **options):
        seen.append((len(features), impl))
        return loss(features, *args, impl=impl, **options)

    monkeypatch.setattr(sk, "smooseg_loss", recorded)
    trained(tmp_path, Recipe(), 2, impl="dense")
    assert [impl for images, impl in seen if images == Recipe.batch_size] == ["dense", "dense"]


def test_granularities_and_seeds_reach_their_heads(tmp_path, features):
    granularities, recipe = (0.21, -0.13), Recipe(relative=True, dropout=0.15, seed=3, data_seed=17)
    out, _ = trained(tmp_path, recipe, STEPS, granularity=granularities, heads=2)
    names = [f"granularity_{value:g}_seed_{seed}" for value in granularities for seed in (3, 4)]
    assert sorted(path.stem for path in (out / "heads").iterdir()) == sorted(names)
    for name in names:
        value, seed = float(name.split("_")[1]), int(name.split("_")[3])
        own = dataclasses.replace(recipe, within=value, across=value, seed=seed)
        assert config_in(out / "heads" / f"{name}.safetensors") == ([value], seed, 1)
        assert_run_learns_as_the_oracle(out, out / "heads" / f"{name}.safetensors", name, own, features, STEPS)


def test_fit_learns_as_the_oracle(tmp_path, features):
    recipe = Recipe(dropout=0.0, teacher_decay=0.7, temperature=0.4, batch_size=4)
    settings = {k: v for k, v in dataclasses.asdict(recipe).items() if k not in ("within", "across", "relative")}
    settings |= dict(threshold_within=recipe.within, threshold_across=recipe.across, init="random", crops="center")
    settings |= dict(size=SIDE, eval_size=SIDE, steps=STEPS, backbone="iteration:features_of", cache=str(tmp_path))
    segmenter = smooseg_fast.fit(make_images(7), progress=False, device="cpu", precision="float32", **settings)
    learner, _, _ = learn(recipe, features, range(STEPS))
    assert_same_head(segmenter.head.state_dict(), learner, 1e-4)


def test_a_streamed_run_learns_as_the_oracle(tmp_path):
    recipe, images, steps = Recipe(batch_size=7, within=0.2, across=0.1), 22, 10
    out, _ = trained(tmp_path, recipe, steps, images=images, cache_limit="1.6KB")
    streamed = json.loads((out / "report.json").read_text())["streamed"]
    assert streamed == {"count": 2, "steps": 2}  # windows of 11 squares for 14 places: two and a half passes
    features = features_of_images(make_images(images))
    stream = dict(rows_of=draw_streamed_rows, windows=2, window_steps=2)
    sample, path = features[[0, 11]], out / "checkpoint.safetensors"
    assert_run_learns_as_the_oracle(out, path, "seed_5", recipe, features, steps, sample, **stream)


def test_crops_reach_the_step(tmp_path):
    """Four images that are put together are four of the five crops; the fifth is their middle."""
    corners = make_images(12)
    images = [np.block([[[a], [b]], [[c], [d]]]) for a, b, c, d in zip(*(iter(corners),) * 4)]
    half = SIDE // 2
    squares = []
    for place, image in enumerate(images):
        squares += [*corners[4 * place : 4 * place + 4], image[half : half + SIDE, half : half + SIDE]]
    recipe = Recipe(batch_size=6)
    out, _ = trained(tmp_path, recipe, 3, images=images, crops="five")
    learner, _, _ = learn(recipe, features_of_images(squares), range(3))
    assert_same_head(head_in(out / "checkpoint.safetensors"), learner, 1e-4)


def test_resample_reaches_the_features(tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (4, 2 * SIDE, 2 * SIDE, 3), np.uint8))
    means = set()
    for resample in ("nearest", "bilinear"):
        out, _ = trained(tmp_path / resample, Recipe(), 1, images=images, resample=resample)
        means.add(json.loads((out / "report.json").read_text())["closeness"]["within"]["mean"])
    assert len(means) == 2


def test_figures_with_labels_are_of_the_evaluation_size(tmp_path):
    images = make_images(4)
    write_photos(tmp_path / "photos" / "images", images)
    write_photos(tmp_path / "photos" / "labels", [image[..., 0] % 2 for image in images])
    out, _ = trained(tmp_path, Recipe(), 1, eval_size=SIDE + 8)
    scores = json.loads((out / "report.json").read_text())["scores"]
    assert scores["hungarian"]["pixels"] == 4 * (SIDE + 8) ** 2
    assert len(CacheFolder(tmp_path / "cache").stores()) == 2  # features of the training size and of this one


# the identity of a run

ANOTHER = {  # every setting that decides the result, as another value than the run's
    "preset": ["potsdam"],
    "ignore": [3],
    "data": None,  # another folder, made by the test
    "backbone": ["iteration:other_features_of"],
    "size": [SIDE + 8],
    "eval_size": [SIDE + 8],
    "crops": ["slide"],
    "resample": ["bilinear"],
    "scale": ["0.5"],
    "margin": [8],
    "intensity": ["image"],
    "bands": [1],
    "pages": ["all"],
    "prototypes": [3],
    "groups": None,  # of a tree alone, see test_groups
    "granularity": [0.3],
    "threshold_within": [0.32],
    "threshold_across": [-0.13],
    "temperature": [0.24],
    "steps": [STEPS + 1],
    "batch_size": [4],
    "patches": [4],
    "lr": [5e-3],
    "lr_prototypes": [1.8e-2],
    "dropout": [0.34],
    "teacher_decay": [0.79],
    "channels": [4],
    "code_dim": [6],
    "init": ["pca-kmeans"],
    "heads": [1],
    "seed": [6],
    "data_seed": [12],
    "on_drift": ["stop"],
}
MACHINE = {  # settings of files and of the machine; None where a run here cannot have another value
    "out": None,
    "cache": ["elsewhere"],
    "cache_limit": ["1GB"],
    "log": None,
    "log_every": [2],
    "checkpoint_every": [1],
    "device": ["auto"],
    "backbone_precision": None,
    "precision": ["auto"],
    "impl": ["dense"],
    "deterministic": None,
    "verbose": None,
}


def changed(flags, name, value):
    flags, flag = list(flags), "--" + name.replace("_", "-")
    if flag in flags:
        place = flags.index(flag)
        del flags[place : place + 2]
    return [*flags, flag, *map(str, value)]


def test_every_setting_is_known_to_these_tests():
    assert {field.name for field in dataclasses.fields(TrainConfig)} - set(MACHINE) == set(ANOTHER)


@pytest.mark.parametrize("name", [name for name, value in ANOTHER.items() if value])
def test_a_run_is_not_resumed_with_another(absolute, name, capsys):
    out, flags, _ = absolute
    if name == "granularity":  # takes the place of the thresholds
        flags = [*flags]
        for threshold in ("--threshold-within", "--threshold-across"):
            del flags[flags.index(threshold) : flags.index(threshold) + 2]
    before = (out / "run.json").read_bytes()
    assert run(train.main, changed(flags, name, ANOTHER[name])) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: --out {out}: holds another run ({name} is ")
    assert said.count("\n") == 1
    assert (out / "run.json").read_bytes() == before


def test_a_run_is_not_resumed_on_other_images(absolute, tmp_path, capsys):
    out, flags, _ = absolute
    assert run(train.main, changed(flags, "data", [write_photos(tmp_path / "other", make_images(7, seed=1))])) == 2
    assert f"error: --out {out}: holds another run (data is " in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, value in MACHINE.items() if value])
def test_a_run_is_the_same_on_another_machine(absolute, name, capsys, monkeypatch, tmp_path):
    _, flags, _ = absolute
    monkeypatch.chdir(tmp_path)
    assert run(train.main, changed(flags, name, MACHINE[name])) == 0
    assert "this run is finished" in capsys.readouterr().out


# the oracle itself


@pytest.mark.parametrize(
    "change",
    [
        dict(within=0.32),
        dict(across=-0.13),
        dict(within=-0.12, across=0.31),
        dict(relative=True),
        dict(temperature=0.22),
        dict(dropout=0.34),
        dict(teacher_decay=0.79),
        dict(lr=4.1e-3),
        dict(lr_prototypes=1.71e-2),
        dict(lr=1.7e-2, lr_prototypes=4e-3),
        dict(batch_size=4),
        dict(patches=5),
        dict(seed=6),
        dict(data_seed=12),
    ],
    ids=str,
)
def test_the_oracle_tells_settings_apart(features, change):
    """Each alone moves the weights by 30 times the tolerance at least."""
    recipes = Recipe(), dataclasses.replace(Recipe(), **change)
    one, other = (learn(recipe, features, range(STEPS))[0] for recipe in recipes)
    with pytest.raises(AssertionError, match="moved by"):
        assert_same_head(other.head, one, 3e-3)


def test_rounding_is_far_below_the_tolerance(features):
    for recipe in SEVERAL:
        exact, rounded = (learn(recipe, features, range(STEPS), dtype=dtype)[0] for dtype in TOLERANCE)
        assert_same_head(rounded.head, exact, 1e-5)
