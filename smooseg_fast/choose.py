"""`smooseg choose`: choose which head of a run predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .command import pictures_of, predict_command, run
from .config import Seed, Thresholds, Variant
from .errors import UserError
from .system.commandline import parse
from .system.fields import Value
from .system.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """Make another head of a run the one that predict and evaluate use: its checkpoint.safetensors."""

    run: Annotated[str, Value("FOLDER", usual=True)]
    """Folder of a finished run with several heads."""
    granularity: float | None = None
    """Granularity of the head [that of the head in use]."""
    seed: Seed | None = None
    """Seed of the head [that of the head in use]."""


def main(args: Sequence[str]) -> None:
    config = parse(ChooseConfig, args, "choose")
    from .learn.runfolder import CHECKPOINT, HEADS, REPORT, head_file
    from .segment.checkpoint import read_checkpoint

    out = Path(config.run).expanduser()
    if not (out / REPORT).is_file():
        raise UserError(f"--run {out}: holds no finished run; give the --out folder of training")
    heads = ", ".join(sorted(file.stem for file in (out / HEADS).glob("*.safetensors")))
    if not heads:
        more = "train with several values of --granularity or with --heads to have a choice"
        raise UserError(f"--run {out}: has one head only; {more}")
    if config.granularity is None and config.seed is None:
        raise UserError(f"--granularity or --seed: missing; the heads are {heads}")
    (now,) = read_checkpoint(out / CHECKPOINT).config.variants()
    granularity, thresholds = config.granularity, now.thresholds
    if granularity is not None:
        thresholds = Thresholds(granularity + 0.0, granularity + 0.0, relative=True)
    chosen = Variant(now.seed if config.seed is None else config.seed, thresholds)
    file = head_file(out, chosen)
    if not file.is_file():
        raise UserError(f"--run {out}: has no head {chosen.name}; there are {heads}")
    head = read_checkpoint(file)
    write_atomic(out / CHECKPOINT, file.read_bytes())
    print(f"{out / CHECKPOINT} is now {file.stem}; the others stay in {out / HEADS}")
    images, predictions = pictures_of(head.config.data, out), out / f"predictions_{file.stem}"
    print("next       " + predict_command(out / CHECKPOINT, images, predictions, head.backbone_name))


if __name__ == "__main__":
    sys.exit(run(main))
