"""Labels against codes: what is counted, and how much memory it takes."""

import re
import shutil
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smooseg_fast import evaluate
from smooseg_fast.command import run
from smooseg_fast.datasets import base, images
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.errors import UserError
from smooseg_fast.features.sample import BATCH
from smooseg_fast.measure import confusion as evaluation
from smooseg_fast.measure.confusion import LabelSquares


def made_up_labels(count, size, classes=4, only=None, grid=(4, 4)):
    """A dataset of random labels that are made whenever they are asked for, and a store of its images at once; reads
    are noted.
    """
    reads = []

    def label(index):
        reads.append(index)
        if only is not None and index not in only:
            return None
        return np.random.default_rng(index).integers(0, classes, (size, size), dtype=np.uint8)

    class Made(SimpleNamespace):
        def __len__(self):
            return count

    names, kinds = tuple(map(str, range(count))), ("a", "b", "c")  # number 3 counts nowhere
    return Made(
        name="made",
        names=names,
        crops=[(0, 0)] * count,
        class_names=kinds,
        grid=grid,
        label=label,
        reads=reads,
        valid=lambda rows: None,
        marked=lambda row: False,
    )


def counted(labels, K=5):
    g = torch.Generator().manual_seed(0)
    codes, prototypes = torch.randn(len(labels.dataset), 16, 6, generator=g), torch.randn(K, 6, generator=g)
    return labels.confusion(lambda rows: codes[rows], prototypes)


@pytest.mark.parametrize("kept", [0, 1, 2, 100], ids="{} batches kept".format)
def test_counts_do_not_depend_on_what_is_kept(kept, monkeypatch):
    count, size = 3 * BATCH + 5, 20
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept * BATCH * size**2)
    made = made_up_labels(count, size)
    labels = LabelSquares(made, made, Cutting(size=size))
    assert sorted(made.reads) == list(range(count))
    squares = np.concatenate([squares for _, squares, _ in labels._batches("labels")])
    assert [start for start, *_ in labels._batches("labels")] == list(range(0, count, BATCH))
    np.testing.assert_array_equal(squares, np.stack([made.label(index) for index in range(count)]))
    first, made.reads[:] = counted(labels), []
    np.testing.assert_array_equal(counted(labels), first)
    assert first.sum() == (squares < 3).sum()
    assert sorted(made.reads) == list(range(count))[kept * BATCH :]  # kept squares are not read again


def test_memory_does_not_grow_with_the_set(monkeypatch):
    size, threads = 64, 2
    monkeypatch.setattr(evaluation, "KEPT_BYTES", BATCH * size**2)
    monkeypatch.setattr(evaluation, "THREADS", threads)
    peaks = []
    for batches in (6, 30):
        made = made_up_labels(batches * BATCH, size, grid=(1, 1))
        codes = torch.ones(1, 1, 2).expand(BATCH, -1, -1)
        tracemalloc.start()
        try:
            LabelSquares(made, made, Cutting(size=size)).confusion(lambda rows, codes=codes: codes, torch.ones(1, 2))
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    batch = BATCH * size**2
    assert batch < min(peaks)
    # 30 in all: those kept, those ahead, and the one at hand with its copies
    assert max(peaks) < (1 + threads + 4) * batch


def test_where_nobody_labelled():
    made = made_up_labels(20, 8, only=())
    with pytest.raises(UserError, match="--data: none of the 20 images of made has a label"):
        LabelSquares(made, made, Cutting(size=8))
    made.label = lambda index: np.full((9, 8), 255, np.uint8)
    with pytest.raises(UserError, match="--data: every pixel in the squares of all 20 labels of made is 255"):
        LabelSquares(made, made, Cutting(size=8))
    labels = LabelSquares(*[made_up_labels(20, 8, only=(3,))] * 2, Cutting(size=8))
    squares = np.concatenate([squares for _, squares, _ in labels._batches("labels")])
    assert np.flatnonzero((squares != 255).any((1, 2))).tolist() == [3]


def test_features_and_their_mirror_images_of_other_images_are_refused(trained, labelled, monkeypatch, capsys):
    """Memory may have been short, or the network down, while one of them was made."""
    args, plain = ["--checkpoint", str(trained), "--data", str(labelled)], images.read_picture

    def torn(path, *how):
        if path.name == "5.png":
            raise images.ImageError(path, "does not fit into memory")
        return plain(path, *how)

    assert run(evaluate.main, [*args, "--no-mirror", "--eval-size", "56"]) == 0
    monkeypatch.setattr(base, "read_picture", torn)
    assert run(evaluate.main, [*args, "--eval-size", "56"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 5.png: is in only one of ")
    folders = re.search(
        r"one of (\S+) and (\S+), the features of its image and of its mirror image; remove both", error
    )
    folders = folders.groups()
    monkeypatch.setattr(base, "read_picture", plain)
    for folder in folders:
        shutil.rmtree(folder)
    assert run(evaluate.main, [*args, "--eval-size", "56"]) == 0
