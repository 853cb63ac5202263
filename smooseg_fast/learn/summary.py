"""The end of a run: figures without labels and with them, every head as a checkpoint, the report and the pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ..config import Variant
from ..features.sample import batches, sample_patches
from ..measure.health import Health, health
from ..measure.scores import Scores, hungarian, majority, percent
from ..measure.validation import Validation
from ..segment.checkpoint import Checkpoint
from ..segment.kmeans import spherical_kmeans
from ..segment.model import Heads
from ..segment.segmenter import Segmenter
from ..show.sheet import NAMED
from ..system.files import write_json
from ..system.progress import Bar
from .monitors import COLLAPSE, COLLAPSED
from .run import Ended
from .runfolder import CHECKPOINT, METRICS, REPORT, RunFolder, head_file
from .runpictures import Shown, draw, in_use
from .setting import Setting
from .shares import Shares

SILENT_S = 2.0  # that counting may take before it shows a bar
LISTED = 6  # groups whose sizes a line names


def finish(setting: Setting, ended: Ended) -> Segmenter:
    """Writes everything that a run leaves; the report comes last, because with it the run counts as finished.

    Returns:
        The segmenter of the default head, which is the first that did not break.
    """
    places = {variant: h for h, variant in enumerate(setting.variants) if variant not in ended.broken}
    default = next(iter(places))
    states = dict(zip(setting.variants, health_of_all(setting, ended.heads)))
    states = {variant: states[variant] for variant in places}
    report = ended.report | {
        "images": len(setting.dataset) - len(setting.store.skipped),
        "skipped": setting.store.skipped,
        "default": default.name,
        "broken": sorted(variant.name for variant in ended.broken),
        "heads": {variant.name: {"health": dataclasses.asdict(state)} for variant, state in states.items()},
    }
    say_groups(setting, states)
    if setting.validation is not None:
        for variant, scores in score(setting, setting.validation, ended, places).items():
            report["heads"][variant.name]["scores"] = scores
    report |= report["heads"][default.name]
    segmenters = {
        variant: Segmenter(checkpoint_of(setting, ended, variant, report), setting.backbone) for variant in places
    }
    if setting.written is not None:
        leave(setting, setting.written, ended, report, segmenters)
    setting.say(f"done       the whole run took {time.perf_counter() - setting.started:.1f} s")
    return segmenters[default]


def checkpoint_of(setting: Setting, ended: Ended, variant: Variant, report: Mapping[str, Any]) -> Checkpoint:
    common = {name: report[name] for name in ("closeness", "images", "skipped") if name in report}
    return Checkpoint(
        config=setting.config.alone(variant),
        head=ended.heads[setting.variants.index(variant)],
        step=ended.step,
        backbone_name=setting.backbone.name,
        backbone_digest=setting.backbone.digest,
        class_names=None if setting.validation is None else setting.validation.dataset.class_names,
        report=common | report["heads"][variant.name],
    )


def leave(
    setting: Setting,
    folder: RunFolder,
    ended: Ended,
    report: dict[str, Any],
    segmenters: Mapping[Variant, Segmenter],
) -> None:
    """Writes checkpoints, pictures and report."""
    out, say = folder.path, setting.say
    many = len(segmenters) > 1
    if many:
        for variant, segmenter in segmenters.items():
            segmenter.save(head_file(out, variant))
    next(iter(segmenters.values())).save(out / CHECKPOINT)
    pictures = draw(Shown(setting, folder, segmenters, ended.records, report))
    write_json(out / REPORT, report)
    say(f"saved      {out / CHECKPOINT}" + (f", and all {len(segmenters)} heads in {out / 'heads'}" if many else ""))
    say(f"figures    {out / REPORT}, {out / METRICS}")
    if pictures:
        say("pictures   " + ", ".join(map(str, pictures)))


# without labels


def health_of_all(setting: Setting, heads: Heads) -> list[Health]:
    """Figures without labels of every head over all squares. Each process takes the heads that it learnt."""
    shares = Shares(len(heads), setting.processes)
    state = shares.of(heads.state_dict())
    states = []
    if len(state["student"]):
        states = health(Heads.from_state(state).to(setting.device), with_bar(setting))
    return [state for part in setting.processes.all(states) for state in part]


def with_bar(setting: Setting) -> Iterator[Tensor]:
    """Batches of all features, with a bar if they take long."""
    total, off = len(setting.store), not setting.progress
    with Bar(total=total, desc="groups", unit="square", delay=SILENT_S, disable=off) as bar:
        for features in batches(setting.store, setting.device):
            yield features
            bar.update(len(features))


def say_groups(setting: Setting, states: Mapping[Variant, Health]) -> None:
    """Tells how many groups each head has, how large they are and how sure it is of them."""
    asked = setting.prototypes
    for number, (variant, state) in enumerate(states.items()):
        default = " (default)" if number == 0 else ""
        mark = f"{variant.label()}{default}: " if len(states) > 1 else ""
        groups = "1 group" if asked == 1 else f"{asked} groups"
        setting.say(
            f"groups     {mark}{groups} asked for, {in_use(state.shares)} in use: {sizes(state.shares)} of the area; "
            f"teacher and student agree on {100 * state.agreement:.0f} %"
        )
        setting.detail(
            f"           perplexity {state.perplexity:.1f}; {state.labels_per_image:.1f} in an image; "
            f"I(image;label)/H(label) {state.image_information:.2f}; modularity {state.modularity:.3f} x "
            f"explained variance {state.explained_variance:.3f} = {state.modularity_x_explained:.4f}"
        )
    for variant, state in states.items():
        if state.perplexity < COLLAPSED and asked > 1:
            setting.say(f"warning    {variant.label()} {COLLAPSE}")


def sizes(shares: Iterable[float]) -> str:
    """The shares of the groups in use, largest first: "31 %, 22 % and 7 smaller groups"."""
    largest_first = sorted((share for share in shares if share >= NAMED), reverse=True)
    listed = ", ".join(f"{100 * share:.0f} %" for share in largest_first[:LISTED])
    smaller = len(largest_first) - LISTED
    if smaller <= 0:
        return listed
    return f"{listed} and {smaller} smaller group{'s' if smaller > 1 else ''}"


# with labels


def score(
    setting: Setting, validation: Validation, ended: Ended, places: Mapping[Variant, int]
) -> dict[Variant, dict[str, Any]]:
    """Scores for the report, matched to classes by the labels (Hungarian), next to k-means on the same features."""
    names = validation.dataset.class_names
    where = "held-out images" if validation.dataset.held_out else "the training images"
    setting.say(f"scores     {len(validation.store)} {where}; groups are matched to classes by the labels (Hungarian):")
    rows = sample_patches(setting.store, seed=0).to(setting.device)
    baseline = validation.kmeans(spherical_kmeans(rows, ended.heads.student.shape[1], starts=10).centres)
    figures: dict[Variant, dict[str, Any]] = {}
    by_granularity: dict[float | None, list[Scores]] = {}
    for variant, h in places.items():
        counts = ended.counts[variant] if variant in ended.counts else validation.confusion(ended.heads[h])
        by_granularity.setdefault(variant.granularity, []).append(hungarian(counts))
        figures[variant] = {
            "held_out": validation.dataset.held_out,
            "mirror": False,
            "hungarian": by_granularity[variant.granularity][-1].as_dict(names),
            "majority": majority(counts).as_dict(names),
            "kmeans": baseline.as_dict(names),
        }
    for granularity, of_seeds in by_granularity.items():
        name = "smooseg" if len(by_granularity) == 1 else f"granularity {granularity:g}"
        accuracy = mean_and_std([scores.accuracy for scores in of_seeds])
        miou = mean_and_std([scores.miou for scores in of_seeds])
        seeds = "" if len(of_seeds) == 1 else f"  ({len(of_seeds)} seeds)"
        setting.say(f"           {name:16s}  accuracy {accuracy} %  mIoU {miou} %{seeds}")
    accuracy, miou = percent(baseline.accuracy), percent(baseline.miou)
    setting.say(f"           {'k-means':16s}  accuracy {accuracy} %  mIoU {miou} %  (same features)")
    return figures


def mean_and_std(values: Sequence[float]) -> str:
    """Percent: the value, or mean and sample standard deviation."""
    if len(values) == 1:
        return percent(values[0])
    return f"{percent(float(np.mean(values)))} ± {percent(float(np.std(values, ddof=1)))}"
