"""The page of a run and of predictions: its tiles, its data, its safety, and the commands that write it."""

import base64
import io
import json
import re
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from smooseg_fast import choose, name, predict, report
from smooseg_fast.command import run
from smooseg_fast.datasets.reading import Picture
from smooseg_fast.errors import UserError
from smooseg_fast.learn.runpage import spread
from smooseg_fast.learn.tiler import cropped, mosaic
from smooseg_fast.segment.checkpoint import read_checkpoint
from smooseg_fast.segment.grouping import Grouping
from smooseg_fast.segment.names import check_name
from smooseg_fast.segment.tree import Pairs, Tree
from smooseg_fast.show import report_tiles
from smooseg_fast.show.report import Page, page_html, sha256
from smooseg_fast.show.report_tiles import (
    MOST_TILES,
    Atlas,
    Looking,
    allowance,
    fine_at,
    fitted,
    read_tiles,
    tile_of,
    tree_lookup,
)

HOSTILE = "</script><script>alert(1)</script><!-- <b>&\u2028.png"


def data_of(page):
    """The data block of a page, as a browser reads it."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def planes(tile, count=1):
    """The label maps uint8 [count,h,w] of a tile."""
    content = zlib.decompress(base64.b64decode(tile["labels"]))
    return np.frombuffer(content, np.uint8).reshape(count, *tile["shape"])


TWO = Atlas(2, 0, None, [])


def a_tile(name):
    return tile_of(name, np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8), None, TWO, 9000)


def a_tree(K, seed=0):
    g = np.random.default_rng(seed)
    rows, shares = g.normal(size=(K, 5)), g.dirichlet(np.full(K, 0.7))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    weight = np.outer(shares, shares)
    return Tree.grow(Pairs(rows @ rows.T * weight, weight, np.ones(K)), shares, 0.5)


@pytest.mark.parametrize("least", [0.0, 0.03, 0.1])
def test_the_lookup_of_the_page_is_the_cut_of_the_tree_at_every_number(least):
    tree = a_tree(17)
    finest, parents = tree_lookup(tree, least)
    assert len(parents) + 1 == len(tree.splits(least)) + 1 > 2
    for groups in range(1, len(parents) + 2):
        labels = []
        for number in finest:
            while number >= groups:
                number = parents[number - 1][0]
            labels.append(number)
        assert labels == tree.cut(groups, least_share=least).tolist()


def test_fine_labels_merge_to_the_mask():
    g = np.random.default_rng(0)
    groups = np.array([4, 0, 4, 2, 0, 2, 4])  # of fine groups; masks have no 1 and no 3, as after a merge
    mask = np.kron(g.choice([0, 2, 4, 255], (5, 4)), np.ones((13, 17), int)).astype(np.uint8)
    cells = g.integers(0, 7, (4, 6)).astype(np.uint8)
    cells[1, 2] = 255
    for fine in (cells, None):
        labels = fine_at(mask, fine, groups, (1.0, 0.8))
        known = mask != 255
        assert (labels[~known] == 255).all()
        np.testing.assert_array_equal(groups[labels[known]], mask[known])
    assert set(np.unique(labels)) == {0, 1, 3, 255}  # without cells: the first of each group


def test_fine_labels_follow_the_cells():
    """Two cells side by side, of fine groups of one group: the border lies between them."""
    labels = fine_at(np.zeros((20, 40), np.uint8), np.array([[1, 2]], np.uint8), np.zeros(3, int), (1.0, 1.0))
    assert (labels[:, :19] == 1).all()
    assert (labels[:, 21:] == 2).all()
    half = fine_at(np.zeros((20, 40), np.uint8), np.array([[1, 2]], np.uint8), np.zeros(3, int), (1.0, 0.5))
    assert (half == 1).all()  # the second cell lies beyond the image


@pytest.mark.parametrize("merged", [False, True])
def test_a_look_has_the_best_fine_group_and_how_sure_the_label_is(merged):
    g = torch.Generator().manual_seed(1)
    codes, teacher = torch.randn(3, 4, 6, generator=g), torch.randn(5, 6, generator=g)
    head = SimpleNamespace(teacher=teacher)
    grouping = Grouping(head, np.array([0, 1, 1, 0, 2]) if merged else None)
    valid = np.ones((3, 4), bool)
    valid[2, 1] = False
    looking = Looking([grouping], head, valid)
    for rows in (slice(0, 2), slice(2, 3)):
        looking.see({id(head): codes[rows]})
    look = looking.look(0, 4, (0.75, 1.0))
    cosines = torch.nn.functional.cosine_similarity(codes[:, :, None], teacher, dim=-1)
    expected = cosines.argmax(-1).numpy()
    assert look.fine.shape == (4, 4)  # the last row lies beyond the image
    np.testing.assert_array_equal(look.fine[:3][valid], expected[valid])
    assert look.fine[2, 1] == 255
    if merged:
        cosines = torch.stack([cosines[..., [0, 3]].amax(-1), cosines[..., [1, 2]].amax(-1), cosines[..., 4]], -1)
    best = (10 * cosines).softmax(-1).sort(-1, descending=True).values[valid]
    assert look.certainty == pytest.approx(float((best[:, 0] - best[:, 1]).mean()), abs=1e-6)


def test_tiles_keep_within_their_bytes():
    """Noise is the worst that there is; a page of 100 has less than 3 MB, and no page more than 24 MB."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3)).astype(np.uint8)
    labels = np.random.default_rng(1).integers(0, 7, (300, 400)).astype(np.uint8)
    for count in (1, 100, 1000, MOST_TILES, 10 * MOST_TILES):
        tile = tile_of("noise.png", noise, labels, None, Atlas(7, 0, None, []), allowance(count))
        assert len(json.dumps(tile)) < 1.05 * allowance(count)
        assert np.unique(planes(tile)).tolist() == list(range(7))
        picture = Image.open(io.BytesIO(base64.b64decode(tile["picture"])))
        assert abs(picture.width / picture.height - 4 / 3) < 0.1
        assert list(picture.size) == tile["size"]
    assert 100 * allowance(100) < 2.6e6
    assert MOST_TILES * allowance(MOST_TILES) < 2.3e7
    large = tile_of("noise.png", noise, labels, None, Atlas(7, 0, None, []), allowance(1))
    first, *others = fitted([large, *[tile] * 199])
    assert len(first["picture"]) < allowance(200) < len(large["picture"])
    assert others == [tile] * 199


def test_nothing_from_outside_can_leave_the_data_block():
    tile = tile_of(
        HOSTILE, np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8), None, Atlas(2, 0, None, []), 9000
    )
    naming = {"names": [[[0], HOSTILE]], "colours": [], "merges": []}
    page = Page(
        HOSTILE, "predictions", HOSTILE, 2, 1, Atlas(2, 0, None, []).header(), naming=naming, skipped={HOSTILE: HOSTILE}
    )
    html = page_html(page, [tile])
    assert HOSTILE not in html
    assert "alert(1)" in html  # as data
    assert html.count("<script") == html.count("</script>") == 2
    data = data_of(html)
    assert data["tiles"][0]["name"] == data["page"]["title"] == data["page"]["naming"]["names"][0][1] == HOSTILE
    policy = re.search('Content-Security-Policy" content="([^"]*)"', html)[1]
    script = re.search("<script>(.*)</script>", html, re.DOTALL)[1]
    style = re.search("<style>(.*)</style>", html, re.DOTALL)[1]
    assert f"script-src 'sha256-{sha256(script)}'" in policy
    assert f"style-src 'sha256-{sha256(style)}'" in policy
    assert "default-src 'none'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)
    assert "innerHTML" not in script


def contrast(one, other):
    """The contrast of two colours #rrggbb, 1 to 21, by WCAG 2."""

    def luminance(colour):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_of_the_page_can_be_read_in_light_and_dark():
    css = (Path(report_tiles.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6}|\d+%)", block)) for block in re.findall(r":root {(.*?)}", css, re.DOTALL)
    )
    for values in (light, light | dark):
        for text in ("ink", "quiet", "accent"):
            for ground in ("paper", "well", "warn"):
                if (text, ground) != ("accent", "warn"):
                    assert contrast(values[text], values[ground]) >= 4.5, (text, ground)
        for line in ("edge", "accent"):  # of controls and of the focus
            assert contrast(values[line], values["paper"]) >= 3
        share = int(values["cell"][:-1]) / 100  # of the accent in a full cell of the table of classes
        mixed = [
            round(share * int(values["accent"][k : k + 2], 16) + (1 - share) * int(values["paper"][k : k + 2], 16))
            for k in (1, 3, 5)
        ]
        assert contrast(values["ink"], f"#{bytes(mixed).hex()}") >= 4.5


def test_names_have_the_joiners_of_words_and_emoji_and_nothing_else_that_cannot_be_seen():
    for good in ("می\u200cخواهم", "\U0001f469\u200d\U0001f9b0", "ordinary"):
        check_name(good, "a name")
    for bad in ("a\u202eb", "a\nb", "a\x07", "\u200d", "\u200c \u200d"):
        with pytest.raises(UserError, match="is no name"):
            check_name(bad, "a name")


def test_damaged_lines_of_the_tiles_are_left_out(tmp_path):
    tile = tile_of(
        "a", np.zeros((32, 48, 3), np.uint8), np.zeros((32, 48), np.uint8), None, Atlas(2, 0, None, []), 9000
    )
    bad = [
        tile | change for change in ({"name": 3}, {"shape": [1]}, {"parts": [0.5]}, {"parts": None}, {"labels": None})
    ]
    header = Atlas(2, 0, None, []).header()
    lines = [header, *bad, tile | {"certainty": 0.1}, tile | {"certainty": 0.2}]
    (tmp_path / "tiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "cut sh')
    assert read_tiles(tmp_path / "tiles.jsonl") == (header, {"a": tile | {"certainty": 0.2}})
    (tmp_path / "tiles.jsonl").write_text(json.dumps(header | {"format": 0}) + "\n" + json.dumps(tile) + "\n")
    assert read_tiles(tmp_path / "tiles.jsonl") == ({}, {})
    assert read_tiles(tmp_path / "missing.jsonl") == ({}, {})


def test_a_mosaic_takes_each_cell_from_the_nearest_square():
    # an image of 32 x 52 pixels, squares of 4 x 4 patches of 8 pixels at its left, middle and right
    cells = mosaic({5: (0, 0), 6: (0, 10), 7: (0, 20)}, (4, 4), 8, (32, 52))
    assert cells.box == pytest.approx((0, 0, 1, 56 / 52))
    assert cells.rows.shape == (4, 7)
    assert cells.rows[0].tolist() == [5, 5, 5, 6, 7, 7, 7]
    assert cells.patches[1].tolist() == [4, 5, 6, 6, 6, 7, 7]
    # one square in the middle: its box alone
    alone = mosaic({0: (0, 10)}, (4, 4), 8, (32, 52))
    assert alone.box == pytest.approx((0, 10 / 52, 1, 42 / 52))
    assert alone.patches.tolist() == np.arange(16).reshape(4, 4).tolist()
    # a large grid is thinned, and gaps belong to no square
    wide = mosaic({0: (0, 0), 1: (0, 8000)}, (4, 4), 8, (32, 8032))
    assert max(wide.rows.shape) <= 96
    assert (wide.rows == -1).any()
    part, seen = cropped(Picture(np.zeros((64, 104, 3), np.uint8)), cells.box)
    assert part.pixels.shape == (64, 104, 3)
    assert seen == pytest.approx((1, 52 / 56))


def test_the_first_images_are_spread_over_all():
    assert spread(8) == [0, 4, 2, 6, 1, 5, 3, 7]
    for count in (1, 2, 5, 100):
        assert sorted(spread(count)) == list(range(count))


def test_a_run_its_page_and_its_page_again(trained, labelled, capsys):
    before = Path("out/report.html").read_bytes()
    data = data_of(before.decode())
    page, checkpoint = data["page"], read_checkpoint("out/checkpoint.safetensors")
    names = [tile["name"] for tile in data["tiles"]]
    assert sorted(names) == [f"{number}.png" for number in range(5)]
    assert page["images"] == 5
    assert page["tiles_left_out"] == 0
    assert page["groups"] == len(checkpoint.grouping)
    assert page["tree"]["finest"] == checkpoint.at(checkpoint.fine.most).cut.tolist()
    assert page["tree"]["patches"]["side"] == checkpoint.fine.typical.shape[1]
    assert np.array(page["scores"]["confusion"]).sum() > 0
    assert [name for name, *_ in page["scores"]["classes"]] == ["wall", "fence"]
    assert ["--seed", "0"] in page["settings"]
    assert all(value not in ("", "None", "False") for _, value in page["settings"])
    assert page["shares"] == pytest.approx(checkpoint.shares)
    assert len(page["figures"]) > 5
    assert all(0 <= tile["certainty"] <= 1 for tile in data["tiles"])
    for tile in data["tiles"]:
        assert planes(tile, 2).shape[1:] == tuple(tile["shape"])
        assert sum(tile["parts"][1::2]) == pytest.approx(10_000, abs=5)
    # two textures side by side: the tile tells them apart
    fine = checkpoint.at(2).cut[planes(data["tiles"][0], 2)[1]]
    assert abs(fine[:, :10].mean() - fine[:, -10:].mean()) > 0.5

    assert run(report.main, ["--run", "out"]) == 0
    assert "open out/report.html in a browser" in capsys.readouterr().out
    written = data_of(Path("out/report.html").read_text())  # the run was made in another folder
    assert written == data | {"page": page | {"run": "out"}}
    other = 2 if page["groups"] != 2 else 3
    assert run(choose.main, ["--run", "out", "--groups", str(other)]) == 0
    assert run(report.main, ["--run", "out", "--out", "again.html"]) == 0
    again = data_of(Path("again.html").read_text())
    assert again["page"]["groups"] == other
    assert again["tiles"] == data["tiles"]
    assert data_of(Path("out/report.html").read_text())["page"]["groups"] == other  # choose and name write it again
    capsys.readouterr()
    picture = Path("out/groups.png").read_bytes()
    assert run(name.main, ["--run", "out", "0=road </script>"]) == 0
    assert "look at    out/tree.png, out/groups.png, out/report.html\n" in capsys.readouterr().out
    assert Path("out/groups.png").read_bytes() != picture  # its legend has the name
    assert run(name.main, ["--run", "out", "0="]) == 0
    assert Path("out/groups.png").read_bytes() == picture
    assert run(name.main, ["--run", "out", "0=road </script>"]) == 0
    named = Path("out/report.html").read_text()
    assert "road </script>" in json.dumps(data_of(named))
    assert "road </script>" not in named


def test_reports_that_cannot_be(tmp_path, capsys):
    for args, why in (
        ([], "--run: give the folder of a run, or --predictions"),
        (["--run", "a", "--predictions", "b"], "--run: give the folder of a run, or --predictions"),
        (["--run", str(tmp_path)], "holds no finished run"),
        (["--predictions", str(tmp_path)], "holds no shares.json that can be read; run smooseg predict again"),
    ):
        assert run(report.main, args) == 2
        assert why in capsys.readouterr().err


def test_predictions_at_several_numbers_have_a_page_each(trained, labelled, monkeypatch, capsys):
    checkpoint = read_checkpoint("out/checkpoint.safetensors")
    own = len(checkpoint.grouping)
    other = 3 if own == 2 else 2
    images = str(labelled / "val" / "images")
    words = ["--checkpoint", "out/checkpoint.safetensors", "--images", images, "--out", "masks"]
    words += ["--groups", str(own), str(other)]
    assert run(predict.main, words) == 0
    assert "report.html in a browser" in capsys.readouterr().out
    for number in (own, other):
        folder = Path(f"masks/groups_{number}")
        data = data_of((folder / "report.html").read_text())
        page, count = data["page"], 2 if number == own else 1
        assert page["planes"] == count  # a trained head's mask, and fine groups
        assert page["run"] == "out"
        assert [tile["name"] for tile in data["tiles"]] == ["5.png", "6.png", "7.png"]
        for tile in data["tiles"]:
            mask = np.array(
                Image.open(folder / "masks" / tile["name"]).resize(tile["shape"][::-1], Image.Resampling.NEAREST)
            )
            labels = planes(tile, count)
            cut = checkpoint.at(number).cut
            np.testing.assert_array_equal(labels[0] if number == own else cut[labels[0]], mask)
            assert 0 < tile["certainty"] <= 1
            # the fine plane comes from the codes: its cut is nearly the mask
            assert (cut[labels[-1]] == mask).mean() > 0.5
            assert tile["own"] is None or sum(tile["own"][1::2]) == pytest.approx(10_000, abs=5)
    # resumed: nothing is labelled again, and the tiles stay, also without the images
    before = Path(f"masks/groups_{own}/tiles.jsonl").read_bytes()
    monkeypatch.setattr(report_tiles, "tile_of", None)
    assert run(predict.main, words) == 0
    assert Path(f"masks/groups_{own}/tiles.jsonl").read_bytes() == before
    assert run(report.main, ["--predictions", f"masks/groups_{own}", "--out", "p.html"]) == 0
    assert (
        data_of(Path("p.html").read_text())["tiles"]
        == data_of(Path(f"masks/groups_{own}/report.html").read_text())["tiles"]
    )


def test_a_folder_without_tiles_gets_them_from_its_masks_and_one_without_checkpoint_has_no_tree(trained, capsys):
    words = ["--checkpoint", "out/checkpoint.safetensors", "--images", "set/val/images", "--out", "masks"]
    assert run(predict.main, words) == 0
    first = data_of(Path("masks/report.html").read_text())
    Path("masks/tiles.jsonl").unlink()
    assert run(predict.main, words) == 0
    second = data_of(Path("masks/report.html").read_text())
    assert [tile["name"] for tile in second["tiles"]] == [tile["name"] for tile in first["tiles"]]
    assert all(tile["certainty"] is None for tile in second["tiles"])
    Path("out/checkpoint.safetensors").unlink()
    assert run(report.main, ["--predictions", "masks"]) == 0
    third = data_of(Path("masks/report.html").read_text())
    assert third["page"]["tree"] is None
    assert third["page"]["run"] is None
