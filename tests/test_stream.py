"""Training whose features do not fit the cache: which images a step sees, what is there at a time, and that a run can
be stopped.
"""

import itertools
import json
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_processes import pair  # noqa: F401
from test_stops import kill
from test_store import SIZE, FakeBackbone
from test_trainer import SMALL, call, files

import smooseg_fast
from smooseg_fast import evaluate, train
from smooseg_fast.command import run
from smooseg_fast.datasets import ArrayDataset
from smooseg_fast.errors import UserError, WriteError
from smooseg_fast.features import extract as extracting
from smooseg_fast.features.cachefolder import CacheFolder
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.room import Expected, Windows, sampled, windows_of
from smooseg_fast.learn import stream
from smooseg_fast.learn.schedule import Settings
from smooseg_fast.learn.stream import open_for_training
from smooseg_fast.segment.checkpoint import read_training_state
from smooseg_fast.system.processes import ALONE

SQUARE = 4 * 5 * 2  # bytes of a square of the fake backbone


def images(count=40):
    """Make images of one square each, told apart by their colours."""
    return ArrayDataset([np.full((SIZE, SIZE, 3), 3 * number, np.uint8) for number in range(count)])


def opened(
    cache, *, limit=None, windows=None, resumed=False, in_use=0, dataset=None, processes=ALONE, said=None, data_seed=5
):
    options = FeatureOptions(size=SIZE, cache=cache, limit=limit, progress=False, processes=processes)
    say = (lambda line: None) if said is None else said.append
    learning = dict(batch_size=4, data_seed=data_seed, in_use=in_use, resumed=resumed, windows=windows, say=say)
    return open_for_training(dataset or images(), FakeBackbone(), options, **learning)


def seen(schedule, steps):
    """The images of each step, by their colours."""
    found = []
    for step in steps:
        rows = schedule.draws(step, 4, 5, Settings(True), torch.device("cpu")).rows
        found.append((schedule.features(rows)[:, 0, 0] / 3).round().int().tolist())
    return found


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


# batches of a step


def test_every_pass_sees_every_image_once_in_another_order(tmp_path):
    _, schedule = opened(
        tmp_path, windows=Windows(3, 3), resumed=True
    )  # windows of 13, 13 and 14 squares, of which 12 make batches
    passes = [flat(seen(schedule, range(first, first + 9))) for first in (0, 9, 18)]
    for numbers in passes:
        assert max(Counter(numbers).values()) == 1
        assert len(numbers) == 36
    assert passes[0] != passes[1] != passes[2]
    for turn in range(2):
        parts = [schedule.images_of(3 * turn + place) for place in range(3)]
        assert sorted(flat(parts)) == list(range(40))
        assert [len(part) for part in parts] == [13, 13, 14]
    assert set(passes[0][:12]) < set(schedule.images_of(0))
    assert set(passes[1][-12:]) < set(schedule.images_of(5))
    assert passes[0][:12] != schedule.images_of(0)[:12]  # shuffled within the window too
    other = opened(tmp_path, windows=Windows(3, 3), resumed=True, data_seed=6)[1]
    assert seen(other, [0]) != seen(schedule, [0])


def test_a_window_with_too_few_squares_is_gone_through_again(tmp_path):
    _, schedule = opened(tmp_path, windows=Windows(4, 4), resumed=True)  # 10 squares for 16 places
    counts = Counter(flat(seen(schedule, range(4))))
    assert set(counts) == set(schedule.images_of(0))
    assert set(counts.values()) == {1, 2}


def test_a_step_is_the_same_wherever_one_begins(tmp_path):
    steps = list(range(20))
    expected = seen(opened(tmp_path / "one", windows=Windows(3, 3), resumed=True)[1], steps)
    again = opened(tmp_path / "two", windows=Windows(3, 3), resumed=True)[1]
    assert seen(again, [14, 2, 15, 3]) == [expected[step] for step in (14, 2, 15, 3)]


def test_only_the_sample_and_one_window_are_there(tmp_path):
    _, schedule = opened(tmp_path, windows=Windows(3, 3), resumed=True)
    assert not schedule.ready(0)
    datasets = []
    for step in range(12):
        seen(schedule, [step])
        assert schedule.ready(step)
        assert schedule.ready(step + 1) == (step % 3 < 2)
        datasets.append(
            [store.meta["dataset"] for store in CacheFolder(tmp_path).stores() if "sample" not in store.meta["dataset"]]
        )
    names = [f"arrays, window {place + 1} of 3 in pass {turn + 1}" for turn, place in ((0, 0), (0, 1), (0, 2), (1, 0))]
    assert datasets == [[name] for name in names for _ in range(3)]
    schedule.close()
    assert len(CacheFolder(tmp_path).stores()) == 2  # a resumed run finds its window
    seen(schedule, [11])
    schedule.close(remove=True)
    (sample,) = CacheFolder(tmp_path).stores()
    assert sample.meta["dataset"] == "arrays, sample"
    assert sample.meta["images"] == sampled(40)


def test_a_window_that_another_run_is_in_stays(tmp_path):
    (_, one), (_, two) = (opened(tmp_path, windows=Windows(3, 3), resumed=True) for _ in range(2))
    assert seen(one, [0]) == seen(two, [0])
    seen(one, [3])
    assert len(CacheFolder(tmp_path).stores()) == 3
    assert seen(two, [1])
    two.close(remove=True)
    assert len(CacheFolder(tmp_path).stores()) == 2


def shared(processes, cache):
    _, schedule = opened(cache, windows=Windows(3, 3), resumed=True, processes=processes)
    found = seen(schedule, range(7))
    schedule.close(remove=True)
    return found


def test_two_processes_see_the_same_windows(pair, tmp_path):  # noqa: F811
    whole = shared(ALONE, tmp_path / "one")
    assert pair(shared, tmp_path / "two") == [whole, whole]
    assert files(tmp_path / "one") == files(tmp_path / "two")


# how it is cut up


def test_windows_fit_beside_what_is_in_use():
    found = Expected(images=1000, squares=5.0, square_bytes=1000)  # 5.25 MB with the margin
    assert windows_of(found, 5_300_000, 0, 32) is None
    assert windows_of(found, 5_300_000, 100_000, 32) is not None
    assert sampled(1000) == 62
    for limit, in_use in ((5_200_000, 0), (360_000, 0), (2_000_000, 0), (2_000_000, 1_000_000), (700_000, 0)):
        windows = windows_of(found, limit, in_use, 32)
        assert in_use + (62 / 1000 + 1 / windows.count) * found.nbytes <= limit
        assert in_use + (62 / 1000 + 1 / (windows.count - 1)) * found.nbytes > limit
        assert windows.steps == round(5000 / windows.count / 32)
    with pytest.raises(
        UserError,
        match=r"--cache-limit 300\.0 kB: too small; .* at least 359\.2 kB at a time, and all features take 5\.[23] MB",
    ):
        windows_of(found, 300_000, 0, 32)
    assert windows_of(found, 359_250, 0, 32) == Windows(156, 1)
    with pytest.raises(UserError, match="too small"):
        windows_of(found, 359_000, 0, 32)


def test_the_cache_never_passes_the_limit(tmp_path, monkeypatch):
    class Wide(FakeBackbone):
        dim = 5000

        def __call__(self, squares):
            features, grid = super().__call__(squares)
            return torch.nn.functional.pad(features, (0, 4995)), grid

    sizes, write = [], extracting.write_shard

    def written(*args, **options):
        write(*args, **options)
        sizes.append(sum(store.nbytes for store in CacheFolder(tmp_path).stores()))

    monkeypatch.setattr(extracting, "write_shard", written)
    monkeypatch.setattr(
        stream, "open_or_extract", lambda part, backbone, options: extracting.open_or_extract(part, Wide(), options)
    )
    limit = 20 * 4 * 5000 * 2
    options = FeatureOptions(size=SIZE, cache=tmp_path, limit=limit, progress=False)
    learning = dict(batch_size=4, data_seed=5, in_use=0, resumed=False, windows=None, say=lambda line: None)
    _, schedule = open_for_training(images(), Wide(), options, **learning)
    assert schedule.windows == Windows(3, 3)
    for step in range(20):
        schedule.rows_of(step)
    assert len(sizes) == 8  # the sample and seven windows
    assert max(sizes) <= limit


def test_features_that_are_there_or_fit_are_not_streamed(tmp_path):
    whole, schedule = opened(tmp_path, limit=10**9)
    assert (len(whole), schedule) == (40, None)
    again, schedule = opened(tmp_path, limit=1)
    assert (len(again), schedule) == (40, None)


def test_a_run_that_began_with_all_features_goes_on_with_them(tmp_path):
    with pytest.raises(
        UserError,
        match=r"--cache-limit 1\.0 kB: the features of arrays take about 1\.7 kB and are needed all at once; give at",
    ):
        opened(tmp_path, limit=1000, resumed=True)
    assert not CacheFolder(tmp_path).stores()


# whole runs

STREAMED = ["--granularity", "0.06", "--prototypes", "3", "--steps", "8", "--cache-limit", "80kB"]


def test_a_streamed_run_says_so_and_its_parts_go(folder, capsys):
    assert call("--data", folder, "--out", "out", "--cache", "c", *SMALL, *STREAMED) == 0
    out = capsys.readouterr().out
    assert "features   streamed: all would take about 111.3 kB; 3 windows of 2 steps follow one another" in out
    assert "sample     6 squares of 2 images" in out
    assert "stream     window 1 of 3 in pass 2: 2 images, steps 7 to 8" in out
    state = read_training_state("out/training.safetensors")
    assert state.windows == (3, 2)
    report = json.loads(Path("out/report.json").read_text())
    assert report["streamed"] == {"count": 3, "steps": 2}
    assert [store.meta["dataset"] for store in CacheFolder("c").stores()] == ["photos, sample"]
    segmenter = smooseg_fast.fit(
        folder,
        cache="c",
        cache_limit="80kB",
        size=64,
        eval_size=64,
        steps=2,
        batch_size=4,
        prototypes=3,
        progress=False,
    )
    assert segmenter.checkpoint.step == 2


def test_killed_anywhere_it_ends_bit_for_bit_as_if_nothing_had_been(folder):
    moments = [
        ["shard-00000.safetensors", 1],
        ["shard-00000.safetensors", 2],
        ["training.safetensors", 2],
        ["shard-00000.safetensors", 2],
    ]
    codes = kill(folder, [0.0, *moments], "--cache", "c", *SMALL, *STREAMED)
    assert codes == [-signal.SIGKILL] * 5 + [0]
    assert files("out") == files("undisturbed/out")


def test_stopped_between_windows_it_tells_the_step_and_needs_no_limit_to_go_on(folder, monkeypatch, capsys):
    args = ["--data", "photos", "--cache", "c", *SMALL, *STREAMED]
    assert call(*args, "--out", "whole") == 0
    plain, parts = stream.open_or_extract, []

    def stopped(part, *rest):
        parts.append(part.name)
        if len(parts) == 4:  # the sample and two windows came before
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return plain(part, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stream, "open_or_extract", stopped)
        assert call(*args, "--out", "out") == 130
    assert "interrupted; step 4 of 8 is saved, whole, in out" in capsys.readouterr().err
    assert call(*args[: args.index("--cache-limit")], "--out", "out") == 0
    assert "resume     from step 4 of 8" in capsys.readouterr().out
    assert files("out").keys() == files("whole").keys()
    weights = [read_training_state(f"{out}/training.safetensors").heads for out in ("out", "whole")]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_full_disk_between_windows(folder, monkeypatch, capsys):
    plain, parts = stream.open_or_extract, []

    def full(part, *rest):
        parts.append(part)
        if len(parts) == 4:
            raise WriteError("c/shard: cannot be written")
        return plain(part, *rest)

    monkeypatch.setattr(stream, "open_or_extract", full)
    assert call("--data", "photos", "--cache", "c", *SMALL, *STREAMED, "--out", "out") == 2
    assert "error: c/shard: cannot be written; step 4 of 8 is saved, whole, in out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("much", "--cache-limit much: no size; give a number above 0 with its unit, such as 50GB"),
        (
            "64kB",
            "--cache-limit 64.0 kB: too small; a run needs at least 64.9 kB at a time, and all features take 111.3 kB",
        ),
    ],
)
def test_limits_that_cannot_be(folder, capsys, limit, message):
    assert run(train.main, ["--data", "photos", "--cache", "c", *SMALL, "--cache-limit", limit]) == 2
    assert f"error: {message}" in capsys.readouterr().err
    with pytest.raises(UserError, match="--cache-limit"):
        smooseg_fast.fit("photos", cache="c", cache_limit=limit, size=64, batch_size=4, progress=False)


def test_figures_need_all_their_features(labelled, trained, capsys):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--cache", "c"]
    assert run(evaluate.main, [*args, "--cache-limit", "27kB"]) == 2  # three squares, and three mirrored
    expected = (
        "error: --cache-limit 27.0 kB: the features of set/val take about 37.1 kB and are needed all at "
        "once; give at least 37.1 kB"
    )
    assert expected in capsys.readouterr().err
    assert run(evaluate.main, [*args, "--cache-limit", "27kB", "--no-mirror"]) == 0
    assert run(evaluate.main, [*args, "--cache-limit", "1.5"]) == 2
    assert "error: --cache-limit 1.5: no size" in capsys.readouterr().err
    assert run(train.main, ["--data", str(labelled), "--cache", "d", *SMALL, "--cache-limit", "14kB"]) == 2
    assert "the features of set/val take about 18.5 kB" in capsys.readouterr().err
