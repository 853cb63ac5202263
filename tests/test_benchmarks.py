"""The benchmarks' own parts: nothing wrong gets a number, repeated patches keep the oracle, what a run prints."""

from __future__ import annotations

import functools

import bench_losses
import measure
import memory
import problems
import pytest
import results
import torch
from floors import PairProblem, Problem

SIZE = problems.of_dtype(Problem(B=2, P=24, D=20, Z=6, K=5), torch.float32)
MODE = "forward + backward"


def passes(impl, size=SIZE, mode=MODE, function=None) -> None:
    subject = problems.objective(size, impl, mode, torch.float32, "cpu", function=function)
    subject.check(subject.run())


@pytest.fixture(autouse=True)
def fresh_oracle():
    problems.truth.cache_clear()
    yield
    problems.truth.cache_clear()


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("H", [1, 3])
@pytest.mark.parametrize("impl", ["dense", "torch"])
@pytest.mark.parametrize("mode", ["forward", MODE])
def test_a_right_answer_passes(repeated, H, impl, mode, monkeypatch):
    size = Problem(**{**problems.letters(SIZE), "H": H, "element": 4})
    if repeated:
        monkeypatch.setattr(problems, "ORACLE_PAIRS", 2 * H * 8**2)
        assert problems.oracle_patches(size) == 8
    passes(impl, size, mode)


def scaled(features, codes, student, teacher, partners, thresholds):
    return (1 + 1e-4) * problems.total_of("torch", features, codes, student, teacher, partners, thresholds)


def without_last_patch(features, codes, student, teacher, partners, thresholds):
    return problems.total_of("torch", features[:, :-1], codes[:, :-1], student, teacher, partners, thresholds)


def no_gradient_to_the_student(features, codes, student, teacher, partners, thresholds):
    return (
        problems.total_of("torch", features, codes, student.detach(), teacher, partners, thresholds) + 0 * student.sum()
    )


@pytest.mark.parametrize("wrong", [scaled, without_last_patch, no_gradient_to_the_student])
@pytest.mark.parametrize("repeated", [False, True])
def test_a_wrong_answer_is_refused(wrong, repeated, monkeypatch):
    if repeated:
        monkeypatch.setattr(problems, "ORACLE_PAIRS", 2 * 8**2)
    with pytest.raises(AssertionError):
        passes("torch", function=wrong)


PAIRS = problems.of_dtype(PairProblem(B=2, P=24, D=20, Z=6), torch.float32)


def pairs_pass(impl, mode=MODE, function=None) -> None:
    subject = problems.pairs(PAIRS, impl, mode, torch.float32, "cpu", function=function)
    subject.check(subject.run())


def stretched(*inputs):
    out = problems.pair_energy_of("torch", *inputs)
    return out._replace(energy=(1 + 1e-4) * out.energy, similarity=(1 + 1e-4) * out.similarity)


def one_sided(features_i, codes_i, features_j, codes_j, partner):
    out = problems.pair_energy_of("torch", features_i, codes_i, features_j, codes_j.detach(), partner)
    return out._replace(energy=out.energy + 0 * codes_j.sum())


@pytest.mark.parametrize("repeated", [False, True])
def test_energies_of_pairs(repeated, monkeypatch):
    if repeated:
        monkeypatch.setattr(problems, "ORACLE_PAIRS", 2 * 8**2)
    for impl in ("dense", "torch"):
        pairs_pass(impl)
        pairs_pass(impl, "forward")
    for wrong in (stretched, one_sided):
        with pytest.raises(AssertionError):
            pairs_pass("torch", function=wrong)


def test_a_wrong_step_and_wrong_labels_are_refused(monkeypatch):
    build = functools.partial(
        problems.assignment, problems.of_dtype(Problem(B=2, P=16, Z=6, K=5), torch.float32), mode="forward"
    )
    subject = build(impl="torch", dtype=torch.float32, device="cpu", pixels=12)
    labels, counts = subject.run()
    subject.check((labels, counts))
    with pytest.raises(AssertionError, match="differ"):
        subject.check(((labels + 1) % 5, counts))
    with pytest.raises(AssertionError, match="counts"):
        subject.check((labels, counts + 1))
    step = problems.head_step(SIZE, "torch", "step", torch.float32, "cpu")
    loss = step.run()
    step.check(loss)
    with pytest.raises(AssertionError, match="total"):
        step.check(loss._replace(total=loss.total + 1e-3))


def test_percentiles():
    assert measure.percentiles([5.0]) == {"n": 1, "calls": 1, "median_ms": 5.0, "p20_ms": 5.0, "p80_ms": 5.0}
    got = measure.percentiles([float(x) for x in range(11)], calls=4)
    assert got == {"n": 11, "calls": 4, "median_ms": 5.0, "p20_ms": 2.0, "p80_ms": 8.0}


def test_the_printed_summary():
    row = {"case": "assign", "shape": "s8", "impl": "torch", "mode": "forward"}
    numbers = {"n": 5, "median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 3.0, "times_floor": 4.0, "peak_bytes": 7e6}
    timed, skipped = results.summary([row | numbers, row | {"skipped": "too large"}])
    assert timed.split()[:4] == ["assign", "s8", "torch", "forward"]
    assert timed.endswith("median_ms 2, p20_ms 1.5, p80_ms 3, n 5, times_floor 4, peak_bytes 7e+06")
    assert skipped.endswith("too large")


def test_memory_and_times_on_a_rotation():
    first, *others = problems.rotation("objective", SIZE, "torch", MODE, "float32", "cpu")
    assert not others  # a CPU's cache is not rotated
    assert measure.timed(first.run, "cpu", seconds=0)["n"] == 3
    large = Problem(B=2, P=784, D=20, Z=6, K=5)
    assert memory.peak_bytes("objective", large, "dense", MODE, "float32") > 2 * 784**2 * 4  # one matrix of pairs


@pytest.mark.parametrize("case", bench_losses.LOSSES)
def test_losses_of_other_trainers(case, monkeypatch):
    size = Problem(B=2, P=24, D=20, Z=6, K=5) if case == "crf energy" else PAIRS
    for pairs in (problems.ORACLE_PAIRS, 24**2):  # all images, and the first alone
        monkeypatch.setattr(problems, "ORACLE_PAIRS", pairs)
        loss = problems.SUBJECTS[case](problems.of_dtype(size, torch.float32), "torch", MODE, torch.float32, "cpu")
        outputs = loss.run()
        loss.check(outputs)
    monkeypatch.undo()
    for n in range(len(outputs)):
        with pytest.raises(AssertionError, match="off by"):
            loss.check([value + 1e-3 * (k == n) for k, value in enumerate(outputs)])
