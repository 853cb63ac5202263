"""How a segmenter shows itself and its labels in a notebook."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..datasets.base import IGNORE
from ..datasets.reading import Picture
from .colours import table_of
from .names import Group, as_hex

SHOWN_PIXELS = 1600  # of the long side: beyond this, pictures are shown smaller
GAP, LINE, SWATCH = 8, 24, 16  # pixels between pictures, of a line of the legend and of its colour
FILL = 0.5  # share of a group's colour in its pixels
PAPER, INK = (255, 255, 255), (29, 33, 38)


class Displayed:
    """Gives a `Segmenter` its methods for notebooks."""

    def show(self: Any, image: Any, **options: Any) -> Image.Image:
        """Draw an image next to its labels, and below them the groups that it has, the largest first.

        Args:
            image: whatever `predict` takes.
            options: those of `predict`.

        Returns:
            A Pillow image, which a notebook displays; each picture in it has a long side of at most 1,600 pixels.

        Raises:
            UserError: where `predict` raises it.
        """
        picture = self.picture(image)
        return drawn(picture, self.predict(picture, **options), self.groups)

    def _repr_html_(self: Any) -> str:
        """Its groups, backbone and figures, as a notebook displays them. Names are escaped."""
        facts = " · ".join(escape(fact) for fact in facts_of(self))
        rows = "".join(map(row_of, self.groups))
        head = "<tr><th></th><th></th><th style='text-align:left'>group</th><th>share</th></tr>"
        return f"<div><b>{len(self.groups)} groups</b> · {facts}<table>{head}{rows}</table></div>"


def facts_of(segmenter: Any) -> Iterator[str]:
    """Lines of a segmenter's backbone, training and figures, for people."""
    config, report = segmenter.config, segmenter.checkpoint.report
    yield f"backbone {segmenter.backbone.name} on {segmenter.backbone.device}"
    yield f"{segmenter.checkpoint.step} steps, {config.sides[1]} pixels"
    if isinstance(report.get("images"), int):
        yield f"learnt from {report['images']} images"
    health, scores = report.get("health"), report.get("scores")
    if isinstance(health, dict) and isinstance(health.get("perplexity"), float):
        yield f"perplexity {health['perplexity']:.1f}"
    if isinstance(scores, dict) and isinstance(scores.get("hungarian"), dict):
        figures = {name: scores["hungarian"].get(name) for name in ("accuracy", "miou")}
        yield from (f"{name} {value:.1%}" for name, value in figures.items() if isinstance(value, float))
    if segmenter.path is not None:
        yield str(segmenter.path)


def row_of(group: Group) -> str:
    """A group as a row of an HTML table."""
    swatch = f"<span style='display:inline-block;width:1em;height:1em;background:{as_hex(group.colour)}'></span>"
    share = "" if group.share is None else f"{group.share:.1%}"
    name = f"<td style='text-align:left'>{escape(group.name)}</td>"
    return f"<tr><td>{swatch}</td><td>{group.number}</td>{name}<td>{share}</td></tr>"


def drawn(picture: Picture, labels: np.ndarray, groups: Sequence[Group]) -> Image.Image:
    """A picture, its labels uint8 [H,W] laid over it, and a legend of the groups in it."""
    small = Image.fromarray(picture.pixels)
    small.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    numbers = np.asarray(Image.fromarray(labels).resize(small.size, Image.Resampling.NEAREST))
    pixels, colours = np.asarray(small), table_of({group.number: group.colour for group in groups})
    filled = np.rint((1 - FILL) * pixels + FILL * colours[numbers]).astype(np.uint8)
    filled[numbers == IGNORE] = PAPER
    counts = np.bincount(labels.ravel(), minlength=256)
    present = sorted((group for group in groups if counts[group.number]), key=lambda group: -counts[group.number])
    with_data = max(1, int(counts[:IGNORE].sum()))
    width, height = small.size
    sheet = Image.new("RGB", (2 * width + GAP, height + GAP + LINE * len(present)), PAPER)
    sheet.paste(small, (0, 0))
    sheet.paste(Image.fromarray(filled), (width + GAP, 0))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(SWATCH)
    for place, group in enumerate(present):
        top = height + GAP + LINE * place
        draw.rectangle((0, top, SWATCH, top + SWATCH), fill=group.colour)
        text = f"{group.name}  {counts[group.number] / with_data:.1%}"
        draw.text((SWATCH + GAP, top + SWATCH // 2), text, fill=INK, font=font, anchor="lm")
    return sheet
