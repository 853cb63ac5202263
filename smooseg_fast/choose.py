"""`python -m smooseg_fast.choose`: which head of a run predicts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .command import parse, pictures_of, predict_command, run
from .errors import UserError
from .learn.runfolder import CHECKPOINT, HEADS, REPORT
from .segment.checkpoint import Checkpoint, read_checkpoint
from .system.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """Make another head of a run the one that predict and evaluate use: its checkpoint.safetensors."""

    run: str
    """The folder of a finished run with several heads."""
    granularity: float | None = None
    """Of the head [that of the head in use]."""
    seed: int | None = None
    """Of the head [that of the head in use]."""


def main(args: Sequence[str]) -> None:
    config = parse(ChooseConfig, args, prog="python -m smooseg_fast.choose")
    out = Path(config.run).expanduser()
    if not (out / REPORT).is_file():
        raise UserError(f"--run {out}: holds no finished run; give the --out folder of training")
    files = sorted((out / HEADS).glob("*.safetensors"))
    if not files:
        raise UserError(
            f"--run {out}: has one head only; train with several values of --granularity or with --heads to have a choice"
        )
    if config.granularity is None and config.seed is None:
        raise UserError(f"--granularity or --seed: missing; the heads are {', '.join(file.stem for file in files)}")
    now = read_checkpoint(out / CHECKPOINT)
    granularity = granularity_of(now) if config.granularity is None else config.granularity
    seed = now.config.seed if config.seed is None else config.seed
    for file in files:
        found = read_checkpoint(file)
        if (named(granularity_of(found)), found.config.seed) == (named(granularity), seed):
            break
    else:
        wanted = f"--seed {seed}" if granularity is None else f"--granularity {granularity:g} with seed {seed}"
        raise UserError(f"{wanted}: no such head; there are {', '.join(file.stem for file in files)}")
    write_atomic(out / CHECKPOINT, file.read_bytes())
    print(f"{out / CHECKPOINT} is now {file.stem}; the others stay in {out / HEADS}")
    images = pictures_of(found.config.data, out)
    print(
        "next       " + predict_command(out / CHECKPOINT, images, out / f"predictions_{file.stem}", found.backbone_name)
    )


def granularity_of(checkpoint: Checkpoint) -> float | None:
    return None if checkpoint.config.granularity is None else checkpoint.config.granularity[0]


def named(granularity: float | None) -> str | None:
    """As files and lines name it, which is what a user types."""
    return None if granularity is None else f"{granularity + 0.0:g}"


if __name__ == "__main__":
    sys.exit(run(main))
