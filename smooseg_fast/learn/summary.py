"""The end of a run: figures without labels and with them, every head as a checkpoint, the report and the pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..config import PAPER_REFINE, REFINE, Refine, Variant
from ..datasets import classes_of
from ..features.sample import BATCH, batches, sample_patches
from ..measure.confusion import LabelSquares, head_codes
from ..measure.health import Health, health
from ..measure.scores import Scores, by_refinement, hungarian, majority, percent, proposed_names
from ..segment.checkpoint import Checkpoint
from ..segment.grouping import Grouping
from ..segment.kmeans import spherical_kmeans
from ..segment.model import Head, Heads
from ..segment.segmenter import Segmenter
from ..show.sheet import NAMED
from ..system.files import write_json
from ..system.progress import SILENT_S, Bar
from .groupspicture import in_use
from .run import Run
from .runfolder import CHECKPOINT, METRICS, REPORT, RunFolder, head_file
from .runpictures import Shown, draw
from .setting import Setting
from .shares import Shares
from .typical import typical_patches

LISTED = 6  # groups whose sizes a line names


def finish(run: Run) -> Segmenter:
    """Writes everything that a run leaves; the report comes last, because with it the run counts as finished.

    Returns:
        The segmenter of the default head, which is the first that did not break.
    """
    setting, heads = run.setting, run.heads()
    run.fine = {
        s: dataclasses.replace(fine, typical=typical_patches(setting, fine.head)) for s, fine in run.fine.items()
    }
    places = {variant: h for h, variant in enumerate(setting.variants) if variant.name not in run.watch.broken}
    default = next(iter(places))
    groupings = [grouping_of(run, variant, heads[h]) for h, variant in enumerate(setting.variants)]
    states = health_of_all(setting, heads, groupings)
    figures: dict[Variant, dict[str, Any]] = {v: {"health": dataclasses.asdict(states[h])} for v, h in places.items()}
    say_groups(setting, {variant: states[h] for variant, h in places.items()})
    if setting.validation is not None:
        of_variants = {variant: groupings[h] for variant, h in places.items()}
        for variant, scores in score(run, setting.validation, of_variants).items():
            figures[variant]["scores"] = scores
    common = {"images": len(setting.dataset) - len(setting.store.skipped), "skipped": setting.store.skipped}
    segmenters = {}
    for variant, h in places.items():
        checkpoint = Checkpoint(
            config=setting.config.alone(variant),
            head=heads[h],
            step=run.done,
            backbone_name=setting.backbone.name,
            backbone_digest=setting.backbone.digest,
            backbone_licence=setting.backbone.licence,
            reading=setting.dataset.reading,
            class_names=None if setting.validation is None else setting.validation.dataset.class_names,
            report={name: run.report[name] for name in ("closeness", "tree") if name in run.report}
            | common
            | figures[variant],
            fine=run.fine.get(variant.seed),
        )
        if variant == default and setting.written is not None:
            checkpoint = setting.written.with_choices(checkpoint)
        segmenters[variant] = Segmenter(checkpoint, setting.backbone)
    if setting.written is not None:
        run.report |= common | {"default": default.name, "broken": sorted(run.watch.broken)}
        run.report["backbone"] = {"name": setting.backbone.name, "licence": setting.backbone.licence}
        run.report["heads"] = {variant.name: of_head for variant, of_head in figures.items()}
        leave(run, setting.written, run.report | figures[default], segmenters)
    setting.say(f"done       the whole run took {time.perf_counter() - setting.started:.1f} s")
    return segmenters[default]


def grouping_of(run: Run, variant: Variant, head: Head) -> Grouping:
    """How a head labels: by itself, or without any step by its tree."""
    if run.done or variant.seed not in run.fine:
        return Grouping(head)
    fine = run.fine[variant.seed]
    return Grouping(fine.head, fine.tree.cut(len(head.teacher)))


def leave(run: Run, folder: RunFolder, report: dict[str, Any], segmenters: Mapping[Variant, Segmenter]) -> None:
    """Writes checkpoints, pictures and report."""
    out, say, many = folder.path, run.say, len(segmenters) > 1
    if many:
        for variant, segmenter in segmenters.items():
            segmenter.save(head_file(out, variant))
    next(iter(segmenters.values())).save(out / CHECKPOINT)
    started = time.perf_counter()
    pictures = draw(Shown(run.setting, folder, segmenters, run.records, report, started))
    write_json(out / REPORT, report)
    say(f"saved      {out / CHECKPOINT}" + (f", and all {len(segmenters)} heads in {out / 'heads'}" if many else ""))
    say(f"figures    {out / REPORT}" + (f", {out / METRICS}" if run.done else ""))
    if pictures:
        took, whole = (time.perf_counter() - start for start in (started, run.setting.started))
        say(f"pictures   {', '.join(map(str, pictures))}; {took:.1f} s, {100 * took / whole:.0f} % of the run")


# without labels


def health_of_all(setting: Setting, heads: Heads, groupings: Sequence[Grouping]) -> list[Health]:
    """Figures without labels of every head over all squares. Each process takes the heads that it learnt."""
    shares, states = Shares(len(heads), setting.processes), []
    mine, state = groupings[shares.part], shares.of(heads.state_dict())
    # trained heads side by side; the fine ones of untrained trees may differ in their numbers of prototypes
    sets = [[grouping] for grouping in mine] if any(g.groups is not None for g in mine) else [mine] if mine else []
    for together in sets:
        bar = Bar(
            iterable=batches(setting.store, setting.device),
            total=-(-len(setting.store) // BATCH),
            desc="groups",
            unit="batch",
            delay=SILENT_S,
            disable=not setting.progress,
        )
        tables = [g.groups for g in together if g.groups is not None]
        several = Heads([g.head for g in together]) if tables else Heads.from_state(state)
        states += health(several.to(setting.device), bar, tables or None)
    return [state for part in setting.processes.all(states) for state in part]


def say_groups(setting: Setting, states: Mapping[Variant, Health]) -> None:
    """Tells how many groups each head has, how large they are and how sure it is of them."""
    for number, (variant, state) in enumerate(states.items()):
        predicts = " (predicts)" if number == 0 else ""
        mark = f"{variant.label()}{predicts}: " if len(states) > 1 else ""
        setting.say(
            f"groups     {mark}{in_use(state.shares)} of {len(state.shares)} in use, {sizes(state.shares)} of the area"
            + (f"; labels settled on {100 * state.agreement:.0f} % of it" if setting.steps else "")
        )
        setting.detail(
            f"           perplexity {state.perplexity:.1f}; {state.labels_per_image:.1f} in an image; "
            f"I(image;label)/H(label) {state.image_information:.2f}; modularity {state.modularity:.3f} x "
            f"explained variance {state.explained_variance:.3f} = {state.modularity_x_explained:.4f}"
        )


def sizes(shares: Iterable[float]) -> str:
    """The shares of the groups in use, largest first: "31 %, 22 % and 7 smaller groups"."""
    largest_first = sorted((share for share in shares if share >= NAMED), reverse=True)
    listed = ", ".join(f"{100 * share:.0f} %" for share in largest_first[:LISTED])
    smaller = len(largest_first) - LISTED
    return listed if smaller <= 0 else f"{listed} and {smaller} smaller group{'s' if smaller > 1 else ''}"


# with labels


def score(run: Run, validation: LabelSquares, groupings: Mapping[Variant, Grouping]) -> dict[Variant, dict[str, Any]]:
    """Scores for the report, matched to classes by the labels (Hungarian), next to k-means on the same features.

    Where heads began with a tree, also its scores with as many groups as there are classes, and no training.
    """
    names, say = classes_of(validation.dataset), run.say
    count = validation.images
    where = f"{count} held-out images" if validation.dataset.held_out else f"the {count} training images"
    tiles = "" if len(validation.store) == count else f", {len(validation.store)} tiles of them"
    say(f"scores     on {where}{tiles}; groups are matched to classes by the labels (Hungarian):")
    rows = sample_patches(run.setting.store, seed=0).to(run.setting.device)
    K = max(2, len(names)) if run.fine else run.setting.prototypes
    baseline = validation.kmeans(spherical_kmeans(rows, K, starts=10).centres)
    figures: dict[Variant, dict[str, Any]] = {}
    by_granularity: dict[float | None, list[Scores]] = {}
    for variant, grouping in groupings.items():
        counts = run.counts[variant] if variant in run.counts else validation.of_head(grouping)
        matched = hungarian(counts)
        by_granularity.setdefault(variant.granularity, []).append(matched)
        figures[variant] = {
            "held_out": validation.dataset.held_out,
            "mirror": False,
            "groups": len(counts),
            "hungarian": matched.as_dict(names),
            "majority": majority(counts).as_dict(names),
            "confusion": counts.tolist(),
            "proposed": {str(k): name for k, name in proposed_names(counts, names).items()},
            "kmeans": baseline.as_dict(names),
        }
    default = next(iter(groupings))
    refine, refined = refined_scores(run.setting, validation, groupings[default])
    plain = {name: figures[default][name] for name in ("hungarian", "majority")}
    figures[default]["by_refinement"] = {"none": plain, **by_refinement({refine: refined}, names)}
    for granularity, of_seeds in by_granularity.items():
        name = "smooseg" if len(by_granularity) == 1 else f"granularity {granularity:g}"
        notes = [f"{max(map(len, groupings.values()))} groups"] if run.fine else []
        notes += [f"{len(of_seeds)} seeds"] if len(of_seeds) > 1 else []
        say(score_line(name, of_seeds) + (f"  ({', '.join(notes)})" if notes else ""))
    notes = ["edges follow the image"] + ["the head that predicts"] * (len(groupings) > 1)
    say(score_line(f"smooseg, {refine}", [refined["hungarian"]]) + f"  ({', '.join(notes)})")
    if run.fine:
        cuts = {seed: Grouping(fine.head, fine.tree.cut(min(K, fine.most))) for seed, fine in run.fine.items()}
        looked_up = {seed: hungarian(validation.of_head(cut)) for seed, cut in cuts.items()}
        if run.done or any(len(cuts[variant.seed]) != len(of_head) for variant, of_head in groupings.items()):
            say(score_line("tree, untrained", list(looked_up.values())) + f"  ({K} groups, as many as classes)")
        for variant, of_head in figures.items():
            of_head["tree"] = {"groups": len(cuts[variant.seed]), "hungarian": looked_up[variant.seed].as_dict(names)}
    say(score_line("k-means", [baseline]) + f"  (same features{f', {K} groups' if run.fine else ''})")
    return figures


def refined_scores(setting: Setting, validation: LabelSquares, grouping: Grouping) -> tuple[Refine, dict[str, Scores]]:
    """The scores of labels that follow the images' edges: as `predict` refines them, or in the paper's presets by the
    CRF, as in its tables."""
    refine = REFINE if setting.config.preset in ("demo", "folder") else PAPER_REFINE
    counts = validation.refined_confusion(head_codes(grouping, validation.store), grouping, refine)
    return refine, {"hungarian": hungarian(counts), "majority": majority(counts)}


def score_line(name: str, scores: Sequence[Scores]) -> str:
    accuracy, miou = (mean_and_std([getattr(each, figure) for each in scores]) for figure in ("accuracy", "miou"))
    return f"           {name:16s}  accuracy {accuracy} %  mIoU {miou} %"


def mean_and_std(values: Sequence[float]) -> str:
    """Percent: the value, or mean and sample standard deviation."""
    spread = "" if len(values) == 1 else f" ± {percent(float(np.std(values, ddof=1)))}"
    return percent(float(np.mean(values))) + spread
