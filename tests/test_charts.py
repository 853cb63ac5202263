"""Contents of charts: outlined cells, shares as colours, curves of what was recorded alone."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.text import Text
from test_pictures import NASTY_NAMES, boxes, rgb

from smooseg_fast.measure.scores import hungarian, majority
from smooseg_fast.segment.colours import palette
from smooseg_fast.show import charts
from smooseg_fast.show.charts import confusion_picture, curves_picture


def outlined(picture):
    return len(boxes(picture, rgb(charts.MARK)))


def shade(share):
    """The colour of a share, as matplotlib has it."""
    return colormaps[charts.SHADES](share, bytes=True)[:3]


@pytest.mark.parametrize(("K", "C"), [(1, 3), (3, 3), (3, 1), (27, 27), (64, 27), (5, 40), (150, 2)])
def test_confusion_picture_outlines_what_counts_as_right(K, C):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 40, (K, C))
    counts[np.arange(min(K, C)), rng.permutation(C)[: min(K, C)]] += 1000
    for scores in (hungarian(counts), majority(counts)):
        picture = confusion_picture(counts, scores, [NASTY_NAMES[c % 6] for c in range(C)])
        assert outlined(picture) == sum(c >= 0 for c in scores.mapping)
        pixels = np.asarray(picture)
        assert (pixels[:, -20:] == 255).all()
        assert (pixels[:, :20] == 255).all()


def test_confusion_picture_colours_cells_by_share():
    counts = np.array([[10, 40], [30, 0]])  # cluster 1 is class 0 (75 %), cluster 0 is class 1 (100 %)
    picture = confusion_picture(counts, hungarian(counts), ["sky", "road"])
    first, second = sorted(boxes(picture, rgb(charts.MARK)))[:2]
    pixels = np.asarray(picture)
    inside = {
        (row, column): pixels[y[0] + 4, x[1] + 4]
        for row, y in enumerate((first, second))
        for column, x in enumerate((first, second))
    }
    for cell, share in {(0, 0): 0.75, (1, 1): 1.0, (0, 1): 0.25, (1, 0): 0.0}.items():  # a row is a class
        np.testing.assert_allclose(inside[cell], shade(share), atol=1)
    assert second[1] > first[1]  # the columns follow the classes


def test_confusion_picture_has_every_name_and_number(monkeypatch):
    """Rows of 25, 75 and 100 %, in cells large enough for numbers; 0 % stays empty."""
    figures, rendered = [], charts.rendered
    monkeypatch.setattr(charts, "rendered", lambda figure, **o: figures.append(figure) or rendered(figure, **o))
    counts = np.array([[10, 40, 0], [30, 0, 0], [0, 0, 0]])
    confusion_picture(counts, hungarian(counts), ["sky", "road", "sea"])
    written = [text.get_text() for text in figures[0].findobj(Text) if text.get_visible()]
    assert {"sky", "road", "sea", "25", "75", "100", "0", "1", "2", "50.0", "75.0", "80.0"} <= set(written)
    assert "groups, those without a class on the right" in written
    assert "Hungarian matching:  accuracy 87.5 %,  mean IoU 77.5 %,  80 labelled pixels" in written
    assert written.count("0") == 1  # the number of a group, and no share


def test_confusion_picture_of_absent_classes_and_nothing():
    counts = np.array([[5, 0], [3, 0]])
    assert outlined(confusion_picture(counts, hungarian(counts), ["a", "b"])) == 1
    empty = np.zeros((2, 3), int)
    assert outlined(confusion_picture(empty, hungarian(empty), ["a", "b", "c"])) == 0


def test_curves_draw_only_what_was_recorded():
    records = [{"step": i, "loss": 1 / (i + 1), "gone": None, "share": 0.5} for i in range(30)]
    one = curves_picture(records, {"loss": ["loss", "never"]})
    assert one.size == curves_picture(records, {"loss": ["loss"], "empty": ["gone", "never"]}).size
    assert np.array_equal(
        one, curves_picture(records, {"loss": ["loss"], "empty": ["gone"]})
    )  # nothing of the absent keys
    two = curves_picture(records, {"loss": ["loss"], "shares": ["share"]})
    assert two.width == 2 * one.width
    assert (np.asarray(one) == palette(1)[0]).all(-1).sum() > 100  # the curve itself
    assert curves_picture(records, {"loss": ["loss"]}, "title").height > one.height


def test_curves_at_the_edges():
    blank = curves_picture([], {"loss": ["loss"]}, "nothing")
    assert (np.asarray(blank) != 255).any()
    single = curves_picture([{"step": 7, "loss": 0.0}], {"a $x_": ["loss"]}, NASTY_NAMES[2])
    assert (np.asarray(single) == palette(1)[0]).all(-1).any()
    gaps = [{"step": i, "loss": float("nan") if i % 3 else 1.0, "gone": float("inf")} for i in range(9)]
    assert (np.asarray(curves_picture(gaps, {"all": ["loss", "gone"]})) == palette(1)[0]).all(-1).any()


def test_matplotlib_comes_late_and_without_pyplot():
    code = (
        "import sys, numpy as np; from smooseg_fast.show import charts as c, overlays\n"
        "from smooseg_fast.segment.colours import palette\n"
        "i = np.zeros((4, 4, 3), np.uint8); overlays.overlay(i, i[..., 0], palette(30))\n"
        "assert 'matplotlib' not in sys.modules\n"
        "c.curves_picture([{'step': 1, 'a': 1.0}], {'a': ['a']}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
