"""The embedded demo's pictures: the same everywhere for a seed, exact labels, splits that share nothing."""

import numpy as np

from smooseg_fast.datasets.mosaic import Mosaic, Scene


def test_an_image_depends_on_seed_split_index_and_size_alone():
    a = Mosaic("train", count=4, size=96)
    assert np.array_equal(a.image(2), Mosaic("train", count=9, size=96).image(2))
    assert np.array_equal(a.label(2), Mosaic("train", count=9, size=96).label(2))
    others = [Mosaic("val", 4, 96).image(2), Mosaic("train", 4, 96, seed=1).image(2), a.image(3)]
    assert all(not np.array_equal(a.image(2), other) for other in others)


def test_images_and_labels():
    mosaic = Mosaic("val", count=16, size=64)
    assert len(mosaic.names) == len(set(mosaic.names)) == len(mosaic) == 16
    seen = set()
    for index in range(16):
        image, label = mosaic.image(index), mosaic.label(index)
        assert image.dtype == label.dtype == np.uint8
        assert image.shape == (64, 64, 3)
        assert label.shape == (64, 64)
        assert image.std() > 5
        present = set(np.unique(label).tolist())
        assert 2 <= len(present) <= 5  # a scene has some of the materials, never all
        seen |= present
    assert seen == set(range(len(mosaic.class_names)))


def test_labels_are_exact():
    """The region changes where the label does, and each region is painted with its own material alone."""
    scene = Scene(Mosaic("train", 8, 96)._generator(5), 96)
    for region, material in enumerate(scene.materials):
        assert set(np.unique(scene.label[scene.region == region]).tolist()) <= {material}
    border = (scene.label[:, 1:] != scene.label[:, :-1]).mean()
    assert 0 < border < 0.2  # regions, not noise


def test_another_size_shows_the_same_scene():
    small, large = Mosaic("train", 2, 64).label(1), Mosaic("train", 2, 192).label(1)
    assert (large[1::3, 1::3] == small).mean() > 0.97


def test_fingerprints_differ():
    prints = [
        Mosaic(*a).fingerprint()
        for a in (("train", 128), ("val", 128), ("train", 9), ("train", 128, 96), ("train", 128, 224, 1))
    ]
    assert len(set(prints)) == len(prints)
    assert prints[0] == Mosaic("train", 128, 224, 0).fingerprint()
