"""The picture of the tree of groups: shares, typical patches, heights, and the cut."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from ..segment.checkpoint import Checkpoint, Fine
from ..segment.tree import Tree
from .lettering import write
from .pictures import GREY, INK, MARGIN, PAPER, TEXT, WIDTH

ROWS = 24  # shown at most, or as many as there are groups: the tree goes on inside a row
ROW, PATCH, PATCHES = 46, 40, 8  # pixels of a row and of a patch; patches in a row
TOP, AXIS = 146, 40  # pixels above the axis of heights, and of the axis
LEFT, RIGHT = MARGIN, 790  # pixels where the tree begins, and where its rows do
SHARE = WIDTH - MARGIN - 350  # pixels where the shares begin
RULE = "#d9dde1"


class Split(NamedTuple):
    """Group `number` leaves group `parent`, which keeps its own number, where the tree is cut above `height`."""

    number: int
    parent: int
    height: float


def tree_picture(checkpoint: Checkpoint, title: str) -> Image.Image:
    """Draw the tree of a checkpoint, root on the left, a row for each group of a finer cut, and the cut in use.

    Branches inside a group have its colour, and others are grey; merged groups have one colour. Heights are the numbers
    of --cut.
    """
    if checkpoint.fine is None:
        raise ValueError("the checkpoint has no tree")
    tree, groups, least = checkpoint.fine.tree, checkpoint.groups or checkpoint.trained, checkpoint.share
    count = min(len(tree.splits(least)) + 1, max(groups, min(ROWS, 2 * groups + 4)))
    rows, coarse = tree.cut(count, least_share=least), tree.cut(groups, least_share=least)
    names, listed = checkpoint.names, {group.number: group for group in checkpoint.listed}
    group_of = [int(coarse[rows == number][0]) for number in range(count)]  # of every row
    splits, order = splits_of(tree, count, least), [0]
    for split in splits:
        order.insert(order.index(split.parent) + 1, split.number)
    sheet = Image.new("RGB", (WIDTH, TOP + AXIS + ROW * count + MARGIN), PAPER)
    draw, colours = ImageDraw.Draw(sheet), [listed[int(number)].colour for number in names.table[:groups]]
    write(draw, (MARGIN, MARGIN + 17), title, 28, INK, bold=True, room=WIDTH - 2 * MARGIN)
    why = (checkpoint.report.get("tree") or {}).get("why", "")
    chosen = why if groups == checkpoint.trained else f"the run ended with {checkpoint.trained}"
    about = f"{groups} groups of {len(tree)} fine ones" + (f", each at least {100 * least:g} %" if least else "")
    about += f", {chosen}" if chosen else ""
    write(draw, (MARGIN, MARGIN + 56), about, TEXT, GREY, room=WIDTH - 2 * MARGIN)
    middles = {number: TOP + AXIS + ROW * place + ROW // 2 for place, number in enumerate(order)}
    draw_branches(draw, splits, middles, groups, [colours[group] for group in group_of])
    bands = [group_of[number] for number in order]
    for place, number in enumerate(order):
        group, top = group_of[number], TOP + AXIS + ROW * place
        draw.rectangle((RIGHT, top + (bands[:place][-1:] != [group]), RIGHT + 8, top + ROW - 1), fill=colours[group])
        draw_row(sheet, draw, (RIGHT + 24, top), np.flatnonzero(rows == number), checkpoint.fine)
        share, text = tree.shares[rows == number].sum(), ""
        if bands[:place][-1:] != [group]:
            one = listed[int(names.table[group])]
            about = one.name if one.caption.isdigit() else one.caption
            text = f"{about}: {100 * (one.share or 0):.0f} %" if one.number == group else f"{group}, in {one.caption}"
            draw.line((RIGHT, top, WIDTH - MARGIN, top), fill=RULE)
        draw.rectangle((SHARE, top + 14, SHARE + max(1, round(100 * share / largest(tree, rows))), top + 31), fill=RULE)
        write(draw, (SHARE + 4, top + ROW // 2), f"{100 * share:.1f} %", 14, GREY, room=90)
        write(draw, (SHARE + 120, top + ROW // 2), text, TEXT, INK, bold=True, room=230)
    return sheet


def largest(tree: Tree, rows: np.ndarray) -> float:
    """The share of the largest row."""
    return float(np.bincount(rows, tree.shares).max())


def splits_of(tree: Tree, count: int, least_share: float = 0.0) -> list[Split]:
    """The splits that lead from one group to `count` of at least this share, in their order."""
    splits, before = [], tree.cut(1)
    for number, merge in enumerate(tree.splits(least_share)[: count - 1], 1):
        after = tree.cut(number + 1, least_share=least_share)
        splits.append(Split(number, int(before[after == number][0]), float(tree.heights[merge])))
        before = after
    return splits


def draw_branches(
    draw: ImageDraw.ImageDraw, splits: list[Split], middles: dict[int, int], groups: int, colours: list[tuple[int, ...]]
) -> None:
    """Draw the tree from its leaves, at `middles` (pixels from the top) of their rows, to the root; then the axis."""
    heights = [split.height for split in splits]
    low, high = (min(heights), max(heights)) if heights else (0.0, 1.0)
    room = RIGHT - LEFT - 60

    def x(height: float) -> int:
        return LEFT + 20 + round(room * (height - low) / max(high - low, 1e-9))

    top, bottom = TOP + AXIS - 6, max(middles.values()) + ROW // 2
    for tick in ticks(low, high):
        draw.line((x(tick), top, x(tick), bottom), fill="#eef0f2")
        write(draw, (x(tick) - 14, TOP + 14), f"{tick:g}", 14, GREY, room=60)
    write(draw, (LEFT, TOP - 12), "height of the merge, as in --cut", 14, GREY, room=400)
    at, ends = dict(middles), dict.fromkeys(middles, RIGHT)
    mixed = dict.fromkeys(middles, False)  # whether a branch holds several groups
    for split in reversed(splits):
        here, pair = x(split.height), (split.parent, split.number)
        above = split.number < groups
        for number in pair:
            ink = GREY if mixed[number] else colours[number]
            draw.line((here, at[number], ends[number], at[number]), fill=ink, width=3)
        draw.line((here, at[pair[0]], here, at[pair[1]]), fill=GREY if above else colours[split.parent], width=3)
        at[split.parent], ends[split.parent] = sum(at[number] for number in pair) // 2, here
        mixed[split.parent] |= above or mixed[split.number]
    draw.line((LEFT, at[0], ends[0], at[0]), fill=GREY if mixed[0] else colours[0], width=3)
    edges = [low, *heights, high + (high - low) / 40]
    cut = (x(edges[groups - 1]) + x(edges[groups])) // 2 if groups > 1 else LEFT + 8
    for start in range(top, bottom, 12):
        draw.line((cut, start, cut, min(start + 6, bottom)), fill=INK, width=2)
    write(draw, (max(LEFT + 250, cut - 30), TOP - 12), f"cut: {groups}", 14, INK, bold=True, room=120)


def ticks(low: float, high: float) -> list[float]:
    """Round heights about evenly spaced over the tree, at most ten."""
    step = next(size for size in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if (high - low) / size < 10)
    return [round(number * step, 4) for number in range(int(np.ceil(low / step)), int(high / step) + 1)]


def draw_row(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, place: tuple[int, int], members: np.ndarray, fine: Fine
) -> None:
    """Paste the typical patches of a row's fine groups, the largest first."""
    if fine.typical is None:
        return
    order = members[np.argsort(-fine.tree.shares[members], kind="stable")]
    for number, member in enumerate(order[:PATCHES]):
        patch = Image.fromarray(fine.typical[int(member)].numpy()).resize((PATCH, PATCH))
        left, top = place[0] + number * (PATCH + 4), place[1] + (ROW - PATCH) // 2
        sheet.paste(patch, (left, top))
        ImageDraw.Draw(sheet).rectangle((left, top, left + PATCH - 1, top + PATCH - 1), outline=RULE)
    if len(order) > PATCHES:
        room = place[0] + PATCHES * (PATCH + 4)
        write(draw, (room, place[1] + ROW // 2), f"+{len(order) - PATCHES}", 14, GREY, room=40)
