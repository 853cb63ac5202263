"""`smooseg choose`: choose which head of a run predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .command import pictures_of, predict_command, run
from .config import Seed
from .errors import UserError
from .system.commandline import parse
from .system.fields import Value
from .system.files import write_atomic

if TYPE_CHECKING:
    from .segment.checkpoint import Checkpoint


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
    from .learn.runfolder import CHECKPOINT, HEADS, REPORT
    from .segment.checkpoint import read_checkpoint

    out = Path(config.run).expanduser()
    if not (out / REPORT).is_file():
        raise UserError(f"--run {out}: holds no finished run; give the --out folder of training")
    files = sorted((out / HEADS).glob("*.safetensors"))
    if not files:
        more = "train with several values of --granularity or with --heads to have a choice"
        raise UserError(f"--run {out}: has one head only; {more}")
    if config.granularity is None and config.seed is None:
        raise UserError(f"--granularity or --seed: missing; the heads are {', '.join(file.stem for file in files)}")
    now = read_checkpoint(out / CHECKPOINT)
    granularity = granularity_of(now) if config.granularity is None else config.granularity
    seed = now.config.seed if config.seed is None else config.seed
    for file in files:
        head = read_checkpoint(file)
        if (as_typed(granularity_of(head)), head.config.seed) == (as_typed(granularity), seed):
            break
    else:
        asked = f"--seed {seed}" if granularity is None else f"--granularity {granularity:g} with seed {seed}"
        raise UserError(f"{asked}: no such head; there are {', '.join(file.stem for file in files)}")
    write_atomic(out / CHECKPOINT, file.read_bytes())
    print(f"{out / CHECKPOINT} is now {file.stem}; the others stay in {out / HEADS}")
    images, predictions = pictures_of(head.config.data, out), out / f"predictions_{file.stem}"
    print("next       " + predict_command(out / CHECKPOINT, images, predictions, head.backbone_name))


def granularity_of(checkpoint: Checkpoint) -> float | None:
    return None if checkpoint.config.granularity is None else checkpoint.config.granularity[0]


def as_typed(granularity: float | None) -> str | None:
    """The number as files and lines show it, which is what a user types."""
    return None if granularity is None else f"{granularity + 0.0:g}"


if __name__ == "__main__":
    sys.exit(run(main))
