"""Values of pixels, not only shapes: palettes apart, masks that read back, blends by hand, cells where they belong."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from smooseg_fast.errors import UserError
from smooseg_fast.show import lettering, pictures
from smooseg_fast.show.pictures import contact_sheet, overlay, palette, save, write_mask
from smooseg_fast.show.sheet import groups_sheet, thumbnails

# linear RGB as seen without the long- and without the medium-wave cones (Machado et al. 2009, severity 1)
PROTAN = np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]])
DEUTAN = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]])
NASTY_NAMES = [
    "a/very/long/path/" + "x" * 300 + "/end.jpg",
    "Straße – été №7",
    "日本語/東京.png",
    "line\nbreak\udcff\t",
    "",
    "$a_b$ {0} %s",
]


def rgb(hex_colour):
    return tuple(int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))


def to_oklab(linear):
    """Linear RGB [..., 3] to OKLab (Ottosson 2020)."""
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    cones += [[0.0883024619, 0.2817188376, 0.6299787005]]
    axes = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    axes += [[0.0259040371, 0.7827717662, -0.8086757660]]
    return np.cbrt(linear @ np.array(cones).T) @ np.array(axes).T


def closest(colours, seen=None):
    """The smallest OKLab distance between two of `colours`, as they are or as `seen`."""
    linear = (lambda e: np.where(e <= 0.04045, e / 12.92, ((e + 0.055) / 1.055) ** 2.4))(colours / 255)
    lab = to_oklab((linear if seen is None else linear @ seen.T).clip(0, 1))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distance[np.triu_indices(len(colours), 1)].min()


def test_palette_is_distinct_and_does_not_move():
    np.testing.assert_allclose(to_oklab(np.eye(3)[0]), [0.62796, 0.22486, 0.12585], atol=1e-4)  # published values
    np.testing.assert_allclose(to_oklab(np.ones(3)), [1, 0, 0], atol=1e-4)
    colours = palette(256)
    assert colours.shape == (256, 3)
    assert colours.dtype == np.uint8
    for k in (1, 7, 20, 21, 64, 100):
        assert (palette(k) == colours[:k]).all()
    assert closest(colours[:20]) > 0.11
    assert closest(colours[:64]) > 0.05
    assert len(np.unique(colours, axis=0)) == 256


@pytest.mark.parametrize("seen", [PROTAN, DEUTAN], ids=["protanopia", "deuteranopia"])
def test_hand_picked_colours_stay_apart_for_colour_blind_eyes(seen):
    assert closest(palette(8), seen) > 0.07
    assert closest(palette(20), seen) > 0.055


@pytest.mark.parametrize("k", [1, 2, 5, 64, 256])
def test_mask_round_trip(tmp_path, k):
    labels = np.random.default_rng(0).integers(0, k, (7, 13)).astype(np.uint8)
    labels[0, 0] = 255  # no label
    path = write_mask(tmp_path / "deep" / "mask.png", labels, palette(k))
    depth, colour_type = struct.unpack(">BB", path.read_bytes()[24:26])
    assert (depth, colour_type) == (8, 3)  # eight bits and a palette, however few the labels
    with Image.open(path) as mask:
        assert mask.mode == "P"
        assert (np.asarray(mask) == labels).all()
        shown = np.asarray(mask.convert("RGB"))
    known = labels < min(k, 255)
    assert (shown[known] == palette(k)[labels[known]]).all()
    assert (shown[labels == 255] == 255).all()


def test_mask_at_the_edges(tmp_path):
    for shape in ((1, 1), (8, 3000)):
        labels = np.full(shape, 3, np.uint8)
        with Image.open(write_mask(tmp_path / "mask.png", labels, palette(4))) as mask:
            assert (np.asarray(mask) == labels).all()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"folder\.png: cannot be written"):
        write_mask(tmp_path / "folder.png", np.zeros((2, 2), np.uint8), palette(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.png", "mask.png"]


def halves(height, width):
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    return labels


@pytest.mark.parametrize("size", [(40, 60), (1300, 90)], ids=str)
def test_overlay_blends_inside_and_lightens_the_border(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    labels, colours = halves(*size), palette(2)
    got = overlay(image, labels, colours)
    assert got.dtype == np.uint8
    line = (np.abs(got.astype(int) - (colours[labels].astype(int) + 255) // 2) <= 1).all(-1)
    middle = size[1] // 2
    assert line[:, middle].all()  # one pixel wide at this size
    inside = np.ones(size, bool)
    inside[:, middle] = False
    assert np.abs(got - (colours[labels].astype(float) + image) / 2)[inside].max() <= 1


@pytest.mark.parametrize(("height", "width", "line"), [(8, 3000, 1), (300, 300, 1), (700, 800, 2), (1400, 1500, 4)])
def test_border_grows_with_the_image(height, width, line):
    image = np.zeros((height, width, 3), np.uint8)
    got = overlay(image, halves(height, width), palette(2))
    inside = palette(2)[halves(height, width)] // 2
    assert (np.abs(got.astype(int) - inside).max(-1) > 1).sum(1).tolist() == [line] * height


def test_overlay_of_one_pixel_and_one_cluster():
    image = np.full((1, 1, 3), 100, np.uint8)
    got = overlay(image, np.zeros((1, 1), np.uint8), palette(1))
    assert np.abs(got - (palette(1)[0] / 2 + 50)).max() <= 1


NO_TEXT = [""] * 2, [""] * 5, [], ""  # column titles, row titles, legend, title


def solid(colour, height, width):
    return np.full((height, width, 3), colour, np.uint8)


def boxes(sheet, colour):
    """(top, left, height, width) of each connected patch of one colour."""
    patches, _ = ndimage.label((np.asarray(sheet) == colour).all(-1))
    return [(y.start, x.start, y.stop - y.start, x.stop - x.start) for y, x in ndimage.find_objects(patches)]


def test_sheet_cells_are_equal_and_images_keep_their_shape():
    red, blue = (200, 10, 10), (10, 10, 200)
    rows = [
        [solid(red, 300, 400), solid(blue, 100, 800)],
        [solid(red, 600, 800), solid(blue, 400, 100)],
        [solid(red, 30, 40)],
    ]
    sheet = contact_sheet(rows, *NO_TEXT)
    assert sheet.mode == "RGB"
    assert sheet.width == 1600
    reds, blues = boxes(sheet, red), boxes(sheet, blue)
    assert len({box[2:] for box in reds}) == 1  # 4:3 is the median shape: these fill their cells, whatever their size
    assert reds[0][3] / reds[0][2] == pytest.approx(4 / 3, rel=0.01)
    assert blues[0][3] / blues[0][2] == pytest.approx(8, rel=0.05)
    assert blues[1][2] / blues[1][3] == pytest.approx(4, rel=0.05)
    cell = reds[0][2:]
    assert blues[0][3] == cell[1]  # a panorama spans its cell
    assert blues[1][2] == cell[0]  # a tower too, and both are centred
    assert blues[1][1] + blues[1][3] / 2 == pytest.approx(blues[0][1] + cell[1] / 2, abs=1)
    assert blues[0][0] + blues[0][2] / 2 == pytest.approx(reds[0][0] + cell[0] / 2, abs=1)
    steps = np.diff([box[0] for box in reds])
    assert steps[0] == steps[1]


@pytest.mark.parametrize("count", [1, 24])
def test_sheet_height_follows_the_rows(count):
    one, two, many = (
        contact_sheet([[solid(9, 30, 40)] * 3] * rows, ["photo", "overlay", "mask"], ["row"] * rows, [], "title")
        for rows in (1, 2, count)
    )
    assert many.size == (1600, one.height + (count - 1) * (two.height - one.height))


def test_sheet_takes_any_image_and_any_text():
    images = [
        solid(50, 1, 1),
        solid(60, 8, 3000),
        solid(70, 3000, 8),
        np.full((20, 30), 80, np.uint8),
        solid(90, 900, 700),
    ]
    legend = [(palette(64)[i].tolist(), "n" * 10 * i) for i in range(64)]
    sheet = contact_sheet([images, images[:2]], NASTY_NAMES[:5], NASTY_NAMES, legend, "t" * 500)
    pixels = np.asarray(sheet)
    assert sheet.width == 1600
    for edge in (pixels[:20], pixels[-20:], pixels[:, :20], pixels[:, -20:]):
        assert (edge == 255).all()  # nothing runs into the margins


@pytest.mark.parametrize(("count", "across"), [(1, 1), (3, 1), (4, 2), (5, 2)])
def test_groups_sheet_shows_every_image_its_overlay_and_its_groups(count, across, monkeypatch):
    asked = {}
    monkeypatch.setattr(pictures, "contact_sheet", lambda *args: asked.update(args=args) or contact_sheet(*args))
    red, labels = solid((200, 10, 10), 300, 400), np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 1
    sheet = groups_sheet(
        ((f"{i}.png", red, labels) for i in range(count)), palette(3), {0: 0.5, 1: 0.496, 2: 0.004}, "title"
    )
    rows, columns, names, legend, title = asked["args"]
    assert [len(row) for row in rows] == [3 * across] * (count // across) + [3] * (count % across)
    assert columns == ["image", "groups over it", "groups"] * across
    assert "   |   ".join(names) == "   |   ".join(f"{i}.png" for i in range(count))
    assert [text for _, text in legend] == ["0: 50 %", "1: 50 %"]  # the third is too small to be named
    image, over, flat = rows[0][:3]
    assert (image == red).all()
    assert (over == overlay(red, labels, palette(3))).all()
    assert (flat == palette(3)[labels]).all()
    assert title == "title"
    assert sheet.width == 1600


def test_groups_sheet_keeps_only_thumbnails_with_the_labels_in_place():
    labels = np.zeros((3000, 1500), np.uint8)
    labels[1500:] = 1
    image, _, flat = thumbnails(np.zeros((3000, 1500, 3), np.uint8), labels, palette(2))
    assert image.shape == flat.shape == (640, 320, 3)
    assert (flat[:320] == palette(2)[0]).all()
    assert (flat[320:] == palette(2)[1]).all()


def test_legend_wraps_and_shows_every_colour():
    images, colours = [[solid(0, 30, 40)]], palette(100)

    def sheet(texts):
        return contact_sheet(images, [""], [""], list(zip(colours.tolist(), texts)), "")

    names = [f"cluster {i}" for i in range(100)]
    plain, one, four, all_names = (sheet(names[:k]) for k in (0, 1, 4, 100))
    assert plain.height < one.height == four.height < all_names.height
    pixels = np.asarray(all_names)
    for colour in colours:
        assert (pixels == colour).all(-1).sum() > 60
    endless = sheet(["n" * 500 if name == "cluster 3" else name for name in names])
    assert endless.height < all_names.height * 2


def test_long_text_loses_its_middle():
    text = "folder/" + "x" * 200 + "/IMG_0001.jpg"
    short = lettering.shorten(text, 15, False, 200)
    head, tail = short.split("…")
    assert text.startswith(head)
    assert text.endswith(tail)
    assert 0 <= len(head) - len(tail) <= 1
    assert 180 < lettering.font_for(short, 15).getlength(short) <= 200
    assert lettering.shorten("fits", 15, False, 200) == "fits"
    assert lettering.shorten(text, 15, False, 1) == "…"


def test_save_by_suffix(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (12, 17, 3)).astype(np.uint8)
    with Image.open(save(tmp_path / "a.PNG", image)) as png:
        assert (np.asarray(png) == image).all()
    with Image.open(save(tmp_path / "sub" / "a.jpeg", Image.fromarray(image))) as jpeg:
        assert (jpeg.format, jpeg.size) == ("JPEG", (17, 12))
    with Image.open(save(tmp_path / "grey.jpg", image[..., 0])) as grey:
        assert grey.mode == "L"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.PNG", "grey.jpg", "sub"]
