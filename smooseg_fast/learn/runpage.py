"""The page of a run: its training images as tiles, labelled from their cached features, without the backbone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..datasets.images import ImageError
from ..errors import UserError
from ..features.sample import evenly_spaced
from ..segment.checkpoint import read_checkpoint
from ..segment.segmenter import Segmenter
from ..show.report import PAGE, run_page, write_page
from ..show.report_tiles import MOST_TILES, TILES, Atlas, allowance, read_tiles
from ..system.ahead import ahead
from ..system.files import regular, write_atomic
from .groupspicture import redraw
from .runfolder import CHECKPOINT, REPORT
from .setting import Setting
from .tiler import Tiler, cutting_of

SHARE_OF_TIME, LEAST_IMAGES = 0.055, 12  # of the run so far that pictures and tiles may take; images shown in any case
THREADS = 2  # that make tiles


def tiles_of(
    setting: Setting, segmenter: Segmenter, known: Mapping[str, dict[str, Any]], started: float
) -> Iterator[dict[str, Any]]:
    """Tiles of the training images: those that are `known`, and others in the order of `spread`, until SHARE_OF_TIME of
    the run before `started` has passed since then."""
    tiler = Tiler(setting.store, cutting_of(setting), segmenter)
    until = started + SHARE_OF_TIME * (started - setting.started)
    names, numbers = list(tiler.rows), {name: number for number, name in enumerate(setting.dataset.names)}
    count = min(len(names), MOST_TILES)
    chosen = [names[place] for place in evenly_spaced(len(names), count).tolist()]
    yield from (known[name] for name in chosen if name in known)
    todo = [chosen[place] for place in spread(count) if chosen[place] not in known]

    def tile(name: str) -> dict[str, Any] | None:
        with suppress(ImageError):  # gone since its features were taken
            image = tiler.prepared(name, setting.dataset.picture(numbers[name]), allowance(count))
            return tiler.tile(image, allowance(count))
        return None

    made = count - len(todo)
    with closing(ahead(tile, todo, threads=THREADS, waiting=2 * THREADS)) as tiles:
        for one in tiles:
            if one is not None:
                yield one
                made += 1
            if made >= LEAST_IMAGES and time.perf_counter() > until:
                return


def spread(count: int) -> list[int]:
    """0 to count - 1, so that those up to any one are spread over all: by the bits of the number, last one first."""
    bits = max(1, (count - 1).bit_length())
    order = [int(f"{number:0{bits}b}"[::-1], 2) for number in range(1 << bits)]
    return [number for number in order if number < count]


def write_run_page(
    setting: Setting,
    segmenter: Segmenter,
    report: dict[str, Any],
    known: Mapping[str, dict[str, Any]],
    started: float,
) -> Path:
    """Write the tiles and the page of a run into its folder. known: tiles of some of its images, by their names;
    started: `time.perf_counter()` when its pictures began."""
    assert setting.folder is not None
    by_name = {tile["name"]: tile for tile in tiles_of(setting, segmenter, known, started)}
    tiles = [by_name[name] for name in dict.fromkeys(setting.store.names) if name in by_name]
    times = [
        ["the run up to its pictures", round(started - setting.started, 2)],
        ["pictures and this page", round(time.perf_counter() - started, 2)],
    ]
    header = Atlas.of(segmenter).header() | {"images": len(set(setting.store.names)), "times": times}
    out = setting.folder.path
    write_atomic(out / TILES, "".join(json.dumps(line) + "\n" for line in (header, *tiles)))
    return write_page(out / PAGE, run_page(out, segmenter.checkpoint, header, report), tiles)


def write_page_of_run(folder: Path, out: Path) -> None:
    """Write the page of a finished run from its checkpoint, its report and the tiles that training left. UserError
    where they are not there."""
    try:
        report = json.loads(regular(folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--run {folder}: holds no finished run; give the --out folder of training") from error
    header, tiles = read_tiles(folder / TILES)
    if not header or not isinstance(report, dict):
        advice = "run the same smooseg train again, which writes it"
        raise UserError(f"--run {folder}: holds no {TILES} that can be read; remove {PAGE} and {advice}")
    write_page(out, run_page(folder, read_checkpoint(folder / CHECKPOINT), header, report), list(tiles.values()))


def refreshed(folder: Path) -> list[str]:
    """Draw groups.png and the page of a run again after its names or its number of groups changed -> the files that
    were drawn, where training left what they are made of."""
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    files = [path for path in [redraw(folder, checkpoint)] if path is not None]
    if (folder / TILES).exists():
        write_page_of_run(folder, folder / PAGE)
        files.append(folder / PAGE)
    return [str(path) for path in files]
