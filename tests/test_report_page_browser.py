"""The page in a browser: it opens without errors, repaints, shows, names, merges, and runs nothing from outside."""

import json

import numpy as np
import pytest
from browsers import browser
from PIL import Image
from test_report_page import HOSTILE, a_tree, planes

from smooseg_fast.segment.colours import palette
from smooseg_fast.show.looks import Look
from smooseg_fast.show.report import Page, page_html
from smooseg_fast.show.report_tiles import Atlas, tile_of, tree_lookup

K, GROUPS = 8, 4
TREE = a_tree(K)


class Tiny(Page):
    """A page with a tree and no checkpoint."""

    def data(self, tiles):
        finest, parents = tree_lookup(TREE, 0.0)
        tree = {"finest": finest, "parents": parents, "shares": TREE.shares.tolist(), "patches": None}
        return super().data(tiles) | {"tree": tree}


def tiles():
    g, cut = np.random.default_rng(0), TREE.cut(GROUPS)
    atlas = Atlas(GROUPS, K, cut, [])
    for name in ("a.png", HOSTILE, "c.png"):
        cells = g.integers(0, K, (4, 6)).astype(np.uint8)
        mask = np.asarray(Image.fromarray(cut[cells].astype(np.uint8)).resize((96, 64), Image.Resampling.NEAREST))
        pixels = g.integers(0, 256, (64, 96, 3)).astype(np.uint8)
        yield tile_of(name, pixels, mask, Look(cells, (1.0, 1.0), float(g.random())), atlas, 20_000)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(the page in a browser, the tiles, what its console and its scripts complained of)."""
    path, made = tmp_path_factory.mktemp("page") / "report.html", list(tiles())
    header = Atlas(GROUPS, K, TREE.cut(GROUPS), []).header()
    naming = {"names": [[[0], HOSTILE]], "colours": [], "merges": []}
    about = Tiny(HOSTILE, "run", "runs/it's", GROUPS, 3, header, naming=naming, skipped={HOSTILE: HOSTILE})
    path.write_text(page_html(about, made))
    with browser() as running:
        page, complaints = running.new_page(), []
        page.on(
            "console", lambda message: complaints.append(message.text) if "getImageData" not in message.text else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.goto(path.as_uri())
        page.wait_for_selector("#tiles li:nth-child(3) canvas[data-groups]")
        yield page, made, complaints


@pytest.fixture
def page(shown):
    yield shown[0]
    assert shown[2] == []


def painted(page, number=0):
    """The overlay of a tile, uint8 [h,w,4]."""
    size, values = page.evaluate(
        """(n) => { const c = document.querySelectorAll("#tiles canvas")[n];
        return [[c.height, c.width], [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data]]; }""",
        number,
    )
    return np.array(values, np.uint8).reshape(*size, 4)


def set_slider(page, name, value):
    page.locator(name).evaluate("(node, v) => { node.value = v; node.dispatchEvent(new Event('input')); }", str(value))
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")


def test_the_slider_repaints_by_lookup(page, shown):
    page.check("input[value=fill]")
    for groups in (1, K, GROUPS):
        set_slider(page, "#groups", groups)
        page.wait_for_selector(f'#tiles canvas[data-groups="{groups}"]')
        for number, tile in enumerate(shown[1]):
            expected = palette(256)[TREE.cut(groups)[planes(tile)[0]]]
            np.testing.assert_array_equal(painted(page, number)[..., :3], expected)
        assert page.inner_text("#groups-value") == str(groups)
        assert page.locator("#group-list > li").count() == groups


def test_outlines_leave_regions_open_and_groups_go_off(page):
    page.check("input[value=outline]")
    set_slider(page, "#groups", GROUPS)
    alpha = painted(page)[..., 3]
    assert 0 < (alpha > 0).mean() < 0.7
    page.check("input[value=fill]")
    set_slider(page, "#opacity", 30)
    assert page.locator("#tiles canvas").first.evaluate("node => getComputedStyle(node).opacity") == "0.3"
    page.click("#all-off")
    set_slider(page, "#groups", GROUPS)
    assert not painted(page)[..., 3].any()
    page.click("#all-on")
    set_slider(page, "#groups", GROUPS)
    assert painted(page)[..., 3].all()


def test_images_open_large_and_the_keyboard_is_enough(page):
    first = page.locator("#tiles button").first
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert page.text_content("#viewer-name") == HOSTILE
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#viewer-name") == "c.png"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#viewer-name") == "a.png"
    page.keyboard.press("+")
    assert page.inner_text("#groups-value") == str(GROUPS + 1)
    page.keyboard.press("-")
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.wait_for_function("document.activeElement.closest('li') === document.querySelector('#tiles li')", timeout=3000)


def test_every_order_and_part_shows(page, shown):
    certain = [tile["name"] for tile in sorted(shown[1], key=lambda tile: tile["certainty"])]
    page.select_option("#sort", "uncertain")
    assert page.locator("#tiles .caption").all_text_contents() == certain
    for order in ("unusual", "group", "order"):
        page.select_option("#sort", order)
        assert page.locator("#tiles li").count() == 3
    page.fill("#search", "C.p")
    assert page.locator("#tiles .caption").all_text_contents() == ["c.png"]
    page.fill("#search", "")
    for part in ("tree", "figures", "settings", "images"):
        if page.locator(f"#tab-{part}").count():
            page.click(f"#tab-{part}")
            assert page.locator(f"#{part}").is_visible()
    page.click("#tab-tree")
    page.locator("#tree-drawing circle").first.dispatch_event("click")
    page.click("#tab-images")
    set_slider(page, "#groups", GROUPS)


def test_names_and_merges_become_a_file_and_a_command(page):
    set_slider(page, "#groups", GROUPS)
    page.fill("input[aria-label='Name of group 3']", "road")
    page.keyboard.press("Tab")
    page.select_option("select[aria-label='Merge group 2 with']", "1")
    set_slider(page, "#groups", GROUPS)
    assert page.locator("#group-list > li").count() == GROUPS - 1
    with page.expect_download() as downloading:
        page.click("#download")
    names = json.loads(open(downloading.value.path()).read())
    assert names["groups"] == GROUPS
    assert names["names"]["3"] == "road"
    assert names["merge"] == [[1, 2]]
    assert page.inner_text("#command") == "smooseg name --run 'runs/it'\\''s' --file names.json"
    set_slider(page, "#groups", GROUPS + 1)
    assert page.inner_text("#command").startswith(f"smooseg choose --run 'runs/it'\\''s' --groups {GROUPS + 1}\n")
    set_slider(page, "#groups", GROUPS)
    page.click("#unmerge")
    set_slider(page, "#groups", GROUPS)
    assert page.locator("#group-list > li").count() == GROUPS
