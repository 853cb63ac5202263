"""Shared fixtures. Without a GPU the Triton kernels run in the interpreter, which has to be on before they are imported."""

import os
import signal

import pytest
import torch
from PIL import Image
from textures import draw, make_photos

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# started in the background, a shell has Ctrl-C ignored for this process and all that it starts: the tests of Ctrl-C need it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def same_on_every_cpu(monkeypatch):
    """With matrix units a vision transformer would compute in bfloat16."""
    monkeypatch.setattr("smooseg_fast.backbones.precision.has_matrix_units", lambda: False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return make_photos(tmp_path / "photos")


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        for kind in ("images", "labels"):
            (tmp_path / "set" / split / kind).mkdir(parents=True)
        for number in numbers:
            image, label = draw(number)
            label[:2] = 255
            Image.fromarray(image).save(tmp_path / "set" / split / "images" / f"{number}.png")
            Image.fromarray(label).save(tmp_path / "set" / split / "labels" / f"{number}.png")
    (tmp_path / "set" / "classes.txt").write_text("wall\nfence\n")
    return tmp_path / "set"


@pytest.fixture
def trained(labelled):
    """The checkpoint of a short run on `labelled`."""
    from test_trainer import SMALL

    from smooseg_fast import train
    from smooseg_fast.command import run

    assert run(train.main, ["--data", str(labelled), "--out", "out", *SMALL]) == 0
    return labelled.parent / "out" / "checkpoint.safetensors"


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that kernels are to fill starts as NaN: an element that nothing writes fails loudly."""

    def poison(function):
        def filled(*args, **kwargs):
            out = function(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else 12345)

        return filled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
