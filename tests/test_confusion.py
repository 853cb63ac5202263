"""Confusion counts against a direct count, pixel by pixel, at set sizes around the batch of 16."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smooseg_fast.datasets import IGNORE
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.features.sample import BATCH
from smooseg_fast.measure.confusion import LabelSquares

SIZE, GRID, K, CLASSES = 6, 3, 4, 3  # pixels of a square's side, patches of it, groups, classes


class Images(SimpleNamespace):
    def __len__(self):
        return len(self.names)


@pytest.mark.parametrize("count", [1, BATCH, BATCH + 1, 2 * BATCH + 1])
def test_every_pixel_of_every_image_counts(count):
    rng = np.random.default_rng(count)
    truth = rng.choice([*range(CLASSES), IGNORE], (count, SIZE, SIZE)).astype(np.uint8)
    groups = rng.integers(0, K, (count, GRID * GRID))
    names, kinds = tuple(map(str, range(count))), tuple(map(str, range(CLASSES)))
    dataset = Images(
        name="made",
        names=names,
        crops=[(0, 0)] * count,
        class_names=kinds,
        grid=(GRID, GRID),
        label=lambda index: truth[index],
        marked=lambda row: False,
        valid=lambda rows: None,
    )

    prototypes = torch.eye(K)
    codes = prototypes[torch.from_numpy(groups)]
    labels = LabelSquares(dataset, dataset, Cutting(size=SIZE), progress=False)
    counts = labels.confusion(lambda rows: codes[rows], prototypes)

    upsampled = torch.nn.functional.interpolate(codes.mT.unflatten(2, (GRID, GRID)), size=(SIZE, SIZE), mode="bilinear")
    expected = np.zeros((K, CLASSES), np.int64)
    for group, number in zip(upsampled.argmax(1).flatten().tolist(), truth.flatten().tolist()):
        if number != IGNORE:
            expected[group, number] += 1
    np.testing.assert_array_equal(counts, expected)
    assert counts.sum() == (truth != IGNORE).sum() > 0
