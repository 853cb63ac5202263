"""`smooseg convert`: rewrite a published checkpoint of SmooSeg as one of this program."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .command import predict_command, run
from .errors import UserError
from .system.commandline import command_line, parse
from .system.fields import Value
from .system.outfolder import OutFolder
from .system.terminal import printable

RECORD, BACKBONE = "convert.json", "backbone"
# words in the names of hyper-parameters that describe what was trained, and how
TELLING = re.compile(
    r"(dataset|arch|patch|feat|res|resolution|crop|thresholds?|shift|b1|b2|batch|steps|lr|classes"
    r"|alpha|momentum|tau|seed)"
)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write a published SmooSeg checkpoint as checkpoint.safetensors, with its backbone next to it. Nothing in the file
    is executed.

    Prediction does not need it: --checkpoint takes the .ckpt too.
    """

    file: Annotated[str, Value("FILE", positional=True)]
    """The published .ckpt."""
    out: Annotated[str, Value("FOLDER")]
    """Folder for checkpoint.safetensors and backbone/ (a transformers folder); it can be moved as a whole."""


def main(args: Sequence[str]) -> None:
    config = parse(ConvertConfig, args, "convert")
    from .backbones.base import digest_of, naming
    from .backbones.original import title
    from .backbones.weights import is_pickle
    from .learn.runfolder import CHECKPOINT
    from .segment.published import DATASETS, read_published

    path, out = Path(config.file).expanduser(), Path(config.out).expanduser()
    with naming(str(path)):
        if not is_pickle(path):
            problem = "is no file of torch.save" if path.is_file() else "no such file"
            raise UserError(f"{problem}; give a published .ckpt")
        checkpoint, vit = read_published(path)
    checkpoint = dataclasses.replace(checkpoint, backbone_name=f"./{BACKBONE}")
    (K, Z), dim = checkpoint.head.teacher.shape, vit.config["hidden_size"]
    print(
        f"found      SmooSeg after {checkpoint.step} steps: K = {K} prototypes of Z = {Z}, "
        f"on D = {dim} channels of {title(vit.config)}"
    )
    settings = checkpoint.report["published"]["hyper_parameters"]
    telling = [name for name in settings if any(map(TELLING.fullmatch, re.split(r"[._]", name.lower())))]
    listed = printable(", ".join(f"{name} {settings[name]}" for name in telling))
    print(f"settings   {listed or 'none are in the file'}")
    preset = checkpoint.config.preset if checkpoint.config.preset in DATASETS.values() else None
    known = "the paper's; the file names none of its data sets" if preset is None else f"the paper's for {preset}"
    print(f"resolution {checkpoint.config.eval_size} pixels ({known})")

    differ = "in bfloat16 up to 0.8 % of pixels get another label; --backbone-precision names another"
    print(f"precision  float32, as it was published: {differ}")

    content = {"backbone": checkpoint.backbone_digest, "head": digest_of(checkpoint.head.state_dict())}
    folder = OutFolder(out, content, record=RECORD, outputs=(CHECKPOINT,), below=(BACKBONE,))
    with folder.held():
        folder.claim()
        vit.write(out / BACKBONE)
        file = checkpoint.write(out / CHECKPOINT)
    print(f"written    {file}, and its backbone {out / BACKBONE}; move them together")
    print("next       " + predict_command(file, "IMAGES", out / "predictions", checkpoint.backbone_name))
    protocol = [] if preset is None else ["--preset", preset]
    print("           " + command_line("evaluate", *protocol, "--checkpoint", str(file), "--data", "DIR"))


if __name__ == "__main__":
    sys.exit(run(main))
