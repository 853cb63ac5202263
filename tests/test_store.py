import itertools
import json
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from smooseg_fast.datasets import cutting, open_dataset
from smooseg_fast.datasets.images import cut_squares
from smooseg_fast.errors import UserError, WriteError
from smooseg_fast.features import job, store
from smooseg_fast.features.cachefolder import default_cache
from smooseg_fast.features.extract import open_or_extract
from smooseg_fast.features.job import FeatureOptions
from smooseg_fast.features.store import (
    Contents,
    DamagedShard,
    FeatureStore,
    read_shard,
    require_sound,
    to_storage,
    write_shard,
)
from smooseg_fast.system.files import write_atomic
from smooseg_fast.system.signals import Interrupted

PATCH, SIZE, P, D = 4, 8, 4, 5


class FakeBackbone:
    """Gives mean colour and column of each patch and the batch size, so a wrong order, batch or mirror shows."""

    name, digest, patch, dim, device, precision = "fake", "f00d", PATCH, D, torch.device("cpu"), "float32"

    def __init__(self, interrupt_at: int = -1, scale: float = 1.0):
        self.calls, self.interrupt_at, self.scale = 0, interrupt_at, scale

    def __call__(self, images):
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        self.calls += 1
        if self.calls == self.interrupt_at:
            raise KeyboardInterrupt
        h, w = images.shape[2] // PATCH, images.shape[3] // PATCH
        colour = images.float().unflatten(2, (h, PATCH)).unflatten(4, (w, PATCH)).mean(dim=(3, 5))  # [B,3,h,w]
        batch = torch.full((len(images), 1, h, w), float(len(images)))
        column = torch.arange(w).float().expand(len(images), 1, h, w)
        return self.scale * torch.cat([colour, batch, column], dim=1).flatten(2).transpose(1, 2), (h, w)


@pytest.fixture
def photos(tmp_path) -> Path:
    """Ten images of several sizes and shapes, two of which cannot be read, the last among them."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    sizes = [(8, 8), (8, 16), (30, 10), (9, 9), None, (12, 40), (8, 8), (16, 9), (11, 13), None]
    for number, size in enumerate(sizes):
        file = folder / f"{number}.png"
        if size is None:
            file.write_bytes(b"no image")
        else:
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(file)
    return folder


def small():
    """Four images a shard of central squares, and one of sliding or five squares."""
    store.SHARD_BYTES = 4 * P * D * 2 + 1


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(store, "SHARD_BYTES", store.SHARD_BYTES)  # to be put back
    small()


def extract(photos, cache, backbone=None, **settings) -> FeatureStore:
    options = FeatureOptions(**{"size": SIZE, "cache": cache, "batch_size": 3, **settings})
    return open_or_extract(open_dataset(photos, "train"), backbone or FakeBackbone(), options)


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/shard-*.safetensors"))


def expected(photos, mirror=False, **settings) -> tuple[list[str], torch.Tensor]:
    """Names and mean colours [N,P,3] of every square, without threads, batches or shards."""
    data, names, rows = open_dataset(photos, "train"), [], []
    for index, name in enumerate(data.names):
        if name in ("4.png", "9.png"):
            continue
        for _, square in cut_squares(data.image(index), SIZE, **settings):
            names.append(name)
            patches = square.astype(np.float32).reshape(2, PATCH, 2, PATCH, 3).mean(axis=(1, 3))
            rows.append(torch.from_numpy(patches.reshape(P, 3)))
    return names, torch.stack(rows)


# results


@pytest.mark.parametrize("crops", ["center", "slide", "five"])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_rows_are_the_features_of_the_squares_in_order(photos, tmp_path, small_shards, crops, resample, batch_size):
    names, colours = expected(photos, crops=crops, resample=resample)
    features = extract(photos, tmp_path, crops=crops, resample=resample, batch_size=batch_size)
    assert len(features) == len(names)
    assert features.names == tuple(names)
    assert (features.grid, features.P, features.D) == ((2, 2), P, D)
    torch.testing.assert_close(features.rows(range(len(features)))[..., :3], colours, rtol=1e-3, atol=0)
    assert features.nbytes == len(names) * P * D * 2


def test_crops_tell_where_the_squares_lie(photos, tmp_path):
    features = extract(photos, tmp_path, crops="slide")
    places = {
        name: [crop for other, crop in zip(features.names, features.crops) if other == name] for name in features.names
    }
    assert places["0.png"] == [(0, 0)]
    assert places["1.png"] == [(0, 0), (0, 2), (0, 4), (0, 6), (0, 8)]
    assert places["2.png"][-1] == (24 - 8, 0)


def test_five_crops_stop_and_resume_as_others(photos, tmp_path, small_shards):
    features = extract(photos, tmp_path, crops="five")
    assert features.names == tuple(name for name in dict.fromkeys(features.names) for _ in range(5))
    content = {shard.name: shard.read_bytes() for shard in shards(tmp_path)}
    damaged = shards(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    extract(photos, tmp_path, crops="five")
    assert content == {shard.name: shard.read_bytes() for shard in shards(tmp_path)}


def test_the_mirror_has_its_columns_mirrored_back(photos, tmp_path):
    straight, mirrored = extract(photos, tmp_path, crops="slide"), extract(photos, tmp_path, crops="slide", mirror=True)
    assert straight.names == mirrored.names
    assert straight.crops == mirrored.crops
    a, b = straight.load(), mirrored.load()
    # colours belong to the picture and come back to their place; the column was counted in the mirrored picture
    assert torch.equal(a[..., :3], b[..., :3])
    assert torch.equal(a[..., 4], 1 - b[..., 4])


def test_rows_in_any_order_with_repeats_and_from_any_kind_of_index(photos, tmp_path, small_shards):
    features = extract(photos, tmp_path, crops="slide")
    everything = features.load(dtype=torch.float32)
    order = [7, 0, len(features) - 1, 7, 4, 3]
    for index in (order, tuple(order), torch.tensor(order), torch.tensor(order, dtype=torch.int32)):
        assert torch.equal(features.rows(index), everything[order])
    assert features.rows([1]).dtype == torch.float32
    half = features.rows([1, 2], dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half.float(), everything[1:3])
    assert features.rows([]).shape == (0, P, D)
    for wrong in (-1, len(features)):
        with pytest.raises(IndexError, match=f"row {wrong} of a store of {len(features)} rows"):
            features.rows([0, wrong])


def test_load_keeps_the_stored_type_unless_told(photos, tmp_path):
    features = extract(photos, tmp_path)
    assert features.load().dtype == torch.float16
    assert features.load(dtype=torch.float64).dtype == torch.float64
    assert features.load(device="meta").device.type == "meta"


@pytest.mark.skipif(sys.platform != "linux", reason="looks at the process through /proc")
def test_features_are_memory_mapped_with_one_file_open_for_the_lock(photos, tmp_path, small_shards):
    before = len(os.listdir("/proc/self/fd"))
    features = extract(photos, tmp_path, crops="slide")
    assert len(os.listdir("/proc/self/fd")) == before + 1
    mapped = Path("/proc/self/maps").read_text()
    assert len(shards(tmp_path)) > 3
    assert all(str(path) in mapped for path in shards(tmp_path))
    features.rows([0]).zero_()
    assert features.rows([0]).any()  # the caller's rows are copies
    features.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not [path for path in shards(tmp_path) if str(path) in Path("/proc/self/maps").read_text()]


# images that cannot be used


def test_images_that_cannot_be_read_are_named_skipped_and_counted(photos, tmp_path, small_shards, capsys):
    names, _ = expected(photos, crops="center")
    features = extract(photos, tmp_path)
    assert features.names == tuple(names)
    assert [name for name, _ in features.skipped] == ["4.png", "9.png"]
    assert all("not an image" in reason for _, reason in features.skipped)
    out, err = capsys.readouterr()
    assert out == ""
    assert f"skipped: {photos / '4.png'}: not an image" in err
    again = extract(photos, tmp_path)
    assert again.skipped == features.skipped
    err = capsys.readouterr().err
    assert "skipped before: 2 of 10 images, first 4.png: not an image" in err
    key = shards(tmp_path)[0].parent.name[:8]
    assert f"to try again, python -m smooseg_fast.cache rm {key} --cache {tmp_path}" in err


def test_a_link_that_leads_nowhere_is_skipped_until_it_does(photos, tmp_path, capsys):
    (photos / "3.png").rename(tmp_path / "away.png")
    (photos / "3.png").symlink_to(tmp_path / "later.png")
    assert [name for name, _ in extract(photos, tmp_path / "cache").skipped] == ["3.png", "4.png", "9.png"]
    assert f"skipped: {photos / '3.png'}: no such file; check the path" in capsys.readouterr().err
    (tmp_path / "away.png").rename(tmp_path / "later.png")
    assert [name for name, _ in extract(photos, tmp_path / "cache").skipped] == ["4.png", "9.png"]


def test_an_image_smaller_than_a_patch_is_skipped(photos, tmp_path, capsys):
    Image.new("RGB", (50, PATCH - 1)).save(photos / "3.png")
    Image.new("RGB", (PATCH, PATCH)).save(photos / "8.png")
    features = extract(photos, tmp_path)
    assert ("3.png", "50 x 3 pixels, less than one patch of the backbone (4 pixels)") in features.skipped
    assert "8.png" in features.names
    assert "skipped: 3.png: 50 x 3 pixels" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["memory", "pixels"])
def test_a_strip_too_long_for_the_memory_is_skipped(photos, tmp_path, monkeypatch, why):
    """At a short side of 8 pixels, 5.png (12 x 40) has 208, and 6.png no more than any other square."""
    plain = cutting.cut_squares

    def short(image, *settings):
        if image.shape[:2] == (12, 40):
            raise MemoryError
        return plain(image, *settings)

    if why == "memory":
        monkeypatch.setattr(cutting, "cut_squares", short)
    else:
        monkeypatch.setattr(job, "MAX_PIXELS", 212)
    names = dict(extract(photos, tmp_path).skipped)
    assert names.pop("5.png") == "40 x 12 pixels, too many for the memory with 8 on the short side"
    assert list(names) == ["4.png", "9.png"]


def test_when_no_image_can_be_used_it_is_an_error_each_time(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(UserError, match=r"none of the 2 images can be used \(first: a\.png: not an image"):
            extract(tmp_path / "photos", tmp_path / "cache")
    assert shards(tmp_path / "cache") == []


# the cache


def test_a_second_call_reads_and_another_setting_extracts(photos, tmp_path):
    extract(photos, tmp_path)
    used = FakeBackbone()
    extract(photos, tmp_path, used)
    assert used.calls == 0
    other, coarse = FakeBackbone(), FakeBackbone()
    other.digest, coarse.precision = "beef", "bfloat16"
    for backbone, settings in [
        (other, {}),
        (coarse, {}),
        (FakeBackbone(), {"batch_size": 2}),
        (FakeBackbone(), {"size": 12}),
        (FakeBackbone(), {"crops": "slide"}),
        (FakeBackbone(), {"resample": "bilinear"}),
        (FakeBackbone(), {"mirror": True}),
    ]:
        extract(photos, tmp_path, backbone, **settings)
        assert backbone.calls > 0
    (photos / "9.png").unlink()
    changed = FakeBackbone()
    extract(photos, tmp_path, changed)
    assert changed.calls > 0
    assert len(list(tmp_path.glob("*/meta.json"))) == 9


def test_the_folder_says_what_it_is(photos, tmp_path):
    extract(photos, tmp_path, crops="slide")
    meta = json.loads(next(tmp_path.glob("*/meta.json")).read_text())
    want = dict(
        dataset="photos", images=10, backbone="fake", weights="f00d", size=SIZE, crops="slide", grid=[2, 2], channels=D
    )
    assert want.items() <= meta.items()


def test_the_default_cache_follows_the_environment(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    extract(photos, None)
    assert len(shards(tmp_path / "xdg" / "smooseg_fast")) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "smooseg_fast"


def test_a_cache_that_cannot_be_written_is_named(photos, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"--cache .*/file: cannot be read \(Not a directory\); give a folder"):
        extract(photos, tmp_path / "file")


def test_a_full_disk_is_said_and_loses_nothing(photos, tmp_path, small_shards, undisturbed, monkeypatch):
    def full(path, content):
        if path.name == "shard-00002.safetensors":
            raise WriteError(f"{path}: cannot be written")
        return write_atomic(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_atomic", full)
        with pytest.raises(WriteError, match=r"shard-00002\.safetensors: cannot be written"):
            extract(photos, tmp_path / "cache", **SLIDE)
    backbone = FakeBackbone()
    extract(photos, tmp_path / "cache", backbone, **SLIDE)
    assert backbone.calls == LAST_CALL - sum(CALLS[:2])
    assert {path.name: path.read_bytes() for path in shards(tmp_path / "cache")} == undisturbed


# interruption and damage

SLIDE = dict(crops="slide")
CALLS = [1, 2, 3, 1, 0, 4, 1, 2, 1, 0]  # of an undisturbed extraction, for each shard of one image: batches of 3
LAST_CALL = sum(CALLS)


@pytest.fixture
def undisturbed(photos, tmp_path, small_shards) -> dict[str, bytes]:
    backbone = FakeBackbone()
    extract(photos, tmp_path / "undisturbed", backbone, **SLIDE)
    assert backbone.calls == LAST_CALL
    return {path.name: path.read_bytes() for path in shards(tmp_path / "undisturbed")}


@pytest.mark.parametrize(("call", "said"), [(1, "no shard of features was finished yet"), (5, None)])
def test_an_interruption_says_what_is_kept(photos, tmp_path, small_shards, call, said):
    with pytest.raises(Interrupted) as stop:
        extract(photos, tmp_path / "cache", FakeBackbone(interrupt_at=call), **SLIDE)
    assert stop.value.number == signal.SIGINT
    if said is None:
        (folder,) = (tmp_path / "cache").iterdir()
        assert len(shards(tmp_path / "cache")) == 2
        said = f"features of 2 of 10 images are kept in {folder}"
    assert stop.value.kept == str(stop.value) == said


@pytest.mark.parametrize("call", range(1, LAST_CALL + 1))
def test_an_interrupted_extraction_makes_the_shards_that_are_not_whole(photos, tmp_path, undisturbed, call):
    interrupted, resumed = FakeBackbone(interrupt_at=call), FakeBackbone()
    with pytest.raises(KeyboardInterrupt):
        extract(photos, tmp_path / "cache", interrupted, **SLIDE)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    whole = sum(calls < call for calls in itertools.accumulate(CALLS))
    left = {path.name: path.read_bytes() for path in shards(tmp_path / "cache")}
    assert left == dict(list(undisturbed.items())[:whole])
    assert not list(tmp_path.glob("cache/*/.*"))
    features = extract(photos, tmp_path / "cache", resumed, **SLIDE)
    assert resumed.calls == LAST_CALL - sum(CALLS[:whole])
    assert {path.name: path.read_bytes() for path in shards(tmp_path / "cache")} == undisturbed
    assert features.names == tuple(expected(photos, crops="slide")[0])
    assert [name for name, _ in features.skipped] == ["4.png", "9.png"]


@pytest.mark.parametrize("damage", ["short", "long", "header", "features", "gone", "other"])
def test_a_damaged_shard_is_named_and_made_again_and_the_others_stay(photos, tmp_path, undisturbed, damage, capsys):
    cache = tmp_path / "undisturbed"
    paths = shards(cache)
    victim, stamps = paths[2], {path: path.stat().st_mtime_ns for path in paths}
    content = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        header_cut, bit = content[:30] + b"\0" * 30 + content[60:], content[:-1] + bytes([content[-1] ^ 4])
        kinds = {
            "short": content[:-2],
            "long": content + b"\0\0",
            "header": header_cut,
            "features": bit,
            "other": paths[4].read_bytes(),
        }
        victim.write_bytes(kinds[damage])
    backbone = FakeBackbone()
    features = extract(photos, cache, backbone, **SLIDE)
    assert (f"damaged: {victim}: " in capsys.readouterr().err) == (damage != "gone")
    assert backbone.calls == CALLS[2]
    assert {path.name: path.read_bytes() for path in shards(cache)} == undisturbed
    assert {path for path in paths if path.stat().st_mtime_ns != stamps[path]} <= {victim}
    assert features.names == tuple(expected(photos, crops="slide")[0])


def test_images_skipped_in_full_shards_and_in_one_without_rows_are_kept_too(photos, tmp_path, small_shards):
    for name in ("0.png", "1.png", "2.png", "3.png", "5.png"):
        (photos / name).unlink()
    again = FakeBackbone()
    for backbone in (FakeBackbone(), again):  # 4 and 9 cannot be read, 9 in a shard by itself
        features = extract(photos, tmp_path, backbone)
        assert len(features) == 3
        assert [name for name, _ in features.skipped] == ["4.png", "9.png"]
        assert torch.equal(features.load(dtype=torch.float32), features.rows([0, 1, 2]))
    assert again.calls == 0


def test_two_damaged_shards_apart_are_both_made_again(photos, tmp_path, undisturbed):
    cache, backbone = tmp_path / "undisturbed", FakeBackbone()
    paths = shards(cache)
    for victim in (paths[0], paths[3]):
        victim.write_bytes(b"")
    extract(photos, cache, backbone, **SLIDE)
    assert backbone.calls == CALLS[0] + CALLS[3]
    assert {path.name: path.read_bytes() for path in shards(cache)} == undisturbed


def test_shards_of_a_backbone_of_another_width_are_not_mixed_in(photos, tmp_path, undisturbed):
    class Wider(FakeBackbone):
        dim = D + 1

        def __call__(self, images):
            features, grid = super().__call__(images)
            return torch.nn.functional.pad(features, (0, 1)), grid

    features = extract(photos, tmp_path / "undisturbed", Wider(), **SLIDE)
    assert features.load().shape[2] == features.D == D + 1


# numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp16_where_it_has_the_range(dtype):
    values = torch.tensor([[[0.0, 1.0, -3.5, 65504.0 if dtype != torch.bfloat16 else 65280.0]]], dtype=dtype)
    got = to_storage(values)
    assert got.dtype == torch.float16
    assert torch.equal(got.float(), values.float())
    assert to_storage(torch.zeros(2, 3, 4)).dtype == torch.float16
    assert to_storage(torch.empty(0, 3, 4)).dtype == torch.float16


@pytest.mark.parametrize("value", [65505.0, 1e30, 3.4e38, -7e4, 6e-5, 1e-20])
def test_bf16_where_it_has_not_and_never_infinity(value):
    got = to_storage(torch.tensor([[[0.0, value]]]))
    assert got.dtype == torch.bfloat16
    assert got.isfinite().all()
    assert got[0, 0, 1].item() == pytest.approx(value, rel=2**-8)


def test_shards_choose_their_type_each(photos, tmp_path, small_shards):
    white = np.full((8, 8, 3), 255, np.uint8)
    for number in range(10):
        Image.fromarray(white if number > 4 else white // 255).save(photos / f"{number}.png")
    features = extract(photos, tmp_path, FakeBackbone(scale=300.0))
    kinds = {path.name[6:11]: safe_open(path, "pt").get_slice("features").get_dtype() for path in shards(tmp_path)}
    assert kinds == {"00000": "F16", "00001": "BF16", "00002": "BF16"}
    assert features.load().dtype == torch.float32
    want = torch.tensor([300.0] * 5 + [76500.0] * 5)
    torch.testing.assert_close(features.rows(range(10))[:, 0, 0], want, rtol=2**-8, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_an_error_that_names_the_image(photos, tmp_path, value):
    class Broken(FakeBackbone):
        def __call__(self, images):
            features, grid = super().__call__(images)
            if self.calls == 2:
                features[1, 2, 3] = value
            return features, grid

    with pytest.raises(UserError, match=r"backbone fake: gave NaN or infinity for 5\.png"):
        extract(photos, tmp_path, Broken())


def test_a_backbone_of_another_grid_than_its_patch_says(photos, tmp_path):
    backbone = FakeBackbone()
    backbone.patch = 2
    with pytest.raises(UserError, match=r"backbone fake: gave \(3, 4, 5\) on grid \(2, 2\) .* patch of 2 pixels"):
        extract(photos, tmp_path, backbone)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 10}, r"--size 10: not a multiple of the backbone's patch, 4 pixels; take 8 or 12"),
        ({"size": 3}, r"--size 3: .*; take 4$"),
        ({"size": 0}, r"--size 0: .*; take 4$"),
        ({"size": -9}, r"--size -9: .*; take 4$"),
        ({"size": 10, "argument": "--eval-size"}, r"--eval-size 10: not a multiple"),
    ],
)
def test_wrong_settings_are_named(photos, tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        extract(photos, tmp_path, **settings)


# progress


def test_progress_is_on_stderr_and_can_be_silenced(photos, tmp_path, capsys):
    for name in ("4.png", "9.png"):
        (photos / name).unlink()
    extract(photos, tmp_path / "one")
    out, err = capsys.readouterr()
    assert out == ""
    assert "extract: 100%" in err
    assert "8/8" in err
    extract(photos, tmp_path / "one")
    extract(photos, tmp_path / "two", progress=False)
    assert capsys.readouterr() == ("", "")


# the file format alone


def test_a_shard_comes_back_as_written(tmp_path):
    names, crops = ("ä/1.png", "caf\udce9.png"), ((0, 0), (0, 7))  # the second name is not UTF-8 on disk
    contents = Contents((3, 6), (1, 2), names, crops, (("x", "y"),), batch=3)
    features = torch.randn(2, 2, 3)
    write_shard(tmp_path / "x.safetensors", contents, features)
    shard = read_shard(tmp_path / "x.safetensors")
    assert shard.contents == contents
    assert torch.equal(shard.features, features.half())


@pytest.mark.parametrize(
    "wrong",
    [
        dict(names=("a",)),
        dict(crops=((0, 0),)),
        dict(grid=(2, 2)),
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_shard_whose_header_does_not_fit_is_no_shard(tmp_path, wrong):
    right = dict(images=(0, 2), grid=(1, 2), names=("a", "b"), crops=((0, 0), (0, 0)), skipped=(), batch=2)
    write_shard(tmp_path / "right.safetensors", Contents(**right), torch.zeros(2, 2, 3))
    assert read_shard(tmp_path / "right.safetensors") is not None
    write_shard(tmp_path / "wrong.safetensors", Contents(**{**right, **wrong}), torch.zeros(2, 2, 3))
    with pytest.raises(DamagedShard, match="its header does not fit its features"):
        read_shard(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_changed_bit_anywhere_is_found(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    contents = Contents((0, 3), (1, 2), ("a", "b"), ((0, 0), (0, 1)), (("c", "torn"),), batch=2)
    write_shard(path, contents, torch.randn(2, 2, 3) * (1 if dtype == torch.float16 else 1e6))
    whole = path.read_bytes()
    require_sound(path, read_shard(path))
    for place in range(len(whole)):
        for bit in (5, place % 8):  # 5 tells upper case from lower
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            with pytest.raises(DamagedShard):
                require_sound(path, read_shard(path))


def test_a_disk_that_cannot_be_read_is_damage(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_shard(path, Contents((0, 1), (1, 1), ("a",), ((0, 0),), (), batch=1), torch.zeros(1, 1, 3))
    shard = read_shard(path)

    def torn(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(store, "open", torn, raising=False)
    with pytest.raises(DamagedShard, match=r"cannot be read \(Input/output error\)"):
        require_sound(path, shard)


def test_a_lock_in_a_folder_that_can_never_be_made_is_not_waited_for(tmp_path, monkeypatch):
    from smooseg_fast.system import locks

    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(locks, "_open", gone)  # so it is below /proc, or for a missing mount
    assert locks.Lock(tmp_path / "none" / "lock").take()
