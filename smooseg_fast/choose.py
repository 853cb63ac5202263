"""`smooseg choose`: choose how many groups a run has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from .command import counted, finished_run, naming_line, pictures_of, predict_command, run
from .config import CLOSENESS, GROUPS, SHARE
from .errors import UserError
from .system.commandline import parse
from .system.fields import Bounds, Value
from .system.files import sweep
from .system.outfolder import held


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """Cut the tree of a finished run elsewhere: predict and evaluate then use that number of groups. Nothing is learnt,
    and any earlier number can be chosen again."""

    run: Annotated[str, Value("FOLDER", usual=True)]
    """Folder of a finished run."""
    groups: Annotated[int | None, Bounds(1, GROUPS), Value("N", usual=True)] = None
    """Number of groups."""
    cut: Annotated[float | None, CLOSENESS] = None
    """Height of the cut in tree.png instead: groups merge where their mean closeness exceeds it."""
    share: Annotated[float, SHARE] = 0.0
    """Least share of the area that a group needs; smaller parts join their nearest group. Without --groups and
    --cut, all groups that have this share."""


def main(args: Sequence[str]) -> None:
    config = parse(ChooseConfig, args, "choose")
    from .learn import runfolder as names
    from .learn.runpage import refreshed
    from .segment.checkpoint import read_checkpoint
    from .segment.names import NAMES
    from .show import pictures
    from .show.tree import tree_picture

    out = finished_run(config.run)
    if config.groups is not None and config.cut is not None:
        raise UserError("--groups: give either it or --cut, not both")
    if config.groups is None and config.cut is None and not config.share:
        raise UserError("--groups: missing; give it, or --cut with a height of tree.png, or --share")
    with held(out, "--run"):
        sweep(out)
        before = read_checkpoint(out / names.CHECKPOINT)
        checkpoint = before.at(config.groups, config.cut, config.share)
        checkpoint.write(out / names.CHECKPOINT)
        if (out / NAMES).exists():
            checkpoint.names.write(out / NAMES)
        pictures.save(out / names.TREE, tree_picture(checkpoint, str(out)))
        shown = [str(out / names.TREE), *refreshed(out)]
    now = checkpoint.groups or checkpoint.trained
    print(f"{out / names.CHECKPOINT} has {counted(checkpoint)} now; it had {counted(before).replace(' groups', '')}")
    print(f"look at    {', '.join(shown)}")
    given, hold = len(before.names.names), len(checkpoint.names.names)
    if given or hold:
        print(f"names      {hold} hold now, {given} did before; a name stays where its group does not split or merge")
    print(naming_line(out, checkpoint))
    images, predictions = pictures_of(checkpoint.config.data, out), out / f"predictions_{now}"
    print("next       " + predict_command(out / names.CHECKPOINT, images, predictions, checkpoint.backbone_name))


if __name__ == "__main__":
    sys.exit(run(main))
