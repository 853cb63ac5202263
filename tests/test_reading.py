"""Pixel values are the user's measurement: what of them is shown, by which range, and where there are none."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image
from test_images import write_png16
from test_trainer import SMALL

from smooseg_fast import data, predict, train
from smooseg_fast.command import run
from smooseg_fast.config import TrainConfig
from smooseg_fast.datasets import ArrayDataset, open_dataset, survey, tiff
from smooseg_fast.datasets.images import ImageError, header_of, image_size, read_picture
from smooseg_fast.datasets.reading import PLAIN, Range, Reading
from smooseg_fast.datasets.survey import page_names, settle
from smooseg_fast.errors import UserError
from smooseg_fast.features.job import FeatureOptions, Job
from smooseg_fast.segment.checkpoint import read_checkpoint
from smooseg_fast.segment.segmenter import Segmenter

GDAL_NODATA = 42113
SHORT = [*SMALL, "--prototypes", "3", "--granularity", "0.1"]


def noise(seed=0, shape=(40, 50), high=4096, dtype=np.uint16):
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def textures(seed, high=4096):
    """uint16 [64,96] of 12 bits: three textures next to each other."""
    rng = np.random.default_rng(seed)
    third = np.arange(96) * 3 // 96
    base, spread = np.array([0.2, 0.5, 0.8])[third], np.array([0.02, 0.12, 0.04])[third]
    return np.clip((base + spread * rng.standard_normal((64, 96))) * high, 0, high - 1).astype(np.uint16)


def stretched(values, low, high):
    return np.rint(np.clip((values.astype(float) - low) * 255 / (high - low), 0, 255)).astype(np.uint8)


def survey_of(folder, reading=PLAIN):
    dataset, _ = settle(open_dataset(folder, "train"), None, reading)
    return dataset


# one range for a data set


def test_12_bits_get_one_range_for_all_images(tmp_path):
    dim, bright = noise(0, high=1024), noise(1, high=4096)
    Image.fromarray(dim).save(tmp_path / "dim.tif")
    Image.fromarray(bright).save(tmp_path / "bright.png")
    dataset = survey_of(tmp_path)
    (part,) = dataset.reading.ranges
    both = np.concatenate([dim.ravel(), bright.ravel()])
    low, high = np.percentile(both, 0.5, method="lower"), np.percentile(both, 99.5, method="higher")
    assert (part.group, part.limits) == ("uint16", ((low, high),))
    assert dataset.notes == (f"intensity {low:.0f} to {high:.0f} of uint16 -> 0 to 255, from 2 images",)
    np.testing.assert_array_equal(dataset.image(1)[..., 0], stretched(dim, low, high))
    np.testing.assert_array_equal(dataset.image(0)[..., 2], stretched(bright, low, high))
    assert dataset.image(1).max() < 80 < 240 < dataset.image(0).max()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_one_hot_pixel_does_not_matter(tmp_path, dtype):
    values = noise(dtype=dtype)
    Image.fromarray(values).save(tmp_path / "a.tif")
    plain = survey_of(tmp_path)
    values[3, 4] = 60_000
    Image.fromarray(values).save(tmp_path / "a.tif")
    hot = survey_of(tmp_path)
    assert abs(hot.reading.ranges[0].limits[0][1] - plain.reading.ranges[0].limits[0][1]) < 10
    assert np.abs(hot.image(0).astype(int) - plain.image(0))[:3].max() <= 1
    assert (hot.image(0)[3, 4] == 255).all()


def test_floats_and_integers_of_32_bits_are_exact(tmp_path):
    for name, values in (("f", noise(dtype=np.float32) / 4096), ("i", noise(1, dtype=np.int32) - 2000)):
        folder = tmp_path / name
        folder.mkdir()
        Image.fromarray(values).save(folder / "a.tif")
        dataset = survey_of(folder)
        ((low, high),) = dataset.reading.ranges[0].limits
        assert values.min() <= low < high <= values.max()
        np.testing.assert_array_equal(dataset.image(0)[..., 1], stretched(values, low, high))


def test_images_of_8_bits_in_a_mixed_folder_stay_as_they_are(tmp_path):
    eight = noise(2, (40, 50, 3), 200, np.uint8)
    Image.fromarray(eight).save(tmp_path / "a.png")
    Image.fromarray(noise()).save(tmp_path / "b.tif")
    for intensity in ("data", "image", (10.0, 50.0)):
        dataset = survey_of(tmp_path, Reading(intensity=intensity))
        np.testing.assert_array_equal(dataset.image(0), eight)
        assert dataset.picture(0).valid is None
    assert [part.group for part in survey_of(tmp_path).reading.ranges] == ["uint16"]


def test_a_folder_of_8_bits_is_not_measured(tmp_path, monkeypatch):
    Image.fromarray(noise(2, (40, 50, 3), 200, np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(survey, "read_samples", None)
    dataset = survey_of(tmp_path)
    assert dataset.reading == PLAIN
    assert dataset.notes == ()


def test_16_bit_colour_has_one_range_for_all_bands(tmp_path):
    pixels = noise(0, (40, 50, 3))
    pixels[..., 2] //= 8  # blue is weak, and shall stay so
    write_png16(tmp_path / "a.png", pixels)
    tifffile.imwrite(tmp_path / "b.tif", pixels, photometric="rgb")
    dataset = survey_of(tmp_path)
    assert [(part.group, len(part.limits)) for part in dataset.reading.ranges] == [("uint16", 1)]
    low, high = dataset.reading.ranges[0].limits[0]
    for index in range(2):
        np.testing.assert_array_equal(dataset.image(index), stretched(pixels, low, high))


def test_bands_that_are_no_colours_have_a_range_each(tmp_path):
    pixels = noise(0, (40, 50, 5))
    pixels[..., 2] //= 64
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack", planarconfig="contig")
    dataset = survey_of(tmp_path)
    (part,) = dataset.reading.ranges
    assert part.group == "uint16 bands"
    for band, (low, high) in enumerate(part.limits):
        np.testing.assert_array_equal(dataset.image(0)[..., band], stretched(pixels[..., band], low, high))
    assert dataset.notes[0] == "1 of 1 images have 5 bands: the first three are shown, --bands chooses others"
    assert dataset.notes[1].startswith("intensity ")
    assert dataset.notes[1].endswith(" of uint16 bands -> 0 to 255, from 1 image")


def test_intensity_as_given_and_of_each_image(tmp_path):
    for seed, high in enumerate((1024, 4096)):
        Image.fromarray(noise(seed, high=high)).save(tmp_path / f"{seed}.tif")
    given = survey_of(tmp_path, Reading(intensity=(100.0, 900.0)))
    np.testing.assert_array_equal(given.image(0)[..., 0], stretched(noise(0, high=1024), 100, 900))
    assert given.notes == ("intensity 100 to 900 of uint16 -> 0 to 255, as given",)
    each = survey_of(tmp_path, Reading(intensity="image"))
    assert all(each.image(index).min() == 0 and each.image(index).max() == 255 for index in range(2))
    assert each.notes == ("intensity of uint16: from the 0.5 % to the 99.5 % value of each image -> 0 to 255",)


def test_low_values_that_are_white(tmp_path):
    values = noise()
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    got = read_picture(tmp_path / "a.tif", Reading(intensity=(0.0, 4095.0)))
    np.testing.assert_array_equal(got.pixels[..., 0], 255 - stretched(values, 0, 4095))


def test_sparse_values_keep_their_range(tmp_path):
    """Percentiles of an image that is black but for a few spots are both black."""
    values = np.zeros((100, 100), np.uint16)
    values[50, 50:60] = 1000
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert survey_of(tmp_path).reading.ranges[0].limits == ((0.0, 1000.0),)


def test_the_sample_is_bounded(tmp_path, monkeypatch):
    for seed in range(7):
        Image.fromarray(noise(seed)).save(tmp_path / f"{seed}.tif")
    read, plain = [], survey.read_samples
    monkeypatch.setattr(survey, "read_samples", lambda file, *how: read.append(file.name) or plain(file, *how))
    monkeypatch.setattr(survey, "MEASURED_BYTES", 3 * 40 * 50 * 2)
    assert survey_of(tmp_path).notes[0].endswith("from 3 images")
    assert read == ["0.tif", "2.tif", "4.tif"]


# places without data


def test_nan_and_infinity_are_no_data(tmp_path):
    values = noise(dtype=np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    dataset = survey_of(tmp_path)
    pixels, valid = dataset.picture(0)
    assert (~valid).sum() == 3
    assert not valid[0, :3].any()
    assert (pixels[0, :3] == 255).all()
    assert dataset.reading.ranges[0].limits[0][1] < 4096


@pytest.mark.parametrize(("dtype", "nodata"), [(np.uint16, 65535), (np.float32, -3.4028234663852886e38), (np.uint8, 7)])
def test_the_no_data_tag(tmp_path, dtype, nodata):
    values = noise(high=4096 if dtype is not np.uint8 else 200, dtype=dtype)
    values[values == 7] = 8
    values[:10, :20] = nodata
    tags = [(GDAL_NODATA, "s", 0, repr(nodata), True)]
    tifffile.imwrite(tmp_path / "a.tif", values, extratags=tags)
    dataset = survey_of(tmp_path)
    pixels, valid = dataset.picture(0)
    np.testing.assert_array_equal(valid, values != nodata)
    assert (pixels[:10, :20] == 255).all()
    if dtype is np.uint8:
        np.testing.assert_array_equal(pixels[10:, :, 0], values[10:])
    else:
        assert 0 <= dataset.reading.ranges[0].limits[0][0] < dataset.reading.ranges[0].limits[0][1] < 4096


def test_one_band_may_hold_the_no_data_value(tmp_path):
    values = noise(high=4000, shape=(40, 50, 4)) + 1
    values[:10], values[20, 20, 0] = 0, 0
    tags = [(GDAL_NODATA, "s", 0, "0", True)]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples="unspecified", extratags=tags)
    dataset = survey_of(tmp_path)
    pixels, valid = dataset.picture(0)
    assert not valid[:10].any()
    assert valid[10:].all()
    assert pixels[20, 20, 0] == 0


def test_full_transparency_is_no_data(tmp_path):
    pixels = noise(0, (40, 50, 4), 256, np.uint8)
    pixels[..., 3] = 200
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown, valid = read_picture(tmp_path / "a.png")
    np.testing.assert_array_equal(valid, pixels[..., 3] > 0)
    assert (shown[:10] == 255).all()
    assert survey_of(tmp_path).notes == (
        "1 of 1 images may be transparent: laid on white, and no data where nothing of them shows",
    )
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown, valid = read_picture(tmp_path / "a.png")
    assert valid is None
    np.testing.assert_array_equal(shown, pixels[..., :3])


def test_an_image_without_any_data(tmp_path):
    Image.fromarray(np.full((8, 9), np.nan, np.float32)).save(tmp_path / "a.tif")
    pixels, valid = survey_of(tmp_path).picture(0)
    assert not valid.any()
    assert (pixels == 255).all()


# bands


@pytest.mark.parametrize("extra", ["unspecified", "unassalpha", "assocalpha"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_infrared_is_told_from_opacity(tmp_path, extra, dtype):
    pixels = noise(0, (40, 50, 4), 256, dtype)
    pixels[:10, :, 3] = 0
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=extra)
    got = read_picture(path, Reading(intensity=(0.0, 255.0)))
    if extra == "unspecified":
        np.testing.assert_array_equal(got.pixels, pixels[..., :3])
        assert got.valid is None
        assert (header_of(path).bands, header_of(path).opacity) == (4, False)
    else:
        np.testing.assert_array_equal(got.valid, pixels[..., 3] > 0)
        assert (got.pixels[:10] == 255).all()
        assert (header_of(path).bands, header_of(path).opacity) == (3, True)
    infrared = read_picture(path, Reading(intensity=(0.0, 255.0), bands=(4, 3, 2)))
    np.testing.assert_array_equal(infrared.pixels, pixels[..., [3, 2, 1]])  # asked for, it is data in either case
    assert infrared.valid is None


def test_a_tiff_without_a_word_on_its_fourth_band_has_no_opacity(tmp_path):
    pixels = noise(0, (40, 50, 4), 256, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    path = tmp_path / "a.tif"
    content = path.read_bytes()
    assert content.count(b"\x52\x01\x03\x00\x01\x00\x00\x00\x02\x00") == 1  # ExtraSamples: unassociated
    path.write_bytes(content.replace(b"\x52\x01\x03\x00\x01\x00", b"\x51\x01\x03\x00\x01\x00"))  # an unknown tag
    got = read_picture(path)
    np.testing.assert_array_equal(got.pixels, pixels[..., :3])
    assert got.valid is None


def test_bands_in_another_order_and_one_alone(tmp_path):
    pixels = noise(0, (40, 50, 3), 256, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", Reading(bands=(3, 2, 1))).pixels, pixels[..., ::-1])
    one = read_picture(tmp_path / "a.png", Reading(bands=(2,))).pixels
    np.testing.assert_array_equal(one, np.repeat(pixels[..., 1:2], 3, 2))
    with pytest.raises(ImageError, match=r"a\.png: has 3 bands, no band 4; give --bands that every image has"):
        read_picture(tmp_path / "a.png", Reading(bands=(4, 3, 2)))


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("tile", [None, (16, 32)])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_tifffile_reads_planes_tiles_and_big_files(tmp_path, compression, planes, tile, bigtiff):
    pixels = noise(0, (40, 50, 7))
    layout = {"planarconfig": planes, "photometric": "minisblack", "bigtiff": bigtiff, "byteorder": "<>"[bigtiff]}
    values = np.ascontiguousarray(np.moveaxis(pixels, -1, 0)) if planes == "separate" else pixels
    strips = {} if tile else {"rowsperstrip": 7}
    tifffile.imwrite(tmp_path / "a.tif", values, compression=compression, tile=tile, **layout, **strips)
    got = read_picture(tmp_path / "a.tif", Reading(intensity=(0.0, 4095.0), bands=(7, 1, 4)))
    np.testing.assert_array_equal(got.pixels, stretched(pixels[..., [6, 0, 3]], 0, 4095))
    assert image_size(tmp_path / "a.tif") == (40, 50)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.uint32])
def test_kinds_of_numbers_that_pillow_does_not_know(tmp_path, dtype):
    values = noise(high=100).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", values)
    got = read_picture(tmp_path / "a.tif", Reading(intensity=(0.0, 99.0)))
    np.testing.assert_array_equal(got.pixels[..., 0], stretched(values, 0, 99))
    assert header_of(tmp_path / "a.tif").kind == np.dtype(dtype).name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_16_bit_colour(tmp_path, orientation):
    pixels = noise(0, (6, 9, 3), 256)
    tifffile.imwrite(tmp_path / "deep.tif", pixels, photometric="rgb", extratags=[(274, "H", 1, orientation, True)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "eight.png", exif=exif)
    got = read_picture(tmp_path / "deep.tif", Reading(intensity=(0.0, 255.0)))
    np.testing.assert_array_equal(got.pixels, read_picture(tmp_path / "eight.png").pixels)
    assert image_size(tmp_path / "deep.tif") == got.pixels.shape[:2]


@pytest.mark.parametrize("part", [0.4, 0.9])
def test_a_file_cut_short_is_not_half_read(tmp_path, part):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise(0, (40, 50, 5)), photometric="minisblack", planarconfig="contig", rowsperstrip=4)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ImageError, match=r"a\.tif: "):
        read_picture(path)


def test_without_tifffile_a_file_that_needs_it_says_so(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", noise(0, (40, 50, 5)), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(tiff, "find_spec", lambda name: None)
    told = r"a\.tif: a TIFF of 5 bands of uint16, which Pillow does not read; pip install 'smooseg_fast\[tiff\]'"
    with pytest.raises(ImageError, match=told):
        read_picture(tmp_path / "a.tif")


def test_cmyk_is_said_to_be_converted(tmp_path):
    Image.new("CMYK", (40, 50)).save(tmp_path / "a.jpg")
    Image.new("CMYK", (40, 50)).save(tmp_path / "b.tif")
    Image.new("RGB", (40, 50)).save(tmp_path / "c.png")
    assert survey_of(tmp_path).notes == ("2 of 3 images are CMYK: converted to RGB without their colour profile",)


# pages


def stack(path, count=3, **options):
    pages = [noise(seed, high=4096) for seed in range(count)]
    tifffile.imwrite(path, np.stack(pages), photometric="minisblack", **options)
    return pages


def test_the_first_page_is_read_and_the_others_are_counted(tmp_path):
    pages = stack(tmp_path / "stack.tif")
    Image.fromarray(pages[0]).save(tmp_path / "plain.tif")
    dataset = survey_of(tmp_path, Reading(intensity=(0.0, 4095.0)))
    assert dataset.names == ("plain.tif", "stack.tif")
    assert dataset.notes[0] == ("1 of 2 images are stacks of 3 pages: page 1 is read, --pages all reads every one")
    np.testing.assert_array_equal(dataset.image(1)[..., 0], stretched(pages[0], 0, 4095))


def test_every_page_of_a_stack_is_an_image(tmp_path):
    pages = stack(tmp_path / "stack.tif")
    Image.fromarray(pages[1]).save(tmp_path / "plain.tif")
    dataset = survey_of(tmp_path, Reading(pages="all"))
    assert dataset.names == ("plain.tif", "stack#1.tif", "stack#2.tif", "stack#3.tif")
    assert dataset.notes[0] == "1 of 2 files are stacks: 4 images with all their pages"
    low, high = dataset.reading.ranges[0].limits[0]
    for index, page in enumerate([pages[1], *pages]):
        np.testing.assert_array_equal(dataset.image(index)[..., 0], stretched(page, low, high))
    assert dataset.notes[1].endswith("from 4 images")


def test_one_page_of_a_stack(tmp_path):
    pages = stack(tmp_path / "stack.tif")
    got = read_picture(tmp_path / "stack.tif", Reading(intensity=(0.0, 4095.0), pages=3))
    np.testing.assert_array_equal(got.pixels[..., 0], stretched(pages[2], 0, 4095))
    with pytest.raises(ImageError, match=r"stack\.tif: has no page 4; give --pages that every image has"):
        read_picture(tmp_path / "stack.tif", Reading(pages=4))


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_pages_of_moving_pictures(tmp_path, suffix):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert header_of(tmp_path / f"a.{suffix}").pages == 3
    for page, colour in enumerate(([255, 0, 0], [0, 255, 0], [0, 0, 255]), 1):
        assert read_picture(tmp_path / f"a.{suffix}", page=page).pixels[5, 5].tolist() == colour
    with pytest.raises(ImageError, match="has no page 4"):
        read_picture(tmp_path / f"a.{suffix}", page=4)


@pytest.mark.parametrize("declared", [True, False])
def test_levels_of_a_pyramid_are_no_pages(tmp_path, declared):
    base = noise(0, (64, 100, 3), 256, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for level in range(3):
            copy = {"subfiletype": 1} if declared and level else {}
            file.write(base[:: 2**level, :: 2**level], photometric="rgb", tile=(16, 16), **copy)
    assert header_of(tmp_path / "a.tif").pages == 1
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, base)
    assert survey_of(tmp_path, Reading(pages="all")).names == ("a.tif",)


def test_the_largest_level_is_read_where_it_comes_last(tmp_path):
    base = noise(0, (64, 100, 3), 256, np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(base[::4, ::4], photometric="rgb", subfiletype=1)
        file.write(base, photometric="rgb")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.tif").pixels, base)
    assert image_size(tmp_path / "a.tif") == (64, 100)


def test_names_of_pages_are_files_of_their_own():
    names = page_names(["a.tif", "b/a.tif", "a#1.tif"], [2, 10, 1])
    assert names[:3] == ["a##1.tif", "a##2.tif", "b/a#01.tif"]
    assert names[-2:] == ["b/a#10.tif", "a#1.tif"]
    assert len({name.rpartition(".")[0] for name in names}) == len(names) == 13


def test_the_label_of_a_stack_is_that_of_its_first_page(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    stack(tmp_path / "images" / "a.tif")
    Image.fromarray(noise(0, (40, 50), 3, np.uint8)).save(tmp_path / "labels" / "a.png")
    dataset = survey_of(tmp_path, Reading(pages="all"))
    assert [dataset.label(index) is not None for index in range(3)] == [True, False, False]
    assert "the label of a stack is that of its first page; the other pages have none" in dataset.notes


# settings, checkpoints, caches


def test_the_flags_are_held_against_their_legal_values():
    config = TrainConfig(intensity=(96, 3870), bands=[4, 3, 2], pages=2)
    config.check()
    assert Reading.of(config) == Reading((96.0, 3870.0), (4, 3, 2), 2)
    assert Reading.of(TrainConfig(intensity="image", bands=1, pages="all")) == Reading("image", (1,), "all")
    for name, value, told in (
        ("intensity", (5, 5), "--intensity: give data, image, or two numbers LOW HIGH, the lower one first; got 5 5"),
        ("intensity", ("nan", "3"), "--intensity: give data"),
        ("intensity", ("images",), "--intensity: give data"),
        ("intensity", ("1", "2", "3"), "--intensity: give data"),
        ("bands", (1, 2), "--bands: give three bands for red, green and blue, or one; got 1 2"),
        ("bands", (0,), "--bands: must be at least 1"),
        ("pages", "0", "--pages: give all, or the number of a page from 1; got 0"),
        ("pages", "two", "--pages: give all"),
        ("pages", True, "--pages: must be text"),
    ):
        with pytest.raises(UserError, match=told):
            TrainConfig(**{name: value}).check()


@pytest.mark.parametrize(
    "reading",
    [
        PLAIN,
        Reading((0.5, 3.0), (4, 3, 2), "all"),
        Reading("image", pages=3),
        Reading(ranges=(Range("uint16", ((96.0, 3870.0),)), Range("float32 bands", ((0.0, 0.1),) * 3))),
    ],
)
def test_a_reading_survives_json(reading):
    assert Reading.from_json(json.loads(json.dumps(reading.as_json()))) == reading


def test_the_range_is_part_of_the_key_of_features(tmp_path):
    from test_store import FakeBackbone

    Image.fromarray(noise()).save(tmp_path / "a.tif")
    keys = set()
    for reading in (PLAIN, Reading((0.0, 4095.0)), Reading((0.0, 4096.0)), Reading("image"), Reading(bands=(1,))):
        keys.add(Job(survey_of(tmp_path, reading), FakeBackbone(), FeatureOptions(size=32)).key())
    assert len(keys) == 5


def test_images_of_owners_are_read_as_published(tmp_path):
    from owners import make_potsdam_tiles

    root = make_potsdam_tiles(tmp_path)
    train_set = open_dataset(root, "train")
    assert settle(train_set, None, PLAIN)[0] is train_set
    with pytest.raises(UserError, match="--bands: Potsdam-3 train is read as its owners publish it; leave --bands out"):
        settle(train_set, None, Reading(bands=(4, 3, 2)))
    arrays = ArrayDataset([np.zeros((8, 8, 3), np.uint8)])
    assert settle(arrays, arrays, Reading(bands=(4, 3, 2))) == (arrays, arrays)
    assert arrays.picture(0).valid is None


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A folder of 12-bit TIFF images, a 3-page stack, and a run on them."""
    home = tmp_path_factory.mktemp("deep")
    photos = home / "photos"
    photos.mkdir()
    for seed in range(4):
        Image.fromarray(textures(seed)).save(photos / f"p{seed}.tif")
    tifffile.imwrite(photos / "stack.tif", np.stack([textures(seed) for seed in (4, 5, 6)]), photometric="minisblack")
    args = ["--data", str(photos), "--out", str(home / "run"), "--pages", "all", *SHORT]
    assert run(train.main, args) == 0
    return home


def test_training_keeps_the_range_and_prediction_takes_it(deep, tmp_path, capsys):
    checkpoint = deep / "run" / "checkpoint.safetensors"
    reading = read_checkpoint(checkpoint).reading
    ((low, high),) = reading.range_of("uint16").limits
    assert low < high < 4096
    assert reading.pages == "all"
    brighter = tmp_path / "brighter"
    brighter.mkdir()
    Image.fromarray(textures(1) // 2).save(brighter / "half.tif")
    words = ["--checkpoint", str(checkpoint), "--images", str(brighter), "--out", str(tmp_path / "out")]
    assert run(predict.main, words) == 0
    assert (
        f"data       intensity {low:.0f} to {high:.0f} of uint16 -> 0 to 255, as in training" in capsys.readouterr().err
    )
    segmenter = Segmenter.load(checkpoint)
    got = segmenter.picture(brighter / "half.tif").pixels
    np.testing.assert_array_equal(got[..., 0], stretched(textures(1) // 2, low, high))
    np.testing.assert_array_equal(segmenter.picture(Image.open(brighter / "half.tif")).pixels, got)
    mask = np.asarray(Image.open(tmp_path / "out" / "masks" / "half.png"))
    np.testing.assert_array_equal(mask, segmenter.predict(brighter / "half.tif"))
    # the same folder with other settings is another prediction
    assert run(predict.main, [*words, "--intensity", "0", "4095"]) == 2
    assert "reading" in capsys.readouterr().err


def test_prediction_writes_a_mask_for_every_page(deep, tmp_path):
    checkpoint = deep / "run" / "checkpoint.safetensors"
    words = ["--checkpoint", str(checkpoint), "--images", str(deep / "photos"), "--out", str(tmp_path / "out")]
    assert run(predict.main, words) == 0
    names = {path.name for path in (tmp_path / "out" / "masks").iterdir()}
    assert names == {"p0.png", "p1.png", "p2.png", "p3.png", "stack#1.png", "stack#2.png", "stack#3.png"}
    segmenter = Segmenter.load(checkpoint)
    for page in (1, 2, 3):
        mask = np.asarray(Image.open(tmp_path / "out" / "masks" / f"stack#{page}.png"))
        np.testing.assert_array_equal(mask, segmenter.predict(segmenter.picture(deep / "photos" / "stack.tif", page)))
    shares = json.loads((tmp_path / "out" / "shares.json").read_text())
    assert "stack#2.tif" in shares["images"]
    one = tmp_path / "one"
    assert run(predict.main, [*words[:-1], str(one), "--pages", "2"]) == 0
    np.testing.assert_array_equal(
        np.asarray(Image.open(one / "masks" / "stack.png")),
        np.asarray(Image.open(tmp_path / "out" / "masks" / "stack#2.png")),
    )


def test_images_of_another_kind_are_measured_when_they_are_predicted(deep, tmp_path, capsys):
    new = tmp_path / "floats"
    new.mkdir()
    Image.fromarray(textures(1).astype(np.float32) / 4096).save(new / "a.tif")
    checkpoint = deep / "run" / "checkpoint.safetensors"
    assert run(predict.main, ["--checkpoint", str(checkpoint), "--images", str(new), "--out", str(tmp_path / "o")]) == 0
    assert " of float32 -> 0 to 255, from 1 image" in capsys.readouterr().err


def test_data_check_tells_what_is_not_shown(deep, capsys):
    assert run(data.main, ["check", str(deep / "photos")]) == 0
    out = capsys.readouterr().out
    assert "note       1 of 5 images are stacks of 3 pages: page 1 is read, --pages all reads every one\n" in out
    assert "of uint16 -> 0 to 255, from 5 images" in out


def test_data_check_reads_the_files_as_its_flags_say_and_hands_them_on(tmp_path, capsys):
    tags = [(GDAL_NODATA, "s", 0, "0", True)]
    for seed in range(2):
        bands = np.stack([textures(seed + band) for band in range(4)], axis=2)
        tifffile.imwrite(tmp_path / f"{seed}.tif", bands, photometric="rgb", extrasamples=[0], extratags=tags)
    assert run(data.main, ["check", str(tmp_path), "--bands", "4", "3", "2"]) == 0
    out = capsys.readouterr().out
    assert "note       2 of 2 images mark pixels without data by 0: not learnt from, and 255 in masks\n" in out
    assert "of uint16 bands -> 0 to 255" in out
    assert out.endswith(f"train --data {tmp_path} --bands 4 3 2\n")


def test_a_kind_that_the_survey_missed_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survey, "HEADERS", 1)
    monkeypatch.setattr("smooseg_fast.datasets.reading._told", set())
    Image.fromarray(noise(0, dtype=np.uint8, high=255)).save(tmp_path / "a.png")
    for name in "bc":
        Image.fromarray(noise(1)).save(tmp_path / f"{name}.png")
    dataset = survey_of(tmp_path)
    assert [dataset.image(index).max() for index in range(3)] == [dataset.image(0).max(), 255, 255]
    said = capsys.readouterr().err
    assert said.count("intensity of uint16: from each image itself") == 1
