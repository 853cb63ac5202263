"""Values of pixels, not only shapes: palettes apart, masks that read back, blends by hand, cells where they belong."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from smooseg_fast.errors import UserError
from smooseg_fast.segment.colours import from_oklab, palette, to_oklab
from smooseg_fast.segment.names import Group
from smooseg_fast.show import lettering, pictures
from smooseg_fast.show.overlays import connected, depths, outlines, overlay, regions, shades_of, texture, with_names
from smooseg_fast.show.pictures import contact_sheet, save, write_mask
from smooseg_fast.show.sheet import Shown, TruthLook, sheet_pages, thumbnail

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


def oklab(linear):
    """Linear RGB [..., 3] to OKLab (Ottosson 2020)."""
    cones = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
    cones += [[0.0883024619, 0.2817188376, 0.6299787005]]
    axes = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
    axes += [[0.0259040371, 0.7827717662, -0.8086757660]]
    return np.cbrt(linear @ np.array(cones).T) @ np.array(axes).T


def closest(colours, seen=None):
    """The smallest OKLab distance between two of `colours`, as they are or as `seen`."""
    linear = (lambda e: np.where(e <= 0.04045, e / 12.92, ((e + 0.055) / 1.055) ** 2.4))(colours / 255)
    lab = oklab((linear if seen is None else linear @ seen.T).clip(0, 1))
    distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    return distance[np.triu_indices(len(colours), 1)].min()


def test_palette_is_distinct_and_does_not_move():
    for to_lab, one in ((oklab, 1), (to_oklab, 255)):
        np.testing.assert_allclose(to_lab(one * np.eye(3)[0]), [0.62796, 0.22486, 0.12585], atol=1e-4)  # published
        np.testing.assert_allclose(to_lab(one * np.ones(3)), [1, 0, 0], atol=1e-4)
    colours = palette(256)
    assert colours.shape == (256, 3)
    assert colours.dtype == np.uint8
    for k in (1, 7, 20, 21, 64, 100):
        assert (palette(k) == colours[:k]).all()
    assert closest(colours[:20]) > 0.11
    assert closest(colours[:64]) > 0.05
    assert len(np.unique(colours, axis=0)) == 256


def test_oklab_and_back():
    colours = np.random.default_rng(0).integers(0, 256, (500, 3)).astype(np.uint8)
    assert np.abs(from_oklab(to_oklab(colours)).astype(int) - colours).max() <= 2
    vivid = to_oklab(from_oklab(np.array([[0.9, 0.4, -0.4], [1.5, 0.0, 0.0]])))  # no screen has them
    assert vivid[:, 0] == pytest.approx([0.9, 1.0], abs=0.01)


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
def test_overlay_has_the_hue_of_the_group_and_the_light_of_the_image(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    labels, colours = halves(*size), palette(2)
    got = np.asarray(overlay(image, labels, colours))
    line = outlines(labels)
    assert line.any(1).all()
    assert to_oklab(got[line])[:, 0].max() < 0.4  # dark
    lab, grey = to_oklab(got[~line]), texture(image)[~line]
    for k in (0, 1):  # along one hue, ever lighter with the image
        inside = lab[labels[~line] == k]
        hue, own = np.arctan2(inside[:, 2], inside[:, 1]), to_oklab(colours[k])
        assert np.abs(np.angle(np.exp(1j * (hue - np.arctan2(own[2], own[1]))))).max() < 0.15
        order = np.argsort(grey[labels[~line] == k], kind="stable")
        assert (np.diff(inside[order, 0]) > -0.01).all()


def test_broad_light_and_dark_hardly_show_and_texture_does():
    image = np.full((240, 240, 3), 40, np.uint8)
    image[:120] = 220
    image[::2, ::2] -= 20  # texture
    seen = texture(image).astype(int)
    sky, street = seen[:80], seen[160:]
    assert 20 < sky.mean() - street.mean() < 0.35 * 180
    for part in (sky, street):
        assert part[1::2].mean() - part[::2, ::2].mean() == pytest.approx(20, abs=2)
    assert texture(np.zeros((1, 1, 3), np.uint8)).min() >= 1


def shades():
    """The colour of every label and grey value, uint8 [256, 256, 3]."""
    return shades_of(palette(256).tobytes()).view(np.uint8).reshape(256, 256, 4)[..., :3]


def test_fills_are_of_even_lightness():
    """Colours on one image differ less in lightness than they do alone, and no image makes a fill black or white."""
    table = shades()
    fills = to_oklab(table[:20, 1:])[..., 0]
    assert np.ptp(fills, axis=0).max() < 0.85 * np.ptp(to_oklab(palette(20))[:, 0])
    assert fills.min() > 0.1
    assert fills.max() < 0.93
    assert closest(table[:20, 128]) > 0.09


@pytest.mark.parametrize("seen", [PROTAN, DEUTAN], ids=["protanopia", "deuteranopia"])
@pytest.mark.parametrize("grey", [60, 128, 200])
def test_fills_stay_apart_for_colour_blind_eyes(seen, grey):
    assert closest(shades()[:8, grey], seen) > 0.045


@pytest.mark.parametrize(("height", "width", "line"), [(8, 3000, 1), (300, 300, 1), (700, 800, 2), (1400, 1500, 4)])
def test_outlines_grow_with_the_image(height, width, line):
    assert outlines(halves(height, width)).sum(1).tolist() == [line] * height


def test_overlay_of_one_pixel_and_no_data():
    image = np.full((1, 2, 3), 100, np.uint8)
    got = np.asarray(overlay(image, np.array([[0, 255]], np.uint8), palette(1)))
    assert (got[0, 1] == 100).all()
    assert not (got[0, 0] == 100).all()


def test_large_regions_are_found_in_their_middles():
    labels = np.zeros((400, 600), np.uint8)
    labels[100:300, 350:550] = 7
    labels[10:20, 10:20] = 5  # small
    labels[:, :60] = 255  # no data
    found = regions(labels)
    assert [region.number for region in found] == [0, 7]
    seven = found[1]
    assert (seven.x, seven.y) == pytest.approx((450, 200), abs=12)
    assert seven.radius == pytest.approx(100, abs=12)
    for region in found:
        assert labels[int(region.y), int(region.x)] == region.number
    assert regions(np.full((1, 1), 255, np.uint8)) == []
    part = np.zeros((181, 241), np.uint8)
    part[:, :20] = 3  # 8 % of the image
    assert [region.number for region in regions(part)] == [0, 3]


def test_connected_parts_and_depths():
    g = np.random.default_rng(0)
    spiral = np.zeros((9, 10), bool)  # one part, whose runs come together late
    for n in range(0, 4, 2):
        spiral[n, n : 9 - n] = spiral[8 - n, n : 9 - n] = spiral[n : 9 - n, 8 - n] = spiral[n + 2 : 9 - n, n] = True
        spiral[n + 2, n : n + 3] = True
    maps = [spiral, *(g.random((17, 23)) < share for share in (0, 0.3, 0.55, 0.6, 0.9, 1)), np.ones((1, 1), bool)]
    for inside in maps:
        inside[:, -1] = False
        parts, (expected, count) = connected(inside), ndimage.label(inside)
        assert ((parts > 0) == inside).all()
        assert len(np.unique(parts[inside])) == len({*zip(parts[inside], expected[inside])}) == count
        np.testing.assert_array_equal(depths(inside), ndimage.distance_transform_cdt(inside, "taxicab"))


def test_a_name_looks_as_pillow_draws_it():
    labels, picture = np.zeros((200, 300), np.uint8), Image.new("RGB", (300, 200), "#808080")
    (region,) = regions(labels)
    expected = picture.copy()
    ImageDraw.Draw(expected).text(
        (round(region.x), round(region.y)),
        "Straße",
        fill="white",
        font=lettering.font_for("Straße", 15, True),
        anchor="mm",
        stroke_width=1,
        stroke_fill="#1d2126",
    )
    assert np.abs(np.asarray(with_names(picture, labels, {0: "Straße"})).astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("name", ["road", *filter(None, NASTY_NAMES)])
def test_names_are_written_where_they_fit(name):
    labels = halves(200, 300)
    labels[90:110, 20:40] = 2
    blank = np.full((200, 300, 3), 9, np.uint8)
    got = np.asarray(with_names(Image.fromarray(blank), labels, {0: name}))
    changed = (got != blank).any(-1)
    assert changed[:, :150].any()
    assert changed[:, 150:].any()  # the number of a group without a name
    assert not changed[:, 145:155].any()


NO_TEXT = [""] * 2, [[""]] * 5, [], ""  # column titles, row titles, legend, title


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
        contact_sheet([[solid(9, 30, 40)] * 3] * rows, ["photo", "overlay", "mask"], [["row"]] * rows, [], "title")
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
    sheet = contact_sheet([images, images[:2]], NASTY_NAMES[:5], [NASTY_NAMES[:2], NASTY_NAMES[2:4]], legend, "t" * 500)
    pixels = np.asarray(sheet)
    assert sheet.width == 1600
    for edge in (pixels[:20], pixels[-20:], pixels[:, :20], pixels[:, -20:]):
        assert (edge == 255).all()  # nothing runs into the margins


GROUPS_SHOWN = [
    Group(number, name, tuple(palette(9)[number].tolist()), share)
    for number, name, share in ((0, "group 0", 0.5), (1, "road", 0.496), (8, "group 8", 0.004))
]


def asked_sheet(monkeypatch, shown, **options):
    """The arguments of the contact sheets that are drawn for these images, and the sheets."""
    asked = []
    monkeypatch.setattr(pictures, "contact_sheet", lambda *args: asked.append(args) or contact_sheet(*args))
    return asked, list(sheet_pages(shown, GROUPS_SHOWN, "images {first} to {last}", **options))


@pytest.mark.parametrize(("count", "across"), [(1, 1), (2, 2), (5, 2), (13, 3)])
def test_a_page_shows_every_image_and_its_groups_with_a_caption_below(count, across, monkeypatch):
    red, labels = solid((200, 10, 10), 300, 400), np.zeros((300, 400), np.uint8)
    labels[:, 200:] = 1
    asked, (page,) = asked_sheet(monkeypatch, (Shown(f"{i}.png", red, labels) for i in range(count)))
    ((rows, columns, captions, legend, title),) = asked
    full, rest = divmod(count, across)
    assert [len(row) for row in rows] == [2 * across] * full + [2 * rest] * (rest > 0)
    assert columns == ["image", "groups"] * across
    assert [name for row in captions for name in row] == [f"{i}.png" for i in range(count)]
    assert [text for _, text in legend] == ["0: 50 %", "1 road: 50 %"]  # the third is too small to be named
    image, over = rows[0][:2]
    assert (image == (200, 10, 10)).all()
    small = np.array(Image.fromarray(labels).resize(image.shape[1::-1], Image.Resampling.NEAREST))
    fill = overlay(image, small, palette(2))
    assert over == with_names(fill.copy(), small, {0: "0", 1: "road"})
    assert (np.asarray(over) == np.asarray(fill)).mean() > 0.9
    assert title == f"images 1 to {count}"
    assert page.width == 1600


def test_all_images_are_shown_in_pages(monkeypatch):
    shown = (Shown(f"{i}.png", solid(i, 8, 8), np.zeros((8, 8), np.uint8)) for i in range(50))
    asked, pages = asked_sheet(monkeypatch, shown)
    asked.sort(key=lambda one: int(one[-1].split()[1]))  # two pages are drawn at a time
    assert [title for *_, title in asked] == ["images 1 to 24", "images 25 to 48", "images 49 to 50"]
    assert len(pages) == 3
    names = [name for _, _, captions, *_ in asked for row in captions for name in row]
    assert names == [f"{i}.png" for i in range(50)]
    with pytest.raises(UserError, match="no images to show"):
        list(sheet_pages([], GROUPS_SHOWN, ""))


def test_ground_truth_stands_next_to_the_groups(monkeypatch):
    labels, colours = halves(60, 80), palette(4)
    shown = [Shown("a", solid(9, 60, 80), labels, 1 - labels), Shown("b", solid(9, 60, 80), labels)]
    look = TruthLook(pictures.by_label(colours), [((1, 2, 3), "truth: sea")])
    ((rows, columns, _, legend, _),), _ = asked_sheet(monkeypatch, shown, truth=look)
    assert columns == ["image", "groups", "ground truth"] * 2
    assert (rows[0][2][:, 0] == colours[1]).all()
    assert (rows[0][2][:, -1] == colours[0]).all()
    assert (rows[0][5] == 255).all()  # the second has none
    assert legend[-1] == ((1, 2, 3), "truth: sea")


def test_only_thumbnails_are_kept_with_the_labels_in_place():
    labels = np.zeros((3000, 1500), np.uint8)
    labels[1500:] = 1
    shown = Shown("a", np.zeros((3000, 1500, 3), np.uint8), labels, labels)
    for images, side in ((12, 640), (13, 362)):
        small = thumbnail(shown, images)
        assert small.image.shape == (side, side // 2, 3)
        for part in (small.labels, small.truth):
            assert (part[: side // 2] == 0).all()
            assert (part[side // 2 :] == 1).all()
    assert thumbnail(small, 1) is small


@pytest.mark.parametrize("shape", [(360, 480), (480, 360), (300, 300), (100, 900), (900, 100)], ids=str)
def test_thumbnails_of_many_images_of_one_shape_fill_their_cells_and_are_not_resized_again(shape, monkeypatch):
    shown = [thumbnail(Shown("a", solid(9, *shape), np.zeros(shape, np.uint8)), 13)] * 13
    ((rows, columns, *_),), _ = asked_sheet(monkeypatch, shown)
    assert rows[0][0] is shown[0].image
    width, height = pictures.cell_size([shape], len(columns))
    assert shown[0].image.shape[0] == height or shown[0].image.shape[1] == width


def test_legend_wraps_and_shows_every_colour():
    images, colours = [[solid(0, 30, 40)]], palette(100)

    def sheet(texts):
        return contact_sheet(images, [""], [[""]], list(zip(colours.tolist(), texts)), "")

    names = [f"cluster {i}" for i in range(100)]
    plain, one, four, all_names = (sheet(names[:k]) for k in (0, 1, 4, 100))
    assert plain.height < one.height == four.height < all_names.height
    pixels = {colour: count for count, colour in all_names.getcolors(1 << 24)}
    for colour in colours.tolist():
        assert pixels[tuple(colour)] > 60
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
