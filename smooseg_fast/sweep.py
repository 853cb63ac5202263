"""`smooseg sweep`: learn with several settings and seeds, and compare them in a table."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .command import end, pictures_of, predict_command, run
from .config import AtLeastOne, Folder, PresetName, TrainConfig, preset, with_changes
from .errors import UserError
from .system.commandline import nearest, parse
from .system.fields import KINDS, Value, fields_of
from .system.files import write_atomic, write_json
from .system.outfolder import mark_as_ours
from .system.table import aligned

if TYPE_CHECKING:
    from .system.processes import Processes

TABLE, RECORD, PICTURE = "sweep.csv", "sweep.json", "sweep.png"
SWEPT_ELSEWHERE = {"data": "--data", "out": "--out", "preset": "--preset", "heads": "--seeds"}
LABELLED = ("miou", "accuracy", "majority_miou")
IN_USE = "groups_in_use"
UNLABELLED = ("perplexity", "agreement", "explained_variance")
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Learn with every combination of settings, each with several seeds, and compare them: sweep.csv and sweep.json
    hold a line for each head, sweep.png shows the means.

    Seeds and granularities are learnt together, on the same batches; other settings one after another, each a run in a
    folder of its own. The same command resumes where it was stopped, and adds to it with more settings.
    """

    data: Annotated[str | None, Value("FOLDER", usual=True)] = None
    """Folder of images, as train's [the embedded demo]."""
    set: Annotated[tuple[str, ...], Value("NAME=A,B")] = ()
    """Settings of train and the values to compare, e.g. granularity=0,0.06 steps=100,200; one value is one for all."""
    seeds: AtLeastOne = 8
    """How many seeds each combination is learnt with."""
    preset: PresetName | None = None
    """Settings to start from [folder with --data, demo without]."""
    out: Folder = "sweep"
    """Folder for the runs, the table and the picture."""


def main(args: Sequence[str], processes: Processes | None = None) -> None:
    config = parse(SweepConfig, args, "sweep")
    values = values_of(config.set)
    runs = dict(combinations(values))
    base = preset(config.preset or ("demo" if config.data is None else "folder"))
    configs = {
        name: with_changes(base, data=config.data, heads=config.seeds, **settings) for name, settings in runs.items()
    }  # all are checked before the first begins
    from .datasets.demo import datasets_of
    from .learn.runfolder import CHECKPOINT, REPORT
    from .learn.trainer import learn
    from .show import charts, pictures
    from .system.processes import ALONE

    processes, out, rows = processes or ALONE, Path(config.out).expanduser(), []
    for number, (name, learnt) in enumerate(configs.items(), 1):
        if processes.first:
            print(f"run {number} of {len(configs)}: {name}", flush=True)
        learn(learnt, *datasets_of(learnt), out=out / name, progress=True, say=lambda line: None, processes=processes)
        if processes.first:
            report = out / name / REPORT
            try:
                rows += rows_of(learnt, runs[name], json.loads(report.read_text(encoding="utf-8")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{report}: damaged; remove it, and the same command writes it again") from error
    if processes.first:
        means = summary(rows, list(values))
        mark_as_ours(out, PICTURE)
        write_atomic(out / TABLE, csv_of(rows).encode())
        write_json(out / RECORD, {"heads": rows, "means": means})
        figure = figures_of(rows)[0]
        axes = [name for name, given in values.items() if len(given) > 1]
        pictures.save(out / PICTURE, charts.sweep_picture(means, axes, figure))
        print(table(means, list(values)))
        print(f"saved      {out / TABLE}, {out / RECORD}; runs in {out}")
        print(f"look at    {out / PICTURE}")
        if config.data is not None:
            (name, learnt), *_ = configs.items()
            words = out / name / CHECKPOINT, pictures_of(config.data, out / name), out / name / "predictions"
            print("next       a run's first seed predicts, such as " + predict_command(*words, learnt.backbone))


def values_of(words: Iterable[str]) -> dict[str, list[Any]]:
    """{setting: its values} of words NAME=A,B. UserError for a setting or a value that training does not take."""
    fields, values = fields_of(TrainConfig), {}
    for word in words:
        name, equals, listed = word.partition("=")
        name = name.replace("-", "_")
        if name in SWEPT_ELSEWHERE:
            raise UserError(f"--set {word}: is given by {SWEPT_ELSEWHERE[name]}")
        if name not in fields or not equals:
            hint = nearest(name, fields) or "; give NAME=A,B with settings of smooseg train"
            raise UserError(f"--set {word}: names no setting{hint}")
        if name in values:
            raise UserError(f"--set {word}: {name} is given twice; write {name}=A,B")
        field = fields[name]
        values[name] = [switch(item, word) if field.kind is bool else field.read(item) for item in listed.split(",")]
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"--set {word}: has a value twice")
        for value in values[name]:
            field.check((value,) if field.many and value is not None else value)
    return values


def switch(word: str, whole: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise UserError(f"--set {whole}: must be {KINDS[bool][1]}, got {word}")
    return word.lower() == "true"


def combinations(values: Mapping[str, list[Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The name and the settings of each run: one for every combination, with all granularities in each."""
    many = {name: field.many for name, field in fields_of(TrainConfig).items()}
    together = {"granularity": tuple(values["granularity"])} if "granularity" in values else {}
    others = {name: given for name, given in values.items() if name != "granularity"}
    runs = []
    for combination in itertools.product(*others.values()):
        words = [f"{name}={value}" for name, value in zip(others, combination) if len(others[name]) > 1]
        settings = {name: (value,) if many[name] else value for name, value in zip(others, combination)}
        runs.append(("_".join(words).replace("/", "-") or "run", together | settings))
    return runs


def rows_of(config: TrainConfig, settings: Mapping[str, Any], report: Mapping[str, Any]) -> Rows:
    """A row for each head of a finished run: its settings and its figures; heads that broke have none."""
    from .learn.groupspicture import in_use

    rows, variants = [], {variant.name: variant for variant in config.variants()}
    for name, head in report["heads"].items():
        variant, health = variants[name], head["health"]
        given = {key: value[0] if isinstance(value, tuple) else value for key, value in settings.items()}
        if "granularity" in settings:
            given["granularity"] = variant.granularity
        row = given | {"seed": variant.seed, IN_USE: in_use(health["shares"])}
        row |= {figure: health[figure] for figure in UNLABELLED}
        if "scores" in head:
            one, many = head["scores"]["hungarian"], head["scores"]["majority"]
            row |= dict(zip(LABELLED, (one["miou"], one["accuracy"], many["miou"])))
        rows.append(row)
    return rows


def figures_of(rows: Rows) -> tuple[str, ...]:
    """The figures that the heads have, the most telling one first."""
    return (*LABELLED, *UNLABELLED) if "miou" in rows[0] else (UNLABELLED[-1], *UNLABELLED[:-1])


def summary(rows: Rows, names: Sequence[str]) -> Rows:
    """Mean and sample standard deviation over the seeds of each combination of the settings `names`."""
    import statistics

    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    means = []
    for key, heads in groups.items():
        mean = dict(zip(names, key)) | {"seeds": len(heads)}
        for figure in (IN_USE, *figures_of(rows)):
            found = [head[figure] for head in heads]
            mean[figure] = statistics.fmean(found)
            mean[f"{figure}_std"] = statistics.stdev(found) if len(found) > 1 else None
        means.append(mean)
    return means


def csv_of(rows: Rows) -> str:
    """A line of names, then one for each row."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(means: Rows, names: Sequence[str]) -> str:
    """Plain text: a line for each combination; shares in %."""
    figures = [name for name in means[0] if f"{name}_std" in means[0]]
    lines = [[*names, "seeds", *figures]]
    for row in means:
        cells = [
            spread(row[name], row[f"{name}_std"], 1 if name in (IN_USE, "perplexity") else 100) for name in figures
        ]
        lines.append([*map(str, (row[name] for name in names)), str(row["seeds"]), *cells])
    return aligned(lines)


def spread(mean: float, deviation: float | None, scale: float) -> str:
    return f"{scale * mean:.1f}" + ("" if deviation is None else f" ± {scale * deviation:.1f}")


if __name__ == "__main__":
    sys.exit(end(run(main)))
