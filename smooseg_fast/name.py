"""`smooseg name`: call the groups of a run by names, merge them, and give them colours."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

from .command import finished_run, new_names, pictures_of, predict_command, run
from .errors import UserError
from .system.commandline import command_line, parse
from .system.fields import Value
from .system.files import sweep
from .system.outfolder import held
from .system.table import aligned
from .system.terminal import one_line

if TYPE_CHECKING:
    from .segment.checkpoint import Checkpoint
    from .segment.names import Group, Names

T = TypeVar("T")
EXAMPLES = "road", "building", "sky", "tree"  # names in the command that the list ends with


@dataclass(frozen=True, kw_only=True)
class NameConfig:
    """List the groups of a finished run, or call them by names, merge them, and give them colours. Masks, pictures,
    tables and exports made from then on have them. Nothing is learnt, and everything can be changed back.

    3=road names group 3. 3= takes its name away. 7,12=building merges groups 7 and 12 into one of that name: masks hold
    the lowest of their numbers, and no other number changes. A name stays with its group at every number of groups at
    which the group is not split.
    """

    run: Annotated[str, Value("FOLDER", usual=True)]
    """Folder of a finished run."""
    names: Annotated[tuple[str, ...], Value("N=NAME", positional=True)] = ()
    """Groups and their names, such as 3=road 7,12=building."""
    colour: Annotated[tuple[str, ...], Value("N=#RRGGBB")] = ()
    """Colours of groups, such as 3=#aabbcc; 3= gives group 3 its first colour back."""
    apart: Annotated[tuple[int, ...], Value("N")] = ()
    """Take merges apart again, by the numbers that the merged groups have now."""
    file: Annotated[str | None, Value("FILE")] = None
    """A names.json, such as the page of the run downloads: all names, colours and merges at its number of groups."""
    from_labels: bool = False
    """Name groups after the classes that they match in the labels (those of training, or of the last smooseg evaluate).
    Groups that have a name keep it."""


def main(args: Sequence[str]) -> None:
    config = parse(NameConfig, args, "name")
    from .learn import runfolder as folder
    from .learn.runpage import refreshed
    from .segment.checkpoint import read_checkpoint
    from .segment.names import NAMES, Names
    from .show import pictures
    from .show.tree import tree_picture

    out = finished_run(config.run)
    ways = [bool(config.names or config.colour or config.apart), config.file is not None, config.from_labels]
    if sum(ways) > 1:
        raise UserError("--file: give either it, or --from-labels, or names, colours and --apart")
    if not any(ways):
        print(listing(read_checkpoint(out / folder.CHECKPOINT), out))
        return
    with held(out, "--run"):
        sweep(out)
        before = read_checkpoint(out / folder.CHECKPOINT)
        if config.file is not None:
            given = Names.read(config.file)
        elif config.from_labels:
            given = with_proposals(before, out)
        else:
            given = changed(apart(before, config.apart), config)
        checkpoint = before.named(given)
        checkpoint.write(out / folder.CHECKPOINT)
        checkpoint.names.write(out / NAMES)
        shown = []
        if checkpoint.fine is not None:
            pictures.save(out / folder.TREE, tree_picture(checkpoint, str(out)))
            shown.append(str(out / folder.TREE))
        shown += refreshed(out)
    tell(before, checkpoint, given, out, shown)


def apart(checkpoint: Checkpoint, numbers: Sequence[int]) -> Names:
    """The names of a checkpoint without the merges that have these numbers. UserError where there is no such merge."""
    merged = [min(merge) for merge in checkpoint.names.merge]
    for number in numbers:
        if number not in merged:
            known = f"merged are {', '.join(map(str, merged))}" if merged else "no merges are in use"
            raise UserError(f"--apart {number}: nothing is merged into group {number}; {known}")
    return checkpoint.naming.apart(checkpoint.cut, numbers).at(checkpoint.cut, checkpoint.share)


def changed(names: Names, config: NameConfig) -> Names:
    """`names` with the changes that the command asks for. UserError for one that cannot be."""
    from .segment.names import colour_of

    named = set[int]()
    for word in config.names:
        numbers, name = assignment(word, "N=NAME", names)
        if twice := named.intersection(numbers):
            raise UserError(f"N=NAME {word}: group {min(twice)} stands in this line twice; give it one name")
        named.update(numbers)
        if len(numbers) > 1:
            names = merging(names, numbers)
        if name:
            names = replace(names, names=names.names | {numbers[0]: name})
        elif len(numbers) == 1:
            names = replace(names, names={k: text for k, text in names.names.items() if k != numbers[0]})
    for word in config.colour:
        (number, *more), colour = assignment(word, "--colour", names)
        if more:
            raise UserError(f"--colour {word}: give a colour to one group; merge groups by {word.split('=')[0]}=NAME")
        colours = {k: c for k, c in names.colours.items() if k != number}
        names = replace(names, colours=colours | ({number: colour_of(colour, f"--colour {word}")} if colour else {}))
    return names.checked("N=NAME")


def assignment(word: str, flag: str, names: Names) -> tuple[list[int], str]:
    """The ascending group numbers left of the first = of a word, and what stands right of it. UserError for numbers
    that masks do not hold."""
    from .segment.names import number_of

    left, equals, right = word.partition("=")
    if not equals:
        example = "3=#aabbcc" if flag == "--colour" else "3=road"
        raise UserError(f"{flag}: {word!r:.60} has no =; write {example}, without spaces")
    numbers = sorted(number_of(text.strip(), f"{flag} {word}") for text in left.split(","))
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{flag} {word}: has a group twice; list each once")
    # what an earlier time of the same command has merged
    numbers = [n for n in numbers if n in names.numbers or n >= names.groups or names.table[n] not in numbers]
    for number in numbers:
        if number not in names.numbers:
            into = f"is merged into {names.table[number]}" if number < names.groups else "does not exist"
            known = ", ".join(map(str, names.numbers))
            raise UserError(f"{flag} {word}: group {number} {into}; the groups are {known}")
    return numbers, right.strip()


def merging(names: Names, numbers: Sequence[int]) -> Names:
    """`names` with these groups merged into the first, which takes the first name and colour that any of them has."""
    groups = sorted(number for number in range(names.groups) if names.table[number] in numbers)
    others = [one for one in names.merge if min(one) not in numbers]

    def first(given: dict[int, T]) -> dict[int, T]:
        values = [given[number] for number in numbers if number in given][:1]
        rest = {number: value for number, value in given.items() if number not in numbers}
        return rest | dict(zip(numbers, values))

    merge = sorted([*others, groups])
    return replace(names, names=first(names.names), colours=first(names.colours), merge=merge)


def with_proposals(checkpoint: Checkpoint, out: Path) -> Names:
    """The names of a checkpoint with those that labels propose for groups without one. UserError without labels."""
    names, proposed = checkpoint.names, checkpoint.proposed
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        measured = json.loads((out / "evaluation" / "scores.json").read_text(encoding="utf-8"))
        if (measured["digest"], measured["merge"]) == (checkpoint.digest, names.merge):
            proposed = measured["proposed"]
    if proposed is None:
        evaluate = command_line("evaluate", "--checkpoint", str(out / "checkpoint.safetensors"), "--data")
        raise UserError(f"--from-labels: these groups were not compared with labels; run {evaluate} FOLDER first")
    return replace(names, names=new_names(names, proposed) | names.names).checked("--from-labels")


def listing(checkpoint: Checkpoint, out: Path) -> str:
    """A table of the groups, the pictures that show them by number, and the command that names some."""
    from .learn.runfolder import GROUPS, PAGE

    groups, names = checkpoint.listed, checkpoint.names
    unnamed = [group.number for group in groups if group.number not in names.names]
    free = [example for example in EXAMPLES if example not in names.names.values()]
    words = [f"{number}={name}" for number, name in zip(unnamed[:2], free)]
    if len(unnamed) > 2 and len(words) == 2:
        words[1] = f"{unnamed[1]},{unnamed[2]}={free[1]}"
    merged = f"; {names.groups} before merging" if names.merge else ""
    lines = [one_line(f"{out}: {len(groups)} groups{merged}"), table(groups, names)]
    if shown := [str(out / name) for name in (GROUPS, PAGE) if (out / name).exists()]:
        lines.append(one_line(f"look at    {', '.join(shown)} for which number is what"))
    if new_names(names, checkpoint.proposed):
        lines.append("labels     names from them: " + command_line("name", "--run", str(out), "--from-labels"))
    naming = "such as " + command_line("name", "--run", str(out), *words)
    lines.append("next       " + (naming if words else predicting(checkpoint, out)))
    return "\n".join(lines)


def table(groups: Iterable[Group], names: Names) -> str:
    """A row for each group: number, name, share, colour, and the groups that are merged in it."""
    from .segment.names import as_hex

    merged = {min(numbers): ", ".join(map(str, numbers)) for numbers in names.merge}
    head = ["group", "name", "share", "colour"] + ["merged"] * bool(merged)
    rows = []
    for group in groups:
        share = "-" if group.share is None else f"{100 * group.share:.1f} %"
        row = [str(group.number), one_line(names.names.get(group.number, "-")), share, as_hex(group.colour)]
        rows.append(row + [merged.get(group.number, "")] * bool(merged))
    return aligned([head, *rows], left=[1, 4])


def tell(before: Checkpoint, checkpoint: Checkpoint, given: Names, out: Path, shown: Sequence[str]) -> None:
    """Say what has changed and what may follow."""
    was, now = before.names, checkpoint.names
    print(table(checkpoint.listed, now))
    named = sum(now.names.get(number) != was.names.get(number) for number in {*now.names, *was.names})
    merges = len([one for one in now.merge if one not in was.merge])
    counts = {"name": named, "merge": merges}
    parts = [f"{count} {word}{'s' * (count > 1)}" for word, count in counts.items() if count]
    parts += ["colours"] * (now.colours != was.colours)
    apart = len([one for one in was.merge if not set(one) <= set().union(*now.merge)])
    parts += [f"{apart} taken apart"] * bool(apart)
    checkpoint_file = out / "checkpoint.safetensors"
    print(one_line(f"changed    {', '.join(parts) or 'nothing'}; {checkpoint_file} keeps all, names.json is a copy"))
    if shown:
        print(one_line(f"look at    {', '.join(shown)}"))
    stale = out / "evaluation" / "confusion.png"
    if stale.exists() and checkpoint.naming != before.naming:
        again = command_line("evaluate", "--checkpoint", str(checkpoint_file), "--data")
        print(one_line(f"stale      {stale} shows the names of before; {again} FOLDER draws it again"))
    if (given.groups, given.least_share) != (now.groups, now.least_share):
        words = ["--run", str(out), "--groups", str(given.groups)]
        words += ["--share", f"{given.least_share:g}"] if given.least_share else []
        print(
            f"note       the file is of {given.groups} groups, and the run uses {now.groups}; to use the file's: "
            f"{command_line('choose', *words)}"
        )
    print("next       " + predicting(checkpoint, out))


def predicting(checkpoint: Checkpoint, out: Path) -> str:
    """The command that predicts the images of a run with its groups of now."""
    predictions = "predictions" if checkpoint.groups is None else f"predictions_{checkpoint.groups}"
    images, file = pictures_of(checkpoint.config.data, out), out / "checkpoint.safetensors"
    return predict_command(file, images, out / predictions, checkpoint.backbone_name)


if __name__ == "__main__":
    sys.exit(run(main))
