"""The page in a browser: it opens without errors, repaints, shows, names, merges, and runs nothing from outside."""

import base64
import json
import re

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


# as a run with labels of three classes reports them; the fourth group is matched to none
CONFUSION = [[80, 20, 0], [0, 60, 40], [10, 0, 90], [50, 50, 0]]
CLASSES = [{"name": name, "pixels": 100, "iou": 0.5} for name in ("sky", "<b>road</b>", "شارع")]
MATCHED = [{"cluster": k, "class": name} for k, name in enumerate(["sky", "<b>road</b>", "شارع", None])]
SCORES = {"accuracy": 0.7, "miou": 0.5, "classes": CLASSES, "clusters": MATCHED}
REPORT = {"scores": {"groups": GROUPS, "held_out": True, "hungarian": SCORES, "confusion": CONFUSION}}


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
    about = Tiny(
        HOSTILE, "run", "runs/it's", GROUPS, 3, header, naming=naming, skipped={HOSTILE: HOSTILE}, report=REPORT
    )
    path.write_text(page_html(about, made))
    with browser() as running:
        page, complaints = running.new_page(), []
        page.on(
            "console", lambda message: complaints.append(message.text) if "getImageData" not in message.text else None
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
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
        const { data } = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        return [[c.height, c.width], btoa(String.fromCharCode(...data))]; }""",
        number,
    )
    return np.frombuffer(base64.b64decode(values), np.uint8).reshape(*size, 4)


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
    for hidden in (True, False):  # the image has the focus, not a button that the space bar would press
        page.keyboard.press("Space")
        assert page.locator("#stage canvas").evaluate("node => node.hidden") is hidden
    chip = page.locator("#viewer-shares button").first
    for pressed in ("false", "true"):
        chip.press("Enter")
        page.wait_for_function("value => document.activeElement.getAttribute('aria-pressed') === value", arg=pressed)
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    page.wait_for_function("document.activeElement.closest('li') === document.querySelector('#tiles li')", timeout=3000)


def test_every_order_and_part_shows(page, shown):
    certain = [tile["name"] for tile in sorted(shown[1], key=lambda tile: tile["certainty"])]
    page.select_option("#sort", "uncertain")
    assert page.locator("#tiles .caption bdi").all_text_contents() == certain
    least = min(tile["certainty"] for tile in shown[1])
    assert float(page.locator("#tiles .caption span").first.inner_text()) == pytest.approx(least, abs=0.005)
    for order in ("unusual", "group", "order"):
        page.select_option("#sort", order)
        assert page.locator("#tiles li").count() == 3
    page.fill("#search", "C.p")
    assert page.locator("#tiles .caption bdi").all_text_contents() == ["c.png"]
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
    assert page.locator("#unsaved").is_visible()
    page.click("#names-panel summary")
    with page.expect_download() as downloading:
        page.click("#download")
    names = json.loads(open(downloading.value.path()).read())
    assert not page.locator("#unsaved").is_visible()
    file = downloading.value.suggested_filename
    assert re.fullmatch(r"names_[\w.-]+_\d{14}\.json", file)  # no older download has this name
    assert names["groups"] == GROUPS
    assert names["names"]["3"] == "road"
    assert names["merge"] == [[1, 2]]
    assert page.inner_text("#command") == f"smooseg name --run 'runs/it'\\''s' --file ~/Downloads/{file}"
    set_slider(page, "#groups", GROUPS + 1)
    assert page.inner_text("#command").startswith(f"smooseg choose --run 'runs/it'\\''s' --groups {GROUPS + 1}\n")
    set_slider(page, "#groups", GROUPS)
    page.click("#unmerge")
    set_slider(page, "#groups", GROUPS)
    assert page.locator("#group-list > li").count() == GROUPS


def focused(page):
    """Find what has the keyboard, once the page is drawn again."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")
    return page.evaluate("document.activeElement.dataset.key")


def test_the_keyboard_stays_in_the_list_of_groups(page):
    set_slider(page, "#groups", GROUPS)
    page.locator("[data-key=show-2]").press("Space")
    assert focused(page) == "show-2"
    page.locator("[data-key=show-2]").press("Space")
    page.fill("[data-key=name-2]", "  tree\u00a0\u200e\U0001f469\u200d\U0001f9b0 \x07")
    page.keyboard.press("Tab")
    assert focused(page) == "merge-2"
    assert page.input_value("[data-key=name-2]") == "tree \U0001f469\u200d\U0001f9b0"  # its joiner stays
    page.fill("[data-key=name-1]", "tree \U0001f469\u200d\U0001f9b0")
    page.keyboard.press("Tab")
    assert focused(page) == "merge-1"
    assert "give them different names" in page.inner_text("#notice")
    assert page.input_value("[data-key=name-1]") == ""
    page.locator("[data-key=merge-2]").focus()
    page.select_option("[data-key=merge-2]", "1")
    assert focused(page) == "name-1"
    assert not page.locator("#notice").is_visible()
    page.locator("[data-key=apart-1]").press("Enter")
    assert focused(page) == "name-1"
    page.fill("[data-key=name-2]", "")
    page.keyboard.press("Enter")
    assert page.locator("#group-list > li").count() == GROUPS


def test_the_table_of_classes_follows_the_number_of_groups(page):
    page.click("#tab-labels")

    def rows():
        page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))")
        body = page.locator("#confusion tbody tr").all()
        return {row.locator("th").inner_text(): row.locator("td").all_inner_texts() for row in body}

    set_slider(page, "#groups", GROUPS)
    assert list(rows().values())[1] == ["", "60 %", "40 %", "<b>road</b>"]
    for groups in (2, 1):
        set_slider(page, "#groups", groups)
        fine, coarse = TREE.cut(GROUPS), TREE.cut(groups)
        sums = np.zeros((groups, 3))
        for k in range(GROUPS):
            sums[coarse[fine == k][0]] += CONFUSION[k]
        shares = np.round(100 * sums / sums.sum(1, keepdims=True))
        got = [[int(cell[:-2] or 0) for cell in row[:3]] for row in rows().values()]
        np.testing.assert_allclose(got, shares, atol=1)
    set_slider(page, "#groups", K)
    assert len(rows()) == GROUPS
    assert f"stays at {GROUPS} groups" in page.inner_text("#confusion")
    set_slider(page, "#groups", GROUPS)
    page.click("#tab-images")


def test_nothing_scrolls_sideways_on_a_phone(page):
    size = page.viewport_size
    page.set_viewport_size({"width": 360, "height": 740})
    for part in ("tree", "labels", "settings", "figures", "images"):
        if page.locator(f"#tab-{part}").count():
            page.click(f"#tab-{part}")
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, part
            assert page.evaluate("document.getElementById('tree').scrollWidth") <= 360
    page.locator("#tiles button").first.click()
    assert page.evaluate("document.getElementById('viewer').scrollWidth") <= 360
    page.keyboard.press("Escape")
    page.set_viewport_size(size)


def test_thousands_of_images_join_the_list_as_one_scrolls(shown, tmp_path):
    page, (tile, *_), complaints = shown
    header = Atlas(GROUPS, K, TREE.cut(GROUPS), []).header()
    count, path = 700, tmp_path / "report.html"
    about = Tiny("many", "run", "-runs/a b", GROUPS, count, header)
    path.write_text(page_html(about, [tile | {"name": f"{number:04d}.png"} for number in range(count)]))
    other = page.context.browser.new_page()
    other.goto(path.as_uri())
    other.wait_for_selector("#tiles canvas[data-groups]")
    assert other.text_content("#command").startswith("smooseg name --run './-runs/a b' --file ~/Downloads/names_many_")
    assert other.inner_text("#count") == "700 images"
    assert other.locator("#tiles li").count() == 300
    other.locator("#tiles button").nth(299).focus()
    other.keyboard.press("ArrowRight")
    assert other.evaluate("document.activeElement.innerText.trim()") == "0300.png"
    other.evaluate("scrollTo(0, document.documentElement.scrollHeight)")
    other.wait_for_function("() => document.querySelectorAll('#tiles li').length === 700")
    other.fill("#search", "0699")
    assert other.locator("#tiles li").count() == 1
    assert other.inner_text("#count") == "1 of 700 images found"
    other.close()
    assert complaints == []
