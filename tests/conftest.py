"""Shared fixtures. Without a GPU, Triton kernels run in the interpreter, which has to be on before their import."""

import os
import shutil
import signal

import pytest
import torch
from PIL import Image
from textures import draw, make_photos

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# what --backbone auto takes, whatever wheels and caches this machine has; tests of auto itself remove it
os.environ["SMOOSEG_BACKBONE"] = "filterbank"

# a shell that starts pytest in the background makes it, and all that it starts, ignore Ctrl-C, which some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=200, metavar="N", help="bad inputs that test_fuzz.py tries [200]")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def same_on_every_cpu(monkeypatch):
    """Hide matrix units, with which a vision transformer would compute in bfloat16."""
    monkeypatch.setattr("smooseg_fast.backbones.precision.has_matrix_units", lambda: False)
    monkeypatch.setattr("smooseg_fast.backbones.precision.has_dot_products", lambda: False)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return make_photos(tmp_path / "photos")


def write_labelled(root):
    """A labelled set of two textures: five images to train on, three to validate on."""
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for number in numbers:
            image, label = draw(number)
            label[:2] = 255
            Image.fromarray(image).save(root / split / "images" / f"{number}.png")
            Image.fromarray(label).save(root / split / "labels" / f"{number}.png")
    (root / "classes.txt").write_text("wall\nfence\n")
    return root


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write_labelled(tmp_path / "set")


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of a short run on a labelled set, with its cache. Read only: `trained` copies it."""
    from test_trainer import SMALL

    from smooseg_fast import train
    from smooseg_fast.command import run

    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr("smooseg_fast.backbones.precision.has_matrix_units", lambda: False)
        patch.setattr("smooseg_fast.backbones.precision.has_dot_products", lambda: False)
        assert run(train.main, ["--data", str(write_labelled(root / "set")), "--out", str(root / "out"), *SMALL]) == 0
    return root


@pytest.fixture
def trained(labelled, trained_once):
    """The checkpoint of a short run on a copy of `labelled`, in a folder that a test may change."""
    for name in ("out", "cache"):
        shutil.copytree(trained_once / name, labelled.parent / name)
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
