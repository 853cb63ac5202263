"""Maps: where they lie, windows of them, the GeoTIFFs that predict writes, confidence and probabilities."""

import base64
import gc
import json
import os
import shutil
import signal
import sys
import zlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from textures import draw

from smooseg_fast import predict
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import IGNORE, gdal, georeference, images, inspection, raster, scaled, windows
from smooseg_fast.datasets.demo import datasets_of
from smooseg_fast.datasets.folder import open_folder_splits
from smooseg_fast.datasets.reading import PLAIN, Picture
from smooseg_fast.measure.confusion import count_wholes
from smooseg_fast.segment import refine
from smooseg_fast.segment import segmenter as segmenters
from smooseg_fast.segment.names import Group
from smooseg_fast.segment.parts import LEVELS, margins, stored
from smooseg_fast.segment.segmenter import Segmenter
from smooseg_fast.show import cog
from smooseg_fast.show.cog import CogWriter, Layout
from smooseg_fast.show.looks import Band
from smooseg_fast.show.outputs import PROBABILITIES, PhotoFiles, Plan
from smooseg_fast.show.unfinished import Unfinished
from smooseg_fast.system import files, ranges, stores
from smooseg_fast.system.signals import StopRequest

tifffile = pytest.importorskip("tifffile")
needs_gdal = pytest.mark.skipif(not gdal.available(), reason="needs rasterio")

KEYS = (1, 1, 0, 4, 1024, 0, 1, 1, 1025, 0, 1, 1, 1026, 34737, 9, 0, 3072, 0, 1, 32632)
PLACE = {
    georeference.SCALE: (0.25, 0.25, 0.0),
    georeference.TIEPOINT: (0.0, 0.0, 0.0, 500000.125, 5600000.1, 0.0),
    georeference.KEYS: KEYS,
    georeference.NUMBERS: (6378137.0, 298.257223563),
    georeference.WORDS: b"a place|\0",
}
LETTERS = {georeference.KEYS: "H", georeference.WORDS: "s"}


def extra(place):
    return [
        (tag, LETTERS.get(tag, "d"), 0 if tag == georeference.WORDS else len(values), values, True)
        for tag, values in place.items()
    ]


def write_map(path, values, *, nodata=None, place=PLACE, mask=None, byteorder=None, **options):
    """A GeoTIFF of values [H,W,n], with a mask [H,W] inside."""
    tags = extra(place) + ([] if nodata is None else [(42113, "s", 0, str(nodata), True)])
    with tifffile.TiffWriter(path, byteorder=byteorder) as file:
        file.write(values, extratags=tags, **{"photometric": "rgb", "tile": (64, 64), **options})
        if mask is not None:
            file.write(mask, photometric="mask", subfiletype=4)
    return path


def scene(height=150, width=210, empty=True):
    """A picture of two textures, black where there is no data."""
    pixels = np.array(Image.fromarray(draw(3)[0]).resize((width, height)))
    pixels = np.maximum(pixels, 1)
    if empty:
        pixels[:40, 150:] = 0
    return pixels


@pytest.fixture(params=["tifffile", pytest.param("gdal", marks=needs_gdal)])
def reader(request, monkeypatch):
    """Reads maps of any size in windows of one or the other package, of few pixels."""
    monkeypatch.setattr(gdal, "available", lambda: request.param == "gdal")
    monkeypatch.setattr(raster, "LAZY_PIXELS", 1000)
    monkeypatch.setattr(raster, "BLOCK", 64)
    monkeypatch.setattr(scaled, "READ_PIXELS", 5000)


# where a map lies


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tags_are_copied_as_they_are(tmp_path, byteorder, monkeypatch):
    monkeypatch.setattr(gdal, "available", lambda: False)
    path = write_map(tmp_path / "a.tif", scene(), byteorder=byteorder)
    place = georeference.georeference_of(path)
    assert place.tags == PLACE
    writer = CogWriter(Layout((150, 210), IGNORE, place=place), tmp_path)
    writer.put(0, 0, np.zeros((150, 210), np.uint8))
    assert georeference.georeference_of(writer.close(tmp_path / "b.tif")).tags == PLACE


@pytest.mark.parametrize(
    ("words", "tags"),
    [
        ("0.5 0 0 -0.5 100.25 199.75", {"SCALE": (0.5, 0.5, 0.0), "TIEPOINT": (0.0, 0.0, 0.0, 100.0, 200.0, 0.0)}),
        ("0 -2 -2 0 10 20", {"MATRIX": (0, -2, 0, 11, -2, 0, 0, 21, 0, 0, 0, 0, 0, 0, 0, 1)}),
        ("junk", None),
        ("1 2 3", None),
    ],
)
def test_world_files(tmp_path, monkeypatch, words, tags):
    monkeypatch.setattr(gdal, "available", lambda: False)
    Image.fromarray(scene()).save(tmp_path / "x.jpg")
    (tmp_path / "x.jgw").write_text("\n".join(words.split()))
    place = georeference.georeference_of(tmp_path / "x.jpg")
    if tags is None:
        assert place is None
    else:
        named = {getattr(georeference, name): values for name, values in tags.items()}
        assert place.tags == named | {georeference.KEYS: georeference.PIXEL_IS_AREA}


def test_no_place(tmp_path):
    tifffile.imwrite(tmp_path / "plain.tif", scene())
    turned = write_map(tmp_path / "turned.tif", scene())
    tifffile.imwrite(turned, scene(), extratags=[*extra(PLACE), (274, "H", 1, 6, True)])
    assert georeference.georeference_of(tmp_path / "plain.tif") is None
    assert georeference.georeference_of(turned) is None


# files in the layout of the cloud


@pytest.mark.parametrize(("bands", "big"), [(1, False), (3, False), (1, True)])
def test_a_file_has_the_layout_of_the_cloud(tmp_path, monkeypatch, bands, big):
    monkeypatch.setattr(cog, "SIDE", 32)
    monkeypatch.setattr(cog, "CLASSIC", 0 if big else 2**32)
    rng = np.random.default_rng(0)
    values = rng.integers(0, 255, (101, 77, bands), dtype=np.uint8)
    colours = rng.integers(0, 256, (256, 3), dtype=np.uint8) if bands == 1 else None
    layout = Layout((101, 77), IGNORE, colours=colours, bands=[f"band <{n}>" for n in range(bands)], scale=0.5)
    writer = CogWriter(layout, tmp_path)
    for top in range(0, 101, 45):  # parts that are no tiles
        for left in range(0, 77, 50):
            writer.put(top, left, values[top : top + 45, left : left + 50])
    path = writer.close(tmp_path / "a.tif")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tif"]
    with tifffile.TiffFile(path) as file:
        assert file.is_bigtiff == big
        sizes = [(page.imagelength, page.imagewidth) for page in file.pages]
        assert sizes == [(101, 77), (51, 39), (26, 20)]
        for number, page in enumerate(file.pages):
            shrunk = values[:: 2**number, :: 2**number]
            np.testing.assert_array_equal(page.asarray(), np.moveaxis(shrunk, 2, 0) if bands > 1 else shrunk[..., 0])
            assert page.tags["NewSubfileType"].value == (number > 0)
            assert page.tags["GDAL_NODATA"].value == str(IGNORE)
        places = [page.dataoffsets for page in file.pages]
        assert [page.offset for page in file.pages] == sorted(page.offset for page in file.pages)
        assert file.pages[-1].offset < min(places[-1])
        assert max(places[2]) < min(places[1])
        assert max(places[1]) < min(places[0])
        assert all(list(offsets) == sorted(offsets) for offsets in places)
        if colours is not None:
            np.testing.assert_array_equal(file.pages[0].colormap, colours.T.astype(np.uint16) * 257)
    assert (cog.read_level(path, 51 * 39) == values[::2, ::2, 0]).all()
    if colours is not None:
        cog.recolour(path, 255 - colours)
        with tifffile.TiffFile(path) as file:
            np.testing.assert_array_equal(file.pages[2].colormap, (255 - colours).T.astype(np.uint16) * 257)
            np.testing.assert_array_equal(file.pages[0].asarray(), values[..., 0])
    if gdal.available():
        with gdal.opened(path) as dataset:
            assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
            assert dataset.overviews(1) == [2, 4]
            assert dataset.descriptions[0] == "band <0>"
            assert dataset.scales == (0.5,) * bands


# windows


COLOURS = np.random.default_rng(0).integers(0, 256, (3, 256)).astype(np.uint16) * 257


def with_nan():
    """Floats that are no number where there is no data."""
    return np.where(scene() > 0, scene().astype(np.float32) / 255, np.float32(np.nan))


def deep(kind):
    """Values of more than 8 bits."""
    return (scene().astype(kind) - 3) * (91 if np.dtype(kind).kind == "u" else 0.37)


MAPS = {
    "colours": lambda: (scene(), {"nodata": 0}),
    "strips": lambda: (scene(), {"tile": None, "rowsperstrip": 7, "compression": "zlib"}),
    "planes": lambda: (np.moveaxis(scene(), 2, 0), {"planarconfig": "separate", "nodata": 0}),
    "opacity": lambda: (np.dstack([scene(), scene()[..., 0]]), {"extrasamples": ["unassalpha"]}),
    "deep": lambda: (scene().astype(np.uint16) * 91, {"nodata": 0}),
    "grey": lambda: (scene()[..., 1].astype(np.float32) / 7, {"photometric": "minisblack", "nodata": 0}),
    "not a number": lambda: (with_nan(), {"nodata": "nan"}),
    "white at 0": lambda: (scene()[..., 1], {"photometric": "miniswhite"}),
    "1 bit": lambda: (scene()[..., 1] > 90, {"photometric": "minisblack", "tile": None}),
    "palette": lambda: (scene()[..., 1] // 9, {"photometric": "palette", "colormap": COLOURS, "nodata": 0}),
    "mask": lambda: (scene(), {"mask": scene()[..., 0] > 0}),
}


@pytest.mark.parametrize("kind", MAPS)
def test_windows_are_those_of_the_whole(tmp_path, reader, kind):
    values, options = MAPS[kind]()
    path = write_map(tmp_path / "a.tif", values, **options)
    whole = images.read_picture(path)
    with raster.opened(path, PLAIN) as opened:
        picture = opened.picture
        assert picture.pixels.shape == whole.pixels.shape
        valid = np.ones((150, 210), bool) if whole.valid is None else whole.valid
        assert valid.all() == (kind in ("strips", "white at 0", "1 bit"))
        for window in (np.s_[:, :], np.s_[3:70, 60:], np.s_[64:128, 64:65], np.s_[140:]):
            np.testing.assert_array_equal(picture.pixels[window], whole.pixels[window])
            assert picture.valid is None or (picture.valid[window] == valid[window]).all()
        if kind not in ("white at 0", "1 bit"):  # Pillow has stretched or inverted these already
            expected = images.read_samples(path).sample(500)
            assert [sorted(sample) for sample in opened.sample(500)] == [sorted(sample) for sample in expected]


@needs_gdal
def test_every_band_may_have_its_value_without_data(tmp_path):
    values, empty = np.maximum(scene(empty=False), 4), np.s_[:40, 150:]
    values[empty] = (1, 2, 3)
    write_map(tmp_path / "a.tif", values)
    source = '<SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>{0}</SourceBand>'
    band = '<VRTRasterBand dataType="Byte" band="{0}"><NoDataValue>{0}</NoDataValue>' + source
    bands = "".join((band + "</SimpleSource></VRTRasterBand>").format(n) for n in (1, 2, 3))
    (tmp_path / "a.vrt").write_text(f'<VRTDataset rasterXSize="210" rasterYSize="150">{bands}</VRTDataset>')
    valid = images.read_picture(tmp_path / "a.vrt").valid
    assert not valid[empty].any()
    assert valid.sum() == 150 * 210 - 40 * 60


def test_labels_of_a_map_in_windows_are_those_of_the_whole(tmp_path, reader, trained):
    segmenter = Segmenter.load(trained)
    path = write_map(tmp_path / "a.tif", scene(), nodata=0)
    whole = images.read_picture(path)
    with raster.opened(path, PLAIN) as opened:
        for options in ({"refine": "none"}, {"scale": "native"}, {"scale": "0.6"}):
            labels = segmenter.predict(opened.picture, mirror=False, **options)
            np.testing.assert_array_equal(labels, segmenter.predict(whole, mirror=False, **options))
            assert (labels[:40, 150:] == IGNORE).all()
            assert (labels[40:] != IGNORE).all()


def test_a_damaged_map_is_named(tmp_path, reader):
    path = write_map(tmp_path / "a.tif", scene(), compression="zlib")
    path.write_bytes(path.read_bytes()[:-9000])
    with pytest.raises(images.ImageError, match=r"a\.tif"), raster.opened(path, PLAIN) as opened:
        opened.picture.pixels[:]


@needs_gdal
@pytest.mark.parametrize("suffix", [".vrt", ".img", ".jp2"])
def test_formats_that_gdal_reads(tmp_path, suffix):
    import rasterio
    from rasterio.shutil import copy

    source, path = write_map(tmp_path / "a.tif", scene(empty=False)), tmp_path / f"b{suffix}"
    options = {"QUALITY": "100", "REVERSIBLE": "YES"} if suffix == ".jp2" else {}
    with rasterio.Env():
        copy(source, path, driver=gdal.DRIVERS[suffix], **options)
    np.testing.assert_array_equal(images.read_picture(path).pixels, scene(empty=False))
    with gdal.opened(source) as first, gdal.opened(path) as second:
        assert first.crs == second.crs
        assert first.transform == second.transform
    place = georeference.georeference_of(path)
    for tag in (georeference.SCALE, georeference.TIEPOINT):
        assert place.tags[tag] == pytest.approx(PLACE[tag])
    assert 32632 in place.tags[georeference.KEYS]


# predict


@pytest.fixture
def folder_of_maps(tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    write_map(folder / "a.tif", scene(), nodata=0)
    Image.fromarray(scene(empty=False)).save(folder / "photo.png")
    return folder


def call(checkpoint, folder, *args):
    words = ["--checkpoint", str(checkpoint), "--images", str(folder), "--out", "made", "--no-mirror", *args]
    return run(predict.main, words)


def files_and_times():
    return {file: file.stat().st_mtime_ns for kind in predict_folders for file in Path("made", kind).glob("*.*")}


predict_folders = ("masks", "overlays", "confidence", "probabilities")


def test_predict_of_maps_and_photos(trained, folder_of_maps, reader, monkeypatch, capsys):
    monkeypatch.setattr(cog, "SIDE", 64)
    assert call(trained, folder_of_maps, "--confidence", "--probabilities") == 0
    segmenter = Segmenter.load(trained)
    for name, suffix in (("a", "tif"), ("photo", "png")):
        source = next(folder_of_maps.glob(f"{name}.*"))
        picture = images.read_picture(source)
        probs, labels = segmenter.predict_proba(picture, mirror=False), segmenter.predict(picture, mirror=False)
        mask = images.read_label(Path(f"made/masks/{name}.{suffix}"))
        np.testing.assert_array_equal(mask, labels)
        lead = np.array(Image.open(f"made/confidence/{name}.{suffix}"))
        np.testing.assert_array_equal(lead, margins(probs))
        if suffix == "png":
            with np.load("made/probabilities/photo.npz") as file:
                assert file["levels"] == LEVELS
                assert file["names"].tolist() == [group.name for group in segmenter.groups]
                np.testing.assert_array_equal(file["probabilities"], stored(probs))
        else:
            bands = tifffile.imread("made/probabilities/a.tif", key=0)
            np.testing.assert_array_equal(np.moveaxis(bands, 0, 2), stored(probs))
            assert (mask[:40, 150:] == IGNORE).all()
            assert (lead[:40, 150:] == IGNORE).all()
    for kind in ("masks", "confidence", "probabilities"):
        assert georeference.georeference_of(Path(f"made/{kind}/a.tif")).tags == PLACE
    table = Path("made/masks/a.tif.aux.xml").read_text()
    assert "<Category>group 0</Category>" in table
    shares = json.load(open("made/shares.json"))["images"]
    assert shares.keys() == {"a.tif", "photo.png"}
    assert sum(shares["a.tif"].values()) == pytest.approx(1, abs=1e-5)
    # once more: nothing is left to do; and then what was taken away
    before = files_and_times()
    assert call(trained, folder_of_maps) == 0
    printed = capsys.readouterr().out
    assert "2 of 2 images are done" in printed
    assert printed.endswith("--format gpkg\n")
    assert files_and_times() == before
    Path("made/confidence/a.tif").unlink()
    assert call(trained, folder_of_maps, "--confidence") == 0
    after = files_and_times()
    assert after.keys() == before.keys()
    assert {file.name for file in after if after[file] != before[file]} >= {"a.tif"}
    assert after[Path("made/masks/photo.png")] == before[Path("made/masks/photo.png")]


def test_several_numbers_of_groups_share_a_pass(trained, folder_of_maps, monkeypatch):
    (folder_of_maps / "photo.png").unlink()
    assert call(trained, folder_of_maps, "--groups", "2", "3") == 0
    picture = images.read_picture(folder_of_maps / "a.tif")
    for number in (2, 3):
        expected = Segmenter.load(trained).at(number).predict(picture, mirror=False)
        np.testing.assert_array_equal(images.read_label(Path(f"made/groups_{number}/masks/a.tif")), expected)


def test_new_colours_keep_the_labels_of_a_map(trained, folder_of_maps, monkeypatch):
    from smooseg_fast import name

    (folder_of_maps / "photo.png").unlink()
    assert call(trained, folder_of_maps) == 0
    labels, place = images.read_label(Path("made/masks/a.tif")), trained.parent
    assert run(name.main, ["--run", str(place), "0=roof"]) == 0
    monkeypatch.setattr("smooseg_fast.show.streamed.parts_at", None)  # would segment again
    assert call(trained, folder_of_maps) == 0
    assert "<Category>roof</Category>" in Path("made/masks/a.tif.aux.xml").read_text()
    np.testing.assert_array_equal(images.read_label(Path("made/masks/a.tif")), labels)


# probabilities


@pytest.mark.parametrize("refine", ["none", "guided", "joint"])
def test_labels_are_the_likeliest_groups(trained, refine):
    segmenter = Segmenter.load(trained)
    picture = Picture(scene(), np.ones((150, 210), bool))
    picture.valid[:40, 150:] = False
    probs = segmenter.predict_proba(picture, mirror=False, refine=refine)
    labels = segmenter.predict(picture, mirror=False, refine=refine)
    valid = picture.valid
    assert np.isnan(probs[~valid]).all()
    assert probs[valid].sum(-1) == pytest.approx(1, abs=1e-5)
    differ = (probs.argmax(-1) != labels) & valid
    best = np.sort(probs[differ], axis=-1)
    assert (best[:, -1] - best[:, -2] < 1e-4).all()  # ties
    assert differ.mean() < 1e-3
    assert margins(probs)[0, 209] == IGNORE


def test_margins_and_what_is_stored():
    probs = np.array([[[0.7, 0.2, 0.1], [np.nan] * 3, [0.5, 0.5, 0.0]]], np.float32)
    assert margins(probs).tolist() == [[127, IGNORE, 0]]
    assert stored(probs)[0, 0].tolist() == [178, 51, 25]
    assert margins(np.ones((1, 1, 1))).tolist() == [[LEVELS]]


def test_tiles_change_few_labels(trained, monkeypatch):
    """One tile against many: 640-pixel tiles, as predict has them, of the built-in features."""
    segmenter, picture = Segmenter.load(trained), scene(900, 700, empty=False)
    labels = {}
    for side in (1024, 640):
        monkeypatch.setattr(segmenters, "TILE", side)
        labels[side] = segmenter.predict(picture, mirror=False, scale="native")
    assert (labels[640] != labels[1024]).mean() < 0.005


def test_probabilities_that_are_interrupted_end_quietly(tmp_path, monkeypatch):
    """The archive ends before the file below it, also in the middle of an entry."""
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    group = Group(0, "road", (1, 2, 3))
    more = {PROBABILITIES: tmp_path / "p.npz"}
    files = PhotoFiles(Plan((4, 5), [group], np.zeros((256, 3), np.uint8), tmp_path / "m.png", more, None))
    files.discard()
    del files
    gc.collect()
    assert unraisable == []
    assert list(tmp_path.iterdir()) == []


# a stop inside a map


class Stop(Exception):
    """Ends a command in the middle, as a kill would: nothing is written any more."""


def counted(stop=None):
    """A check that counts the parts of maps, and stops after some of them."""

    def check(self):
        check.parts += 1
        if check.parts == stop:
            raise Stop

    check.parts = 0
    return check


@pytest.fixture
def one_map(folder_of_maps, monkeypatch):
    """A folder of a small map, which is cut into many tiles, rectangles and bands."""
    (folder_of_maps / "photo.png").unlink()
    write_map(folder_of_maps / "a.tif", scene(112, 180), nodata=0)
    monkeypatch.setattr(cog, "SIDE", 32)
    monkeypatch.setattr(segmenters, "TILE", 64)
    monkeypatch.setattr(refine, "SCORES", 3000)
    monkeypatch.setattr(refine, "GUIDED_RADIUS", 1.0)
    return folder_of_maps


def outputs_of(folder):
    """The bytes of all pictures and tiles, and the shares."""
    pictures = [file for kind in predict_folders for file in Path(folder, kind).glob("*")]
    files = {f"{file.parent.name}/{file.name}": file.read_bytes() for file in pictures}
    shares = json.load(open(f"{folder}/shares.json"))["images"]
    return files, Path(folder, "tiles.jsonl").read_bytes(), shares


@pytest.mark.parametrize(
    "options",
    [["--groups", "2", "3", "--confidence", "--probabilities"], ["--refine", "none"]],
    ids=["soft", "not refined"],
)
def test_a_map_resumes_where_it_was_stopped(trained, one_map, monkeypatch, capsys, options):
    words = [
        "--checkpoint",
        str(trained),
        "--images",
        str(one_map),
        "--no-mirror",
        "--scale",
        "native",
        *options,
    ]
    plain, count, rows = StopRequest.check, counted(), []
    monkeypatch.setattr(StopRequest, "check", count)
    assert run(predict.main, [*words, "--out", "whole"]) == 0
    folders = ("groups_2", "groups_3") if "2" in options else (".",)
    for stop in (max(1, int(0.7 * count.parts)), 1):
        monkeypatch.setattr(StopRequest, "check", counted(stop))
        with pytest.raises(Stop):
            predict.main([*words, "--out", "made"])
        journal = Path("made", folders[0], ".unfinished", "a", "journal.jsonl")
        rows.append(sum("tiles" in line for line in journal.read_text().splitlines()))
        journal.write_text(journal.read_text() + '{"tiles": "2-ma')  # a line that was cut short
    assert 0 < rows[0] <= rows[1]
    monkeypatch.setattr(StopRequest, "check", plain)
    capsys.readouterr()
    assert run(predict.main, [*words, "--out", "made"]) == 0
    assert "resumed    a.tif with" in capsys.readouterr().err
    for folder in folders:
        assert outputs_of(Path("made", folder)) == outputs_of(Path("whole", folder))
        assert not Path("made", folder, ".unfinished").exists()


def test_a_killed_map_resumes(trained, one_map, monkeypatch):
    args = (trained, one_map, "--scale", "native")
    assert call(*args) == 0
    before = outputs_of("made")
    shutil.rmtree("made")
    child = os.fork()
    if not child:
        torch.set_num_threads(1)

        def kill(self):
            if any("tiles" in line for line in open("made/.unfinished/a/journal.jsonl")):
                os.kill(os.getpid(), signal.SIGKILL)

        StopRequest.check = kill
        os._exit(call(*args))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not list(Path("made/masks").glob("*"))
    assert call(*args) == 0
    assert outputs_of("made") == before


def test_another_key_starts_over(tmp_path):
    key = {"mirror": True, "stamp": ["a.tif", 3, 7]}
    kept = Unfinished(tmp_path / "a", key).kept("mask")
    for row in (0, 1, 3):
        kept.note(row, [[8 * row, 8]])
    assert Unfinished(tmp_path / "a", {"mirror": True, "stamp": ["a.tif", 3, 7]}).kept("mask").rows == [
        [[0, 8]],
        [[8, 8]],
    ]
    for key in ({"mirror": False, "stamp": ["a.tif", 3, 7]}, {"mirror": True, "stamp": ["a.tif", 3, 8]}):
        assert Unfinished(tmp_path / "a", key).kept("mask").rows == []


DAMAGED_BANDS = {
    "labels without a shape": {"labels": 3},
    "labels that are no text": {"labels": [[1, 2], 3]},
    "labels of another shape": {"labels": [[1, 3], base64.b85encode(zlib.compress(b"ab")).decode()]},
    "labels that go on": {"labels": [[1, 2], base64.b85encode(zlib.compress(bytes(9))).decode()]},
    "a margin in words": {"margins": ["a"]},
    "rows below none": {"rows": -1},
}


@pytest.mark.parametrize("damage", DAMAGED_BANDS.values(), ids=DAMAGED_BANDS)
def test_a_damaged_line_of_an_unfinished_map_is_left_out(tmp_path, damage):
    band = Band(0, 2, np.array([[1, 2]], np.uint8), [0.5], 4)
    Unfinished(tmp_path / "a", {}).see(band)
    (kept,) = Unfinished(tmp_path / "a", {}).bands()
    assert (kept.row, kept.rows, kept.margins, kept.count) == (0, 2, [0.5], 4)
    np.testing.assert_array_equal(kept.labels, band.labels)
    journal = tmp_path / "a" / "journal.jsonl"
    first, line = map(json.loads, journal.read_text().splitlines())
    journal.write_text(f"{json.dumps(first)}\n{json.dumps(line | damage)}\n")
    assert Unfinished(tmp_path / "a", {}).bands() == []


@pytest.mark.parametrize("place", [[0, 2**70], [2**70, 8], [0, 9], [0, 0]])
def test_tiles_that_are_not_where_they_were_are_refused(tmp_path, place):
    kept = Unfinished(tmp_path / "a", {}).kept("mask")
    kept.path.write_bytes(bytes(8))
    writer = CogWriter(Layout((4, 4), 255), tmp_path, kept)
    with pytest.raises((ValueError, zlib.error)):
        writer.restore([[place]])
    writer.discard()


def test_a_map_starts_over_where_its_finished_part_is_damaged(trained, one_map, monkeypatch, capsys):
    plain = StopRequest.check
    monkeypatch.setattr(StopRequest, "check", counted(3))
    with pytest.raises(Stop):
        call(trained, one_map, "--scale", "native")
    (kept,) = Path("made/.unfinished/a").glob("*-mask")
    kept.write_bytes(bytes(kept.stat().st_size))
    monkeypatch.setattr(StopRequest, "check", plain)
    assert call(trained, one_map, "--scale", "native") == 0
    assert "damaged: the finished part of a.tif" in capsys.readouterr().err
    expected = Segmenter.load(trained).predict(one_map / "a.tif", mirror=False, scale="native")
    np.testing.assert_array_equal(images.read_label(Path("made/masks/a.tif")), expected)


@pytest.fixture
def store_of_a_map(one_map, reader, monkeypatch, tmp_path):
    """A map in a store that gives 2,000 bytes at a time; asking for all of it is an error."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, size in {"LARGE_BYTES": 0, "SMALL_BYTES": 0, "BLOCK_BYTES": 2000, "SPARSE_BLOCK_BYTES": 2000}.items():
        monkeypatch.setattr(stores, name, size)
    monkeypatch.setattr(files, "SENT_BYTES", 0)
    monkeypatch.setattr(ranges, "KEPT_BYTES", 6000)
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/scans/a.tif", (one_map / "a.tif").read_bytes())
    whole = type(memory).cat_file

    def parts(self, path, start=None, end=None, **options):
        assert "scans" not in path or not path.endswith("a.tif") or 0 < end - start <= 2000
        return whole(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(memory), "cat_file", parts)
    yield memory
    memory.rm("/scans", recursive=True)


@pytest.mark.parametrize("reader", ["tifffile"], indirect=True)
def test_a_map_in_a_store_is_read_by_ranges_and_resumes(trained, one_map, store_of_a_map, monkeypatch, capsys):
    memory, plain = store_of_a_map, StopRequest.check
    words = ["--checkpoint", str(trained), "--no-mirror", "--scale", "native"]
    words += ["--images", "memory://scans", "--out", "memory://made"]
    monkeypatch.setattr(StopRequest, "check", counted(3))
    with pytest.raises(Stop):
        predict.main(words)
    (journal,) = Path("cache").rglob("unfinished/*/a/journal.jsonl")
    assert '"tiles"' in journal.read_text()
    monkeypatch.setattr(StopRequest, "check", plain)
    Image.fromarray(scene(60, 70, empty=False)).save("photo.png")
    memory.pipe_file("/scans/photo.png", Path("photo.png").read_bytes())
    capsys.readouterr()
    assert run(predict.main, words) == 0
    assert "resumed    a.tif with" in capsys.readouterr().err
    assert not [*Path("cache").rglob("unfinished/*")]
    Path("a.tif").write_bytes(memory.cat_file("/made/masks/a.tif"))
    expected = Segmenter.load(trained).predict(one_map / "a.tif", mirror=False, scale="native")
    np.testing.assert_array_equal(images.read_label(Path("a.tif")), expected)
    assert georeference.georeference_of(Path("a.tif")).tags == PLACE
    assert memory.exists("/made/masks/photo.png")
    assert memory.exists("/made/masks/a.tif.aux.xml")
    assert run(predict.main, words) == 0
    assert "2 of 2 images are done" in capsys.readouterr().out
    memory.rm("/made", recursive=True)


def test_windows_of_a_map_and_its_labels_in_a_store(store_of_a_map, one_map, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 100)
    (one_map / "images").mkdir()
    (one_map / "labels").mkdir()
    (one_map / "a.tif").rename(one_map / "images/a.tif")
    label = (np.arange(112)[:, None] // 50 + np.zeros(180, int)).astype(np.uint8)
    write_map(one_map / "labels/a.tif", label, photometric="minisblack")
    store_of_a_map.rm("/scans/a.tif")
    for name in ("images/a.tif", "labels/a.tif"):
        store_of_a_map.pipe_file(f"/scans/{name}", (one_map / name).read_bytes())
    local, remote = (open_folder_splits(where)[0] for where in (one_map, "memory://scans"))
    with remote.opened(0) as (picture, truth):
        assert truth.shape == picture.pixels.shape[:2]
        np.testing.assert_array_equal(truth[40:90], label[40:90])
    local, remote = map(windows.with_windows, (local, remote))
    assert remote.names == local.names
    assert len(remote) == 4
    np.testing.assert_array_equal(remote.picture(3).pixels, local.picture(3).pixels)
    np.testing.assert_array_equal(remote.label(3), local.label(3))


def test_ranges_of_a_file():
    content, asked = bytes(range(256)) * 5, []

    def read(start, end):
        asked.append((start, end))
        return content[start:end]

    file = ranges.Ranges(read, len(content), 100)
    for place, count in ((0, 5), (50, 200), (1270, 100), (1280, 1), (3, 90), (-1, 0)):
        file.seek(max(0, place))
        got = b""
        while part := file.read(count - len(got)):
            got += part
        assert got == content[max(0, place) :][:count]
    assert asked == [(0, 100), (100, 200), (200, 300), (1200, 1280)]
    assert file.seek(-3, 2) == 1277
    assert file.read(100) == content[-3:]
    assert ranges.Ranges(lambda start, end: content, len(content), 100).readall() == content
    with pytest.raises(OSError, match="0 of 100 bytes came"):
        ranges.Ranges(lambda start, end: b"", 200, 100).read(1)


# learning and measuring


def test_a_map_at_the_scale_fit_is_read_in_part(tmp_path, reader, monkeypatch):
    folder, label = tmp_path / "large", (np.arange(150)[:, None] // 50 + np.zeros(210, int)).astype(np.uint8)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    write_map(folder / "images/a.tif", scene(), nodata=0)
    Image.fromarray(label).save(folder / "labels/a.png")
    whole = images.read_picture(folder / "images/a.tif")
    middle = np.s_[3::6, 3::6]  # 150 x 210 pixels of which 1,000 may be read
    for suffix in (".png", ".tif"):
        train, _ = open_folder_splits(folder)
        picture = train.picture(0)
        np.testing.assert_array_equal(picture.pixels, whole.pixels[middle])
        np.testing.assert_array_equal(picture.valid, whole.valid[middle])
        np.testing.assert_array_equal(train.label(0), label[middle])
        assert inspection.look(train, 0)[0] == (150, 210)
        with train.opened(0) as (all_of_it, truth):
            assert all_of_it.pixels.shape[:2] == truth.shape == (150, 210)
        if suffix == ".png":
            (folder / "labels/a.png").unlink()
            write_map(folder / "labels/a.tif", label, photometric="minisblack")


def test_a_map_that_is_seen_small_is_noted(tmp_path, reader):
    folder = tmp_path / "scans"
    folder.mkdir()
    write_map(folder / "a.tif", scene())
    write_map(folder / "small.tif", scene(20, 30, empty=False))
    note = "1 of 2 TIFFs and other maps that were looked at are large: seen whole, at the size of a square"
    for scale, expected in ((("fit",), True), (("native",), False)):
        train, _ = datasets_of(TrainConfig(data=str(folder), scale=scale))
        assert any(note in line for line in train.notes) == expected


def test_a_few_blocks_tell_the_mean_and_the_range_of_a_map(tmp_path, reader, monkeypatch):
    values = np.full((320, 64 * 9, 3), 40, np.uint8)
    values[:, 64:] = 80
    with raster.opened(write_map(tmp_path / "a.tif", values), PLAIN) as opened:
        full = opened.mean(2**20)
        monkeypatch.setattr(raster, "SAMPLED_BLOCKS", 20)
        some = opened.mean(2**20)
        assert len(opened.sample(2**20)[0]) < values.size / 2
    assert 75 < full[0] < 76
    assert 60 < some[0] < 80


def test_a_large_map_is_learnt_and_measured_in_windows(tmp_path, reader, trained, monkeypatch):
    monkeypatch.setattr(windows, "WINDOW", 100)
    folder, label = tmp_path / "large", (np.arange(150)[:, None] // 50 + np.zeros(210, int)).astype(np.uint8)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    write_map(folder / "images/a.tif", scene(), nodata=0)
    write_map(folder / "labels/a.tif", label, photometric="minisblack")
    (train, val) = open_folder_splits(folder)
    parts = windows.with_windows(train)
    assert parts.names == ("a#1-1.tif", "a#1-2.tif", "a#1-3.tif", "a#2-1.tif", "a#2-2.tif", "a#2-3.tif")
    assert parts.class_names == ("class 0", "class 1", "class 2")
    whole = images.read_picture(folder / "images/a.tif")
    for place, (rows, columns) in enumerate(product(((0, 75), (75, 150)), ((0, 70), (70, 140), (140, 210)))):
        inside = np.s_[slice(*rows), slice(*columns)]
        picture = parts.picture(place)
        np.testing.assert_array_equal(picture.pixels, whole.pixels[inside])
        if picture.valid is None:
            assert whole.valid[inside].all()
        else:
            np.testing.assert_array_equal(picture.valid, whole.valid[inside])
        np.testing.assert_array_equal(parts.label(place), label[inside])
    with val.opened(0) as (picture, truth):
        assert truth.shape == picture.pixels.shape[:2]
        np.testing.assert_array_equal(truth[40:90], label[40:90])
    segmenter = Segmenter.load(trained)
    counts = count_wholes(segmenter, val, refinements=["none"], mirror=False, progress=False).counts["none"]
    labels, expected = segmenter.predict(whole, mirror=False, refine="none"), np.zeros_like(counts)
    np.add.at(expected, (labels[labels < IGNORE], label[labels < IGNORE]), 1)
    np.testing.assert_array_equal(counts, expected)
