"""Files made to run programs, to hang, to use up memory, or to paint nonsense: refused in one line."""

import os
import stat
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_segmenter import MeanColours, untrained
from test_weights import error_of, packed

from smooseg_fast.backbones import load_backbone
from smooseg_fast.backbones.base import require_finite
from smooseg_fast.backbones.weights import is_pickle
from smooseg_fast.datasets import formats, images
from smooseg_fast.datasets.base import read_lines
from smooseg_fast.datasets.images import ImageError, image_size, read_image, read_label
from smooseg_fast.datasets.masks import read_mask
from smooseg_fast.errors import UserError
from smooseg_fast.system.budget import Budget
from smooseg_fast.system.files import regular
from smooseg_fast.system.outfolder import MARKER, Journal, OutFolder, written_by_us

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
READERS = [read_image, read_label, image_size]


def png(path, side, rows, depth=1):
    """A grey PNG of `side` pixels square and of `depth` bits, whose rows are `rows`."""

    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([depth, 0, 0, 0, 0])
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", b"P6 9 9 255\n"]
)
def test_only_formats_of_images_are_opened(tmp_path, monkeypatch, read, start):
    """Pillow starts Ghostscript for PostScript, whatever the name of the file is."""
    ran = tmp_path / "ran"
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "photo.png").write_bytes(start + bytes(243))
    with pytest.raises(ImageError, match="not an image of a kind that can be read"):
        read(tmp_path / "photo.png")
    assert not ran.exists()


def test_all_formats_that_are_opened_are_pillows(tmp_path):
    Image.init()
    assert set(formats.photo_formats()) <= set(Image.OPEN)
    for suffix in formats.PHOTOS:
        Image.new("RGB", (9, 8), "red").save(tmp_path / f"a{suffix}")
        assert read_image(tmp_path / f"a{suffix}").shape == (8, 9, 3)


def test_a_large_image_of_next_to_no_bytes_is_refused_before_it_is_decoded(tmp_path):
    bomb = png(tmp_path / "bomb.png", 2**13, [bytes(2**10)] * 2**13)
    with pytest.raises(ImageError, match=r"8192 x 8192 pixels in .* kB: blank, or made to use up memory; take it out"):
        read_image(bomb)
    assert read_label(bomb).shape == (2**13, 2**13)  # all one class
    assert read_mask(bomb).numbers.shape == (2**13, 2**13)


def test_a_large_drawing_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGE_PIXELS", 2**18)
    lines = np.random.default_rng(0).integers(0, 2, 2**10, np.uint8)
    rows = [np.packbits(np.roll(lines, n // 8) if n % 64 < 8 else 0 * lines).tobytes() for n in range(2**10)]
    assert read_image(png(tmp_path / "drawing.png", 2**10, rows)).any()


def test_bytes_in_flight_are_bounded():
    budget, most, running = Budget(10), [], [0]
    lock = threading.Lock()

    def work(nbytes):
        with budget.take(nbytes):
            with lock:
                running[0] += nbytes
                most.append(running[0])
            time.sleep(0.001)
            with lock:
                running[0] -= nbytes

    threads = [threading.Thread(target=work, args=(nbytes,)) for nbytes in (4, 4, 4, 25, 4, 25, 4) * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {total for total in most if total > 10} == {25}  # larger than all of it: alone
    assert budget.taken == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipes_are_not_waited_for(tmp_path):
    pipe = tmp_path / "x.png"
    os.mkfifo(pipe)
    for read in READERS:
        with pytest.raises(ImageError, match=r"cannot be decoded \(is a named pipe, no file\)"):
            read(pipe)
    assert not is_pickle(pipe)
    with pytest.raises(UserError, match="is a named pipe"):
        read_lines(pipe)
    with pytest.raises(UserError, match="is a named pipe"):
        Journal(pipe).read()
    with pytest.raises(UserError, match=r"cannot be read \(x.png: is a named pipe"):
        OutFolder(tmp_path, {}, record="x.png", outputs=())
    os.mkfifo(tmp_path / MARKER)
    assert written_by_us(tmp_path) == set()
    with pytest.raises(OSError, match="is a device, no file"):
        regular("/dev/zero")


# weights


def test_keys_that_hash_alike_are_refused_before_a_dict_is_made(tmp_path):
    keys = (((i * (2**61 - 1)) & (2**127 - 1)).to_bytes(16, "little") for i in range(20_000))
    content = b"\x80\x02}(" + b"".join(b"\x8a\x10" + key + b"N" for key in keys) + b"u."
    for form in ("zip", "legacy"):
        error_of(packed(tmp_path / "w.pth", content, form=form), "integers of 61 bits or more")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value):
    weights = {"a": torch.ones(3), "b": torch.tensor([1.0, value]), "count": torch.tensor(1)}
    with pytest.raises(UserError, match=r"^its weights hold NaN or infinity \(first in b\); get it again$"):
        require_finite(weights, "get it again")


def test_a_custom_backbone_with_nan_weights_is_refused(tmp_path, monkeypatch):
    code = """
import torch

class Net(torch.nn.Conv2d):
    patch = 8

    def __init__(self):
        super().__init__(3, 4, 8, 8)
        torch.nn.init.constant_(self.bias, torch.nan)
"""
    (tmp_path / "spoilt_net.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"--backbone spoilt_net:Net: its weights hold NaN .*first in bias"):
        load_backbone("spoilt_net:Net")


class Spoilt(MeanColours):
    """Its features are NaN where the image is white."""

    def extract(self, images):
        features = super().extract(images)
        return torch.where((images.amin((1, 2, 3)) == 1)[:, None, None], torch.nan, features)


def test_an_image_whose_features_are_not_finite_gets_no_mask():
    segmenter = untrained(torch.eye(3), Spoilt(), size=64, eval_size=64)
    segmenter.head.basis = None
    assert segmenter.predict(np.zeros((64, 64, 3), np.uint8)).shape == (64, 64)
    with pytest.raises(ImageError, match="gave NaN or infinity for it; take it out, or give another --backbone-pre"):
        segmenter.predict(np.full((64, 64, 3), 255, np.uint8))
