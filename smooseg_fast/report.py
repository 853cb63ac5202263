"""`smooseg report`: write the page of a run or of predictions again."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .command import run
from .errors import UserError
from .system.commandline import parse
from .system.fields import Value


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write report.html again, with the names, merges and number of groups that the run has now. Train and predict
    write it, too. Any browser opens it, without a network: images, groups, their tree and the figures."""

    run: Annotated[str | None, Value("FOLDER", usual=True)] = None
    """Folder of a finished run."""
    predictions: Annotated[str | None, Value("FOLDER")] = None
    """Folder of smooseg predict instead."""
    out: Annotated[str | None, Value("FILE")] = None
    """The page to write [report.html in that folder]."""


def main(args: Sequence[str]) -> None:
    config = parse(ReportConfig, args, "report")
    from .learn.runpage import write_page_of_run
    from .show.report import PAGE
    from .show.report_folder import write_page_of

    if (config.run is None) == (config.predictions is None):
        raise UserError("--run: give the folder of a run, or --predictions with the folder of smooseg predict")
    folder = Path(config.run or config.predictions or "").expanduser()
    out = folder / PAGE if config.out is None else Path(config.out).expanduser()
    if config.run is None:
        write_page_of(folder, out)
    else:
        write_page_of_run(folder, out)
    print(f"open {out} in a browser; it is one file and needs no network ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(run(main))
