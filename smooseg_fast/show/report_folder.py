"""The page of a folder of predictions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..datasets.images import ImageError
from ..datasets.reading import Reading
from ..errors import UserError
from ..segment.checkpoint import read_checkpoint
from ..segment.names import UNNAMED, as_hex, read_groups
from ..system.files import regular
from .predictions import GROUPS, SHARES, Item, Predictions, reduced
from .report import PAGE, Page, write_page
from .report_tiles import TILES, read_tiles
from .streamed import shown_of


def write_folder_page(
    folder: Predictions, done: Sequence[Item], reading: Reading, times: Sequence[tuple[str, float]]
) -> Path:
    """Write the page of a folder whose shares.json is written; images without a tile get one from their masks."""
    tiles = folder.tiles
    assert tiles is not None
    known = set(read_tiles(tiles.path)[1])
    for item in done:
        if item.name not in known:
            with suppress(ImageError):  # removed or damaged since
                tiles.add(item.name, *reduced(*shown_of(item, folder.mask(item), reading)), None)
    return write_page_of(folder.path, folder.path / PAGE, times)


def write_page_of(folder: Path, out: Path, times: Sequence[tuple[str, float]] = ()) -> Path:
    """Write the page of a folder of predictions from its tiles, without its images. UserError where they are not there,
    WriteError when the file cannot be written."""
    try:
        shares = json.loads(regular(folder / SHARES).read_text(encoding="utf-8"))
        images = {**shares["images"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"--predictions {folder}: holds no {SHARES} that can be read; run smooseg predict again"
        ) from error
    header, tiles = read_tiles(folder / TILES)
    if not header:
        raise UserError(f"--predictions {folder}: holds no {TILES} that can be read; run smooseg predict again")
    page = folder_page(folder, shares, header, times)
    return write_page(out, page, [tiles[name] for name in images if name in tiles])


def folder_page(
    folder: Path, shares: Mapping[str, Any], header: Mapping[str, Any], times: Sequence[tuple[str, float]]
) -> Page:
    """shares: the content of shares.json; header: that of the tiles."""
    model = shares.get("model") or {}
    place, checkpoint, run = model.get("checkpoint"), None, None
    if isinstance(place, str):
        with suppress(UserError):  # gone, or published
            known = read_checkpoint(place)
            fine = 0 if known.fine is None else len(known.fine.tree)
            checkpoint = known if fine == header["fine"] and (fine or known.trained == header["groups"]) else None
            run = str(Path(place).parent)
    return Page(
        title=folder.resolve().name,
        kind="predictions",
        run=run,
        groups=header["groups"],
        images=len(shares["images"]),
        header=header,
        checkpoint=checkpoint,
        naming=naming_of(folder, header),
        report=model,
        skipped=shares.get("skipped"),
        times=times,
    )


def naming_of(folder: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """The names, colours and merges that a folder keeps, for a page without a checkpoint."""
    naming = UNNAMED.as_json() | {"merges": header["merge"]}
    with suppress(UserError):
        for group in read_groups(folder / GROUPS):
            part = next((numbers for numbers in header["merge"] if group.number in numbers), [group.number])
            naming["colours"].append([part, as_hex(group.colour)])
            if group.name != f"group {group.number}":
                naming["names"].append([part, group.name])
    return naming
