import os
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from listing import find_images
from PIL import Image, ImageFile

from smooseg_fast.datasets import images
from smooseg_fast.datasets.formats import photo_suffixes
from smooseg_fast.datasets.images import (
    ImageError,
    cut_squares,
    five_windows,
    image_size,
    read_image,
    read_label,
    read_picture,
    resize_short_side,
    square_offsets,
)
from smooseg_fast.datasets.reading import Reading
from smooseg_fast.errors import UserError
from smooseg_fast.system.budget import Budget
from smooseg_fast.system.outfolder import mark_as_ours

LOSSLESS = {"tif": {}, "tiff": {"compression": "tiff_lzw"}, "png": {}, "bmp": {}, "webp": {"lossless": True}}
LOSSY = {"jpg": {"quality": 100, "subsampling": 0}, "jpeg": {"quality": 100, "subsampling": 0}}


@pytest.fixture
def colours() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def smooth(height: int = 12, width: int = 20) -> np.ndarray:
    """Colours that JPEG keeps to a few grey levels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([10 * y, 10 * x, 255 - 5 * (x + y)], axis=-1).astype(np.uint8)


def write_png16(path: Path, pixels: np.ndarray) -> None:
    """[H,W,3] uint16 as a PNG, which Pillow reads but does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )


# finding


def test_finds_every_suffix_in_any_nesting_in_the_order_of_relative_paths(tmp_path):
    wanted = [f"{i}/deep/{i}{suffix}" for i, suffix in enumerate(photo_suffixes())] + ["Z.JPG", "a-b/x.png", "a/x.png"]
    for name in [
        *wanted,
        ".hidden.png",
        ".git/x.png",
        "a/.thumbs/x.png",
        "a/._x.png",
        "notes.txt",
        "png",
        "x.gif",
        "x.npy",
    ]:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    assert [file.relative_to(tmp_path).as_posix() for file in find_images(tmp_path)] == sorted(wanted)


def test_finds_in_a_folder_that_is_itself_below_a_hidden_one(tmp_path):
    file = tmp_path / ".cache" / "photos" / "x.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert find_images(file.parent) == [file]


def test_follows_links_to_folders_but_not_in_circles(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.png").write_bytes(b"")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "back").symlink_to(tmp_path / "data")
    assert find_images(tmp_path / "data") == [tmp_path / "data" / "link" / "x.png"]


def test_output_of_smooseg_is_ignored_and_photos_next_to_it_are_not(tmp_path):
    photos = [tmp_path / name for name in ("a.png", "masks/b.png", "out/c.png", "out/deep/masks/d.png")]
    ours = [tmp_path / name for name in ("out/masks/x.png", "out/sheet.jpg")]
    for file in (*photos, *ours):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    mark_as_ours(tmp_path / "out", "masks", "sheet.jpg")
    assert find_images(tmp_path) == photos
    assert find_images(tmp_path / "out") == photos[2:]
    assert find_images(tmp_path / "out" / "masks") == ours[:1]  # a folder that the user names is read whoever wrote it


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "metrics.jsonl", "predict.json", ".smooseg", ".smooseg/x"])
def test_only_a_marker_of_ours_hides_photos(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"masks\nsheet.jpg\n\xff")
    for photo in ("groups.png", "masks/x.png", "sheet.jpg"):
        (tmp_path / photo).parent.mkdir(exist_ok=True)
        (tmp_path / photo).write_bytes(b"")
    assert len(find_images(tmp_path)) == 3


def test_a_single_file_is_found_as_it_is(tmp_path):
    (tmp_path / "x.TIFF").write_bytes(b"")
    assert find_images(tmp_path / "x.TIFF") == [tmp_path / "x.TIFF"]


def test_names_the_argument_and_what_was_found(tmp_path):
    with pytest.raises(UserError, match=r"--images .*nowhere: no such file or folder; .*\.jpg"):
        find_images(tmp_path / "nowhere", "--images")
    with pytest.raises(UserError, match=r"--data .*: no images in it; .*\.jpg .*\.bmp.* found no files"):
        find_images(tmp_path)
    for name in ("a.txt", "b.txt", "c.npy", "d"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"found only other files \(2 \.txt, 1 \.npy, 1 without suffix\)"):
        find_images(tmp_path)
    with pytest.raises(UserError, match=r"a\.txt: no images in it; .*\.jpg .* found only other files \(1 \.txt\)"):
        find_images(tmp_path / "a.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(UserError, match=r"closed: cannot be read"):
        find_images(tmp_path)


# decoding: kinds of pixels


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_colours_are_exact(tmp_path, colours, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(colours).save(path, **LOSSLESS[suffix])
    got = read_image(path)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, colours)
    got[:] = 0  # the caller owns the pixels


@pytest.mark.parametrize("suffix", LOSSY)
def test_jpeg_colours_are_close(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(smooth()).save(path, **LOSSY[suffix])
    got = read_image(path)
    assert got.shape == (12, 20, 3)
    assert np.abs(got.astype(int) - smooth()).max() <= 4


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "jpg", "webp"])
def test_grey_becomes_three_equal_channels(tmp_path, suffix):
    grey = smooth()[..., 0]
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}", **{**LOSSLESS, "jpg": {"quality": 100}}[suffix])
    got = read_image(tmp_path / f"x.{suffix}")
    assert (got == got[..., :1]).all()
    assert np.abs(got[..., 0].astype(int) - grey).max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_one_bit_is_black_and_white(tmp_path, colours, suffix):
    bits = colours[..., 0] > 127
    Image.fromarray(bits).save(tmp_path / f"x.{suffix}")
    assert Image.open(tmp_path / f"x.{suffix}").mode == "1"
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), np.where(bits[..., None], [255, 255, 255], 0))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_transparency_is_laid_on_white(tmp_path, colours, suffix):
    alpha = np.full(colours.shape[:2], 255, np.uint8)
    alpha[:, :5], alpha[:, 5:10] = 0, 128
    Image.fromarray(np.dstack([colours, alpha])).save(tmp_path / f"x.{suffix}", **LOSSLESS[suffix])
    got = read_image(tmp_path / f"x.{suffix}").astype(float)
    assert (got[:, :5] == 255).all()
    np.testing.assert_allclose(got[:, 5:10], (colours[:, 5:10] * 128.0 + 255 * 127) / 255, atol=1)
    np.testing.assert_array_equal(got[:, 10:], colours[:, 10:])


def test_grey_with_transparency_is_laid_on_white(tmp_path, colours):
    alpha = np.where(np.arange(20) < 10, 0, 255) * np.ones((12, 1))
    Image.fromarray(np.dstack([colours[..., 0], alpha.astype(np.uint8)])).save(tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").mode == "LA"
    got = read_image(tmp_path / "x.png")
    assert (got[:, :10] == 255).all()
    np.testing.assert_array_equal(got[:, 10:], np.repeat(colours[:, 10:, :1], 3, axis=2))


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_palette_colours(tmp_path, suffix):
    indices = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = np.random.default_rng(1).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / f"x.{suffix}")
    assert Image.open(tmp_path / f"x.{suffix}").mode == "P"
    np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), palette[indices])


@pytest.mark.parametrize(
    "transparency", [2, bytes([255, 255, 0, 255, 255, 255])], ids=["one index", "alpha of each index"]
)
def test_palette_with_transparency(tmp_path, transparency):
    indices = np.arange(6, dtype=np.uint8).reshape(2, 3)
    palette = np.random.default_rng(1).integers(0, 250, (256, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / "x.png", transparency=transparency)
    want = palette[indices]
    want[indices == 2] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), want)


def test_a_transparent_colour_of_an_rgb_image(tmp_path, colours):
    colours[3, 4] = (7, 8, 9)
    Image.fromarray(colours).save(tmp_path / "x.png", transparency=(7, 8, 9))
    want = colours.copy()
    want[3, 4] = 255
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), want)


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path, suffix):
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[:8, :, 0], ink[8:, :, 3] = 255, 255  # cyan above, black below
    Image.fromarray(ink, "CMYK").save(tmp_path / f"x.{suffix}")
    assert Image.open(tmp_path / f"x.{suffix}").mode == "CMYK"
    got = read_image(tmp_path / f"x.{suffix}").astype(int)
    assert np.abs(got[:8] - [0, 255, 255]).max() <= 3
    assert np.abs(got[8:]).max() <= 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_divided_by_257_and_rounded(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257, 385, 386], [1000, 32767, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"x.{suffix}")
    got = read_image(tmp_path / f"x.{suffix}")
    want = np.rint(deep / 257).astype(np.uint8)
    assert want[0, 1] == 0
    assert want[0, 2] == 1
    assert want[1, 3:].tolist() == [254, 255, 255]
    np.testing.assert_array_equal(got, np.repeat(want[..., None], 3, axis=2))


def test_16_bit_grey_in_the_other_byte_order(tmp_path):
    deep = np.array([[0, 257, 65535]], dtype=">u2")
    Image.frombytes("I;16B", (3, 1), deep.tobytes()).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif")[0, :, 0].tolist() == [0, 1, 255]


def test_16_bit_colour_png_keeps_both_bytes(tmp_path, colours):
    deep = colours.astype(np.uint16) + 1000  # in one high byte or two
    write_png16(tmp_path / "x.png", deep)
    got = read_picture(tmp_path / "x.png", Reading(intensity=(1000, 1255)))
    np.testing.assert_array_equal(got.pixels, colours)
    assert got.valid is None


def test_float_and_32_bit_grey_are_stretched_from_their_own_range(tmp_path):
    values = np.array([[-1.5, 0.0, 3.5]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "f.tif")
    assert read_image(tmp_path / "f.tif")[0, :, 0].tolist() == [0, round(255 * 0.3), 255]
    Image.fromarray(np.array([[2_000_000_000, 2_000_000_001, 2_000_000_005]], dtype=np.int32)).save(tmp_path / "i.tif")
    assert read_image(tmp_path / "i.tif")[0, :, 1].tolist() == [0, 51, 255]
    Image.fromarray(np.array([[np.nan, 1, 2, np.inf, -np.inf]], dtype=np.float32)).save(tmp_path / "n.tif")
    pixels, valid = read_picture(tmp_path / "n.tif")
    assert pixels[0, :, 2].tolist() == [255, 0, 255, 255, 255]  # white where nothing was measured
    assert valid[0].tolist() == [False, True, True, False, False]
    Image.fromarray(np.array([[-3e38, 0, 3e38]], dtype=np.float32)).save(tmp_path / "h.tif")
    assert read_image(tmp_path / "h.tif")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [0.0, 7.25])
def test_constant_float_images_are_black(tmp_path, value):
    Image.fromarray(np.full((3, 4), value, np.float32)).save(tmp_path / "x.tif")
    got = read_image(tmp_path / "x.tif")
    assert got.shape == (3, 4, 3)
    assert not got.any()


# decoding: orientation

UNTURN = {  # from the picture as seen to the pixels as stored, by the EXIF definition of each orientation
    1: lambda seen: seen,
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.swapaxes(0, 1),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen, 2).swapaxes(0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", UNTURN)
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    seen, exif, path = smooth(), Image.Exif(), tmp_path / f"x.{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(UNTURN[orientation](seen))).save(
        path, exif=exif, **{**LOSSLESS, **LOSSY}[suffix]
    )
    got = read_image(path)
    assert got.shape == seen.shape
    assert np.abs(got.astype(int) - seen).max() <= (4 if suffix == "jpg" else 0)
    assert image_size(path) == seen.shape[:2]


def test_orientation_of_16_bit_grey(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[0, 1, 255]], dtype=np.uint16)).save(tmp_path / "x.png", exif=exif)
    assert read_image(tmp_path / "x.png")[..., 0].tolist() == [[0], [1], [255]]


def test_a_damaged_exif_block_does_not_lose_the_picture(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "x.png", exif=b"Exif\0\0XX*\0nonsense")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), smooth())
    assert image_size(tmp_path / "x.png") == (12, 20)


# decoding: damage


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "tiff", "bmp"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_file_cut_short_is_named(tmp_path, suffix, part):
    path = tmp_path / f"x.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **{**LOSSLESS, **LOSSY}[suffix])
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ImageError, match="copy it again") as caught:
        read_image(path)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: {caught.value.reason}; ")
    assert "\n" not in str(caught.value)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, world", b"\x89PNG\r\n\x1a\n", b"II*\0" + b"\xff" * 64, b"BM" + b"\0" * 80],
    ids=["empty", "text", "png signature", "tiff header", "bmp header"],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_no_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for read in (read_image, read_label, image_size):
        with pytest.raises(ImageError, match=r"x\.png: "):
            read(tmp_path / "x.png")


def test_a_missing_file_is_an_image_error(tmp_path):
    with pytest.raises(ImageError, match=r"x\.png: no such file; check the path"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ImageError, match="is a folder; give an image in it"):
        read_image(tmp_path)


# decoding: big scans. Pillow's limit is made small instead of the images big.


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff", "bmp", "webp"])
def test_big_scans_open_in_silence_and_the_global_limit_comes_back(tmp_path, monkeypatch, colours, suffix):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(colours).save(tmp_path / f"x.{suffix}", **LOSSLESS[suffix])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / f"x.{suffix}"), colours)
    assert Image.MAX_IMAGE_PIXELS == 10


def test_the_limit_is_lifted_for_as_long_as_any_thread_reads(tmp_path, monkeypatch, colours):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.fromarray(colours).save(tmp_path / "x.tif")
    together = threading.Barrier(4)

    def read(_: int) -> bool:
        together.wait()
        return all((read_image(tmp_path / "x.tif") == colours).all() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))
    assert Image.MAX_IMAGE_PIXELS == 10


def test_a_header_beyond_reason_is_refused_before_decoding(tmp_path, monkeypatch, colours):
    monkeypatch.setattr(images, "MAX_PIXELS", 239)
    Image.fromarray(colours).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x\.png: 20 x 12 pixels, more than 239 in all; cut it into tiles"):
        read_image(tmp_path / "x.png")


def test_memory_that_runs_out_is_an_image_error(tmp_path, monkeypatch, colours):
    def exhausted(*_):
        raise MemoryError

    Image.fromarray(colours).save(tmp_path / "x.png")
    monkeypatch.setattr(Image.Image, "crop", exhausted)
    with pytest.raises(ImageError, match=r"x\.png: cannot be decoded \(MemoryError\)"):
        read_image(tmp_path / "x.png")


# labels


def test_labels_keep_their_numbers(tmp_path):
    numbers = np.array([[0, 1, 2], [7, 254, 255]], dtype=np.uint8)
    Image.fromarray(numbers).save(tmp_path / "grey.png")
    palette = Image.fromarray(numbers)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    palette.save(tmp_path / "palette.png", transparency=0)
    Image.fromarray(numbers > 1).save(tmp_path / "bits.png")
    for name, want in (("grey", numbers), ("palette", numbers), ("bits", numbers > 1)):
        got = read_label(tmp_path / f"{name}.png")
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16"])
def test_labels_of_other_kinds_are_refused(tmp_path, mode):
    Image.new(mode, (3, 2)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match=rf"x\.png: a label of mode {mode}, .*8-bit grey or palette PNG"):
        read_label(tmp_path / "x.png")


# resizing and cutting


def test_resize_keeps_the_aspect_and_rounds_the_long_side_down(colours):
    assert resize_short_side(np.zeros((360, 480, 3), np.uint8), 224).shape == (224, 298, 3)
    assert resize_short_side(np.zeros((480, 360), np.uint8), 224).shape == (298, 224)
    assert resize_short_side(colours, 12) is colours


def test_nearest_repeats_pixels_and_bilinear_blends(colours):
    np.testing.assert_array_equal(resize_short_side(colours, 24), colours.repeat(2, axis=0).repeat(2, axis=1))
    step = np.zeros((8, 8, 3), np.uint8)
    step[:, 4:] = 200
    assert set(np.unique(resize_short_side(step, 6, "nearest"))) == {0, 200}
    assert set(np.unique(resize_short_side(step, 3, "bilinear"))) - {0, 200}


def test_labels_are_never_blended():
    label = np.zeros((8, 8), np.uint8)
    label[:, 4:] = 200
    assert set(np.unique(resize_short_side(label, 3, "bilinear"))) == {0, 200}


@pytest.mark.parametrize(
    ("size", "crops", "want"),
    [
        ((360, 480), "center", [(0, 60)]),
        ((480, 361), "center", [(59, 0)]),
        ((7, 7), "center", [(0, 0)]),
        ((360, 480), "slide", [(0, 0), (0, 60), (0, 120)]),
        ((480, 360), "slide", [(0, 0), (60, 0), (120, 0)]),
        ((100, 125), "slide", [(0, 0), (0, 25)]),
        ((100, 126), "slide", [(0, 0), (0, 13), (0, 26)]),
        ((64, 64), "slide", [(0, 0)]),
        ((1, 3), "slide", [(0, 0), (0, 1), (0, 2)]),
    ],
)
def test_offsets(size, crops, want):
    assert square_offsets(*size, crops) == want


def test_slide_covers_from_end_to_end_in_even_steps():
    rng = np.random.default_rng(0)
    for height, width in rng.integers(4, 400, (200, 2)).tolist():
        side, places = min(height, width), [top + left for top, left in square_offsets(height, width, "slide")]
        steps = np.diff(places)
        assert places[0] == 0
        assert places[-1] == max(height, width) - side
        if steps.size:
            assert 1 <= steps.min() <= steps.max() <= side / 4
            assert steps.max() - steps.min() <= 1


@pytest.mark.parametrize("crops", ["center", "slide"])
@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
def test_squares_are_cut_from_the_resized_image(colours, crops, resample):
    resized = resize_short_side(colours, 8, resample)
    found = cut_squares(colours, 8, crops, resample)
    assert [place for place, _ in found] == square_offsets(8, 13, crops)
    for (top, left), square in found:
        np.testing.assert_array_equal(square, resized[top : top + 8, left : left + 8])
        assert square.base is None  # a view would keep the whole image


def test_five_windows_are_the_corners_and_the_centre_of_half_the_size():
    assert five_windows(13, 21) == [(0, 0, 6, 10), (0, 11, 6, 10), (7, 0, 6, 10), (7, 11, 6, 10), (3, 5, 6, 10)]
    assert five_windows(1, 3) == [(0, 0, 1, 1), (0, 2, 1, 1), (0, 0, 1, 1), (0, 2, 1, 1), (0, 1, 1, 1)]


@pytest.mark.parametrize("resample", ["nearest", "bilinear"])
@pytest.mark.parametrize(("height", "width"), [(64, 128), (77, 50), (9, 9)])
def test_five_crops_are_resized_each_by_itself_and_cut_in_their_middle(height, width, resample):
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    h, w, y, x = height // 2, width // 2, height - height // 2, width - width // 2
    windows = [image[:h, :w], image[:h, x:], image[y:, :w], image[y:, x:], image[y // 2 :, x // 2 :][:h, :w]]
    found = cut_squares(image, 8, "five", resample)
    assert len(found) == 5
    for (_, square), window in zip(found, windows):
        [(_, wanted)] = cut_squares(window, 8, "center", resample)
        np.testing.assert_array_equal(square, wanted)


def test_places_of_five_crops_are_in_the_image_at_their_scale():
    """A street scene: windows of 512 x 1024 at 224 x 448, so the whole image is 448 x 896."""
    places = [place for place, _ in cut_squares(np.zeros((1024, 2048, 3), np.uint8), 224, "five")]
    assert places == [(0, 112), (0, 560), (224, 112), (224, 560), (112, 336)]


@pytest.mark.parametrize("crops", ["center", "slide", "five"])
def test_images_and_labels_are_cut_at_the_same_places(crops):
    label = np.arange(12 * 20, dtype=np.uint8).reshape(12, 20)
    image = np.repeat(label[..., None], 3, axis=2)
    for size in (5, 8, 12, 17):
        for (place, square), (other, mask) in zip(cut_squares(image, size, crops), cut_squares(label, size, crops)):
            assert place == other
            assert mask.shape == (size, size)
            np.testing.assert_array_equal(square[..., 0], mask)


@pytest.mark.parametrize(("limit", "at_once"), [(1, 1), (4 * 64 * images.DECODED_BYTES, 4)])
def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch, limit, at_once):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    inside, meeting, plain = [], threading.Barrier(4), images.samples_of

    def decode(*image):
        inside.append(1)
        if at_once == 4:
            meeting.wait(timeout=30)  # all are inside together
        assert len(inside) <= at_once
        samples = plain(*image)
        inside.pop()
        return samples

    monkeypatch.setattr(images, "_decoding", Budget(limit))
    monkeypatch.setattr(images, "samples_of", decode)
    with ThreadPoolExecutor(4) as pool:
        assert [read.shape for read in pool.map(images.read_image, [tmp_path / "a.png"] * 4)] == [(8, 8, 3)] * 4
