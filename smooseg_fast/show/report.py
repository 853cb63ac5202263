"""The page `report.html`: one file that shows images, groups, their tree and the figures of a run or of predictions.

The file loads nothing: its script and style are inside, and a Content-Security-Policy allows that script alone, by its
hash. Everything that comes from outside, such as file names, is data in one JSON block, in which no character could end
the block, and is put into the page as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..segment.checkpoint import Checkpoint
from ..segment.colours import palette
from ..segment.names import UNNAMED, as_hex
from ..system.files import finite, write_atomic
from . import report_sections as sections
from .report_tiles import MOST_TILES, fitted

PAGE = "report.html"
TEMPLATE, STYLE, SCRIPTS = "page.html", "page.css", ("page.js", "page.parts.js")  # next to this module
ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


@dataclass(frozen=True)
class Page:
    """The content of a page, apart from the tiles.

    Attributes:
        title: the name of the run or the folder.
        kind: "run" or "predictions".
        run: the folder of the run, for the commands to type; None where it is not known.
        groups: the number of groups before merging.
        images: the number of images that tiles stand for.
        header: the first line of the file of tiles.
        checkpoint: the one that made the labels; None where it is gone, and with it tree and settings.
        report: figures, as in report.json.
        naming: names, colours and merges by fine groups, as JSON, where there is no checkpoint.
        skipped: images that could not be used, and why.
        times: (what, seconds).
        left_out: why tiles may be fewer than images.
    """

    title: str
    kind: str
    run: str | None
    groups: int
    images: int
    header: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    naming: Mapping[str, Any] = field(default_factory=lambda: UNNAMED.as_json())
    skipped: Any = None
    times: Sequence[tuple[str, float]] = ()
    left_out: str = "to bound the size of this page"

    def data(self, tiles: int) -> dict[str, Any]:
        """Everything for the script of the page but the tiles, ready for JSON."""
        checkpoint, fine = self.checkpoint, None if self.checkpoint is None else self.checkpoint.fine
        usable = fine is not None and self.header.get("fine") == len(fine.tree) and checkpoint is not None
        least = 0.0 if checkpoint is None else checkpoint.share
        return {
            "title": self.title,
            "kind": self.kind,
            "run": self.run,
            "groups": self.groups,
            "images": self.images,
            "tiles_left_out": max(0, self.images - tiles),
            "left_out": self.left_out,
            "planes": self.header.get("planes", 1),
            "own_groups": self.header.get("groups"),
            "own_merge": self.header.get("merge", []),
            "least_share": least,
            "tree": sections.tree_section(fine, least) if usable and fine is not None else None,
            "why": sections.why_section(self.report),
            "shares": checkpoint.shares if checkpoint is not None and self.kind == "run" else None,
            "colours": [as_hex(tuple(colour)) for colour in palette(256).tolist()],
            "naming": self.naming if checkpoint is None else checkpoint.naming.as_json(),
            "figures": sections.figure_rows(self.report),
            "scores": sections.label_section(self.report.get("scores")),
            "settings": [] if checkpoint is None else sections.setting_rows(checkpoint.config, checkpoint),
            "times": [[name, round(seconds, 2)] for name, seconds in self.times],
            "skipped": sections.skipped_rows(self.skipped),
        }


def embedded(value: Any) -> str:
    """`value` as JSON for a block inside a page: nothing in it can end the block or begin a comment."""
    return json.dumps(finite(value), separators=(",", ":")).translate(ESCAPES)


def page_html(page: Page, tiles: Sequence[dict[str, Any]]) -> str:
    """The whole page. Shows at most MOST_TILES tiles, evenly spaced, with their pictures shrunk to fit."""
    if len(tiles) > MOST_TILES:
        tiles = [tiles[place * len(tiles) // MOST_TILES] for place in range(MOST_TILES)]
    folder = files(__package__)
    template, style, *scripts = (
        folder.joinpath(name).read_text(encoding="utf-8") for name in (TEMPLATE, STYLE, *SCRIPTS)
    )
    script = "\n".join(scripts)
    lines = ",\n".join(map(embedded, fitted(tiles)))
    parts = {
        "STYLE_HASH": sha256(style),
        "SCRIPT_HASH": sha256(script),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": f'{{"page":{embedded(page.data(len(tiles)))},\n"tiles":[{lines}]}}',
    }
    pieces = template.split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))


def sha256(text: str) -> str:
    """The hash of an inline script or style, as a Content-Security-Policy has it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def write_page(path: Path, page: Page, tiles: Sequence[dict[str, Any]]) -> Path:
    """Write the page. WriteError when the file cannot be written."""
    return write_atomic(path, page_html(page, tiles))


def run_page(run: Path, checkpoint: Checkpoint, header: Mapping[str, Any], report: Mapping[str, Any]) -> Page:
    """The page of a finished run in the folder `run`; header: the first line of its tiles; report: its report.json."""
    return Page(
        title=run.resolve().name,
        kind="run",
        run=str(run),
        groups=checkpoint.groups or checkpoint.trained,
        images=header.get("images", 0),
        header=header,
        checkpoint=checkpoint,
        report=report,
        skipped=report.get("skipped"),
        times=header.get("times", ()),
        left_out="so that this page takes at most a tenth of the run's time; smooseg predict makes a page of all",
    )
