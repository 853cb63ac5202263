"""The library inside a caller's own state of PyTorch: it works, gives the same, and leaves that state as it was."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from textures import draw

import smooseg_fast

SETTINGS = dict(size=64, eval_size=64, steps=2, batch_size=2, patches=16, progress=False, device="cpu")
IMAGES = [draw(number)[0][:64, :64] for number in range(3)]


@contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def state():
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    return torch.get_default_dtype(), torch.get_default_device(), *modes


@pytest.fixture(scope="module")
def labels():
    return smooseg_fast.fit(IMAGES, **SETTINGS).predict(IMAGES[0])


@pytest.mark.parametrize(
    "surroundings",
    [
        default_dtype,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["float64", "no_grad", "inference_mode", "autocast", "device"],
)
def test_fit_and_predict_do_not_see_the_callers_settings(tmp_path, monkeypatch, labels, surroundings):
    with surroundings():
        before = state()
        segmenter = smooseg_fast.fit(IMAGES, **SETTINGS)
        path = segmenter.save(tmp_path / "checkpoint.safetensors")
        assert np.array_equal(segmenter.predict(IMAGES[0]), labels)
        assert np.array_equal(smooseg_fast.Segmenter.load(path, device="cpu").predict(IMAGES[0]), labels)
        assert state() == before


def test_a_tree_is_no_finer_than_the_patches_there_are():
    """Three images of 16 patches cannot start 64 groups."""
    small = [image[:32, :32] for image in IMAGES]
    segmenter = smooseg_fast.fit(small, **SETTINGS | dict(size=32, eval_size=32))
    assert segmenter.checkpoint.config.prototypes == 3 * 16
    with pytest.raises(smooseg_fast.UserError, match="--prototypes 49: cannot start from 48 patches"):
        smooseg_fast.fit(small, prototypes=49, **SETTINGS | dict(size=32, eval_size=32))
