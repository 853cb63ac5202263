"""The objective as the Triton kernels compute it from bf16 inputs, with each of their 16-bit roundings one by one.

All arithmetic is in float64, so that a result differs from the oracle by the chosen roundings alone. Sums in fp32 are
left out: they cost about a thousandth of what bf16 costs. `python tests/rounding.py` prints the table of
docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from triton_cases import FP32_EPS, Case, Result, evaluate, gradient_term_size, make_case, term_size

LIFT = 64.0
ROUNDINGS = {
    "prototypes": "unit prototypes, as two bf16 numbers each",
    "label rows": "unit label rows over the feature's length, and its inverse, in bf16",
    "moments": "moments of an image in fp16",
    "student rows": "gradients to the student's cosines over the code's length in bf16",
    "student sums": "their sums over patches in fp16",
    "pull": "pull on the patches of an image in bf16",
    "logits": "gradients to the logits in bf16",
    "back": "unit prototypes as one bf16 number on the way back",
    "gradient": "the result in bf16",
}
ALLOWED = 1.5  # times the error of the roundings


class Parts(NamedTuple):
    """Patches whose sums are rounded together: every `labels`-th tile of `tile` rows, and runs of `moments` rows."""

    tile: int
    labels: int
    moments: int

    def of_labels(self, P: int) -> list[Tensor]:
        part = torch.arange(P) // self.tile % self.labels
        return [(part == i).double()[:, None] for i in range(self.labels)]

    def of_moments(self, P: int) -> list[Tensor]:
        part = torch.arange(P) // self.moments
        return [(part == i).double()[:, None] for i in range(math.ceil(P / self.moments))]


def parts_of(case: Case) -> Parts:
    """Returns the parts that the kernels have for a case."""
    from smooseg_kernels.triton.plan import Plan

    codes, teacher = (x if case.codes.dim() == 4 else x[None] for x in (case.codes, case.teacher))
    plan = Plan(case.features, codes, teacher, len(case.partners))
    return Parts(plan.labels["BLOCK_P"], plan.parts, plan.per_split)


def unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Returns unit rows and 1 / length; 0 for a row shorter than 1e-10."""
    length = rows.norm(dim=-1, keepdim=True)
    inverse = torch.where(length < 1e-10, 0.0, 1.0 / length.clamp(min=1e-10))
    return rows * inverse, inverse


def rounded_objective(case: Case, roundings: Collection[str] = tuple(ROUNDINGS), parts: Parts | None = None) -> Result:
    """Returns all outputs and the gradients for 1.7 to the total, as `evaluate` does. `parts`: default one."""

    def to_16(value: Tensor, rounding: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return value.float().to(dtype).double() if rounding in roundings else value

    def split(rows: Tensor) -> Tensor:
        high = to_16(rows, "prototypes")
        return high + to_16(rows - high, "prototypes")

    single = case.codes.dim() == 3
    codes, student, teacher = (
        x.double()[None] if single else x.double() for x in (case.codes, case.student, case.teacher)
    )
    options, features = case.options, case.features.double()
    B, P, D = features.shape
    parts, upstream, device = parts or Parts(P, 1, P), 1.7, features.device
    ones = features.new_ones
    scale, weight = options.get("channel_scale"), options.get("patch_weight")
    scale = ones(B, 1, D) if scale is None else scale.double()[:, None]
    weight = ones(B, P) if weight is None else weight.double()
    totals, largest = weight.sum(1), weight.amax(1).clamp(min=1e-30)
    relative = torch.exp2(-largest.log2().floor())
    weight = (weight * relative[:, None])[..., None]  # [B,P,1]
    lift = torch.where(totals > 0, LIFT / (totals * relative).clamp(min=1e-30), 0.0)[:, None, None]
    _, inverse = unit(features * scale)
    sharpness = math.log2(math.e) / options.get("temperature", 0.1)

    # label rows
    (teacher_unit, _), (student_unit, student_inverse), (_, code_inverse) = map(unit, (teacher, student, codes))
    toward = codes @ split(teacher_unit)[:, None].mT
    logits = toward * code_inverse * sharpness
    e = torch.exp2(logits - logits.amax(-1, keepdim=True))
    c, _ = unit(e)
    cosines = codes @ split(student_unit)[:, None].mT * code_inverse
    label = logits.argmax(-1, keepdim=True)
    loss = cosines.logsumexp(-1, keepdim=True) - cosines.gather(-1, label)
    d_cosine = cosines.softmax(-1) - torch.zeros_like(cosines).scatter(-1, label, 1.0)
    student_rows = to_16(d_cosine * weight * code_inverse * sharpness, "student rows") / sharpness
    student_sums = sum(
        to_16((student_rows * part.to(device)).mT @ codes * lift, "student sums", torch.float16)
        for part in parts.of_labels(P)
    )  # [H,B,K,Z]
    labels = (weight * c).sum(2, keepdim=True) * lift  # [H,B,1,K]
    entropy = (weight * loss).sum((2, 3)) * lift[..., 0, 0]  # [H,B]

    # moments
    sides = to_16(torch.cat((c * weight * inverse, (weight * inverse).expand(*c.shape[:-1], 1)), -1), "label rows")
    rows = (features * lift * scale).mT
    sums = sum(to_16(rows @ (sides * part.to(device)), "moments", torch.float16) for part in parts.of_moments(P))
    g, u = sums[..., :-1], sums[..., -1:]  # [H,B,D,K], [H,B,D,1]

    # pairs
    centred = options.get("center", True)
    shown = g - u * labels / LIFT if centred else g
    present = (totals > 0).double()
    pull, constant, outputs = torch.zeros_like(g), torch.zeros_like(labels), {"energy": [], "distance": [], "mean": []}
    for t, entry in enumerate(case.partners):
        image = torch.arange(B, device=device)
        if isinstance(entry, str):
            pairs = torch.eye(B, device=device) if entry == "self" else 1 - torch.eye(B, device=device)
        else:
            pairs = (entry[:, None] == image).float()
        pairs = pairs.double()  # pairs[n, m]: image m is a partner of n
        count = (present @ pairs @ present).clamp(min=1.0)

        def partner(value: Tensor, pairs: Tensor = pairs) -> Tensor:
            return torch.einsum("nm,...mdk->...ndk", pairs, value)

        def back(value: Tensor, pairs: Tensor = pairs) -> Tensor:
            return torch.einsum("mn,...mdk->...ndk", pairs, value)

        inner = (g * partner(shown)).sum((1, 2, 3)) / LIFT**2 / count
        likeness = (u * partner(u))[0].sum() / LIFT**2 / count
        distance = (present @ pairs @ present - (labels * partner(labels)).sum((1, 2, 3)) / LIFT**2) / count
        mean = likeness if options.get("mean") is None else options["mean"][t].double()
        bias = case.thresholds[..., t].double() + (mean if options.get("relative") else 0.0)
        slope = mean - bias if centred else -bias
        outputs["energy"].append(slope * distance - inner + (0.0 if centred else likeness))
        outputs["distance"].append(distance)
        outputs["mean"].append(mean)
        share = B / count
        pull = pull + share * (partner(shown) + back(g))
        slope = slope if slope.dim() == 0 else slope[:, None, None, None]
        constant = constant + share * slope * (partner(labels) + back(labels))
        if centred:
            constant = constant - share * (back(g) * u / LIFT).sum(2, keepdim=True)

    # gradients
    pulled = features @ to_16(pull * scale.mT, "pull")
    d_c = pulled * inverse + constant
    d_logit = c * (d_c - c * (c * d_c).sum(-1, keepdim=True))
    factor = (
        -upstream * sharpness * math.log(2) * torch.where(totals > 0, 1.0 / totals.clamp(min=1e-30), 0.0) / (LIFT * B)
    )
    d_logit = d_logit * code_inverse * (factor[:, None, None] * (weight / relative[:, None, None]))
    along = (d_logit * toward).sum(-1, keepdim=True) * code_inverse**2
    d_codes = to_16(d_logit, "logits") @ to_16(teacher_unit, "back")[:, None] - along * codes
    image_share = totals / totals.sum().clamp(min=1e-38) if options.get("patch_weight") is not None else ones(B) / B
    d_unit = torch.einsum("hbkz,b->hkz", student_sums, image_share) / LIFT * upstream
    d_student = (d_unit - (d_unit * student_unit).sum(-1, keepdim=True) * student_unit) * student_inverse
    values = {name: torch.stack(value, -1) for name, value in outputs.items()}
    values["data"] = entropy @ image_share / LIFT
    values["total"] = values["energy"].sum(-1) + values["data"]
    gradients = {"codes": to_16(d_codes, "gradient"), "student": d_student}
    if single:
        values |= {name: value[0] for name, value in values.items() if name != "mean"}
        gradients = {name: value[0] for name, value in gradients.items()}
    return Result(values, gradients)


def errors(result: Result, oracle: Result) -> dict[str, float]:
    """Returns the largest errors of the values, and the errors of the gradients relative to their norms."""
    names = ("total", "energy", "data", "distance", "mean")
    out = {name: (result.values[name] - oracle.values[name]).abs().max().item() for name in names}
    for name, truth in oracle.gradients.items():
        out[f"d_{name}"] = ((result.gradients[name] - truth).norm() / truth.norm().clamp(min=1e-30)).item()
    return out


def check_rounding(case: Case, got: Result, oracle: Result) -> None:
    """Checks that a result is the rounded one, so that its error is at most ALLOWED times that of the roundings.

    What is in fp32 adds a few of its units of the terms, which cancel.
    """
    rounded = rounded_objective(case, parts=parts_of(case))
    sizes, gradient_size = {"data": 8.0}, gradient_term_size(case)
    for name, truth in oracle.values.items():
        error, apart = (rounded.values[name] - truth).abs().max(), (got.values[name] - rounded.values[name]).abs().max()
        allowed = (ALLOWED - 1) * error + 4 * FP32_EPS * sizes.get(name, term_size(case))
        assert apart <= allowed, f"{name}: {apart:.2e} from the rounded one, {allowed:.2e} allowed"
    for name, truth in oracle.gradients.items():
        error, apart = (rounded.gradients[name] - truth).norm(), (got.gradients[name] - rounded.gradients[name]).norm()
        allowed = (ALLOWED - 1) * error + 2 * FP32_EPS * (gradient_size if name == "codes" else 8 * truth.norm())
        assert apart <= allowed, f"gradient of {name}: {apart:.2e} from the rounded one, {allowed:.2e} allowed"


def table(**sizes) -> str:
    """Returns a row for each rounding alone and one for all: errors against float64 with inputs in bf16."""
    case = make_case(dtype=torch.bfloat16, **sizes)
    oracle = evaluate(case.to(torch.float64), "torch")
    rows = {f"{name}: {text}": [name] for name, text in ROUNDINGS.items()} | {"all": list(ROUNDINGS)}
    lines = []
    for title, roundings in rows.items():
        figures = errors(rounded_objective(case, roundings), oracle)
        cells = [f"{error:.1e}" if error > 1e-12 else "" for error in figures.values()]
        lines.append(" | ".join([f"| {title}", *cells]) + " |")
    return "\n".join([f"| {sizes} | " + " | ".join(figures) + " |", "| --- " * (len(figures) + 1) + "|", *lines])


if __name__ == "__main__":
    print(table(B=32, P=784, D=384, K=27, Z=64))
    print(table(B=32, P=784, D=384, K=27, Z=64, H=4))
