"""How features are made: batches that do not fit, their pace, and runs that are killed."""

import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_store import SLIDE, FakeBackbone, extract, photos, shards, small_shards  # noqa: F401

from smooseg_fast.backbones.filterbank import Filterbank
from smooseg_fast.datasets import open_dataset
from smooseg_fast.datasets.images import cut_squares, read_image
from smooseg_fast.errors import UserError
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import read_shard, to_storage
from smooseg_fast.system import progress

# batches that do not fit


class Short(FakeBackbone):
    """From its call number `since` on, more than `room` squares do not fit."""

    def __init__(self, room, since=1, interrupt_at=-1):
        super().__init__(interrupt_at)
        self.room, self.since = room, since

    def __call__(self, images):
        if self.calls + 1 >= self.since and len(images) > self.room:
            self.calls += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().__call__(images)


def batches(cache):
    return [read_shard(path).contents.batch for path in shards(cache)]


def test_a_batch_that_does_not_fit_is_halved_until_it_does(photos, tmp_path, capsys):  # noqa: F811
    features = extract(photos, tmp_path / "short", Short(room=3), batch_size=8)
    assert batches(tmp_path / "short") == [2]
    assert features.rows(range(8))[:, 0, 3].tolist() == [2] * 8  # the size of the batch that a row was in
    said = capsys.readouterr().err
    assert "batch      4 squares: more do not fit into the memory of cpu" in said
    assert "batch      2 squares" in said
    whole = extract(photos, tmp_path / "whole", batch_size=8)
    assert torch.equal(whole.load()[..., :3], features.load()[..., :3])


def test_a_rerun_keeps_to_the_batches_that_fitted(photos, tmp_path, small_shards):  # noqa: F811
    """Memory is short from the third shard on, and plenty again after the interruption."""
    extract(photos, tmp_path / "undisturbed", Short(room=2, since=4), batch_size=4, **SLIDE)
    assert batches(tmp_path / "undisturbed") == [4, 4] + [2] * 8
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "cache", Short(room=2, since=4, interrupt_at=12), batch_size=4, **SLIDE)
    assert 2 < len(shards(tmp_path / "cache")) < 10
    extract(photos, tmp_path / "cache", FakeBackbone(), batch_size=4, **SLIDE)
    found, wanted = (shards(tmp_path / name) for name in ("cache", "undisturbed"))
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in wanted]


def test_an_image_that_cannot_be_read_is_named_once_however_often_batches_are_halved(photos, tmp_path, capsys):  # noqa: F811
    (photos / "0.png").write_bytes(b"no image")
    features = extract(photos, tmp_path / "cache", Short(room=1), batch_size=8, **SLIDE)
    said = capsys.readouterr().err
    assert said.count("do not fit into the memory") == 3
    assert [said.count(f"skipped: {photos / name}") for name, _ in features.skipped] == [1, 1, 1]


def test_where_not_even_one_square_fits(photos, tmp_path):  # noqa: F811
    with pytest.raises(
        UserError, match="--size 8: a single square does not fit into the memory of cpu; take a smaller size"
    ):
        extract(photos, tmp_path, Short(room=0))


def test_other_errors_of_a_backbone_come_through(photos, tmp_path):  # noqa: F811
    class Broken(FakeBackbone):
        def __call__(self, images):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        extract(photos, tmp_path, Broken())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mirror", [False, True])
def test_on_a_card_rows_are_those_of_the_backbone_called_by_hand(photos, tmp_path, mirror):  # noqa: F811
    """Many batches in flight one after another, with copies next to them."""
    for number in range(40):
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(
            photos / f"more{number}.png"
        )
    backbone, data = Filterbank("cuda"), open_dataset(photos, "train")
    options = FeatureOptions(size=64, crops="slide", cache=tmp_path, batch_size=7, mirror=mirror, progress=False)
    found = open_or_extract(data, backbone, options)
    squares = [
        square
        for name in dict.fromkeys(found.names)
        for _, square in cut_squares(read_image(photos / name), 64, "slide")
    ]
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    rows = torch.cat([backbone(part.flip(3) if mirror else part)[0].cpu() for part in images.split(7)])
    rows = rows.unflatten(1, (8, 8)).flip(2).flatten(1, 2) if mirror else rows
    assert torch.equal(found.load(), to_storage(rows))


# the pace


def test_an_extraction_tells_its_pace_and_a_reader_none(photos, tmp_path, capsys):  # noqa: F811
    extract(photos, tmp_path)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("extracted")]
    found = re.fullmatch(
        r"extracted  8 squares of 10 images in [\d.]+ s: [\d.]+ images/s, (\d+) % of the time in the backbone; "
        r"3 squares a batch, fake in float32 on cpu",
        line,
    )
    assert 0 <= int(found[1]) <= 100
    extract(photos, tmp_path)
    assert "extracted" not in capsys.readouterr().err


def test_a_phase_is_announced_once_it_is_slow(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    with progress.announced("quick"):
        pass
    assert said == []
    monkeypatch.setattr(progress, "SILENT_S", 0.0)
    spoken = threading.Event()
    monkeypatch.setattr(progress, "say", lambda line: (said.append(line), spoken.set()))
    with progress.announced("slow"):
        assert spoken.wait(10)
    assert said == ["slow"]


# SIGKILL


def test_killed_at_random_moments():
    """killed_extraction.py says what it does; with 500 images and 10 moments it takes a minute."""
    script = Path(__file__).with_name("killed_extraction.py")
    done = subprocess.run([sys.executable, script, "40", "2"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed (-9)") == 2
