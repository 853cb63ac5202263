"""Probes against their definitions on small cases, and `smooseg evaluate --probes` from end to end."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from smooseg_fast import evaluate
from smooseg_fast.command import run
from smooseg_fast.datasets import IGNORE
from smooseg_fast.datasets.cutting import Cutting
from smooseg_fast.measure import probes
from smooseg_fast.measure.confusion import LabelSquares
from smooseg_fast.measure.probes import Patches, fit_linear, fit_neighbours, probe, sample


class Images(SimpleNamespace):
    """A dataset and its store in one: rows [n,P,D] of 2 x 2 patches, labels [n,4,4]."""

    def __len__(self):
        return len(self.names)


def squares(rows, truth, classes=2):
    """The labels of squares of 4 pixels whose patches of 2 pixels have these rows."""
    names = tuple(map(str, range(len(truth))))
    images = Images(
        name="made",
        names=names,
        crops=[(0, 0)] * len(names),
        class_names=tuple(map(str, range(classes))),
        grid=(2, 2),
        P=4,
        rows=lambda numbers: rows[numbers],
        label=lambda index: truth[index],
        marked=lambda row: False,
        valid=lambda rows: None,
    )
    return LabelSquares(images, images, Cutting(size=4), progress=False)


def in_patches(classes):
    """Labels [n,4,4] of classes [n,2,2]."""
    return np.array(classes, np.uint8).repeat(2, 1).repeat(2, 2)


def test_shares_of_classes_in_patches():
    truth = np.array([[[0, 1, 1, 1], [0, IGNORE, 1, 1], [2, 2, IGNORE, IGNORE], [0, 1, IGNORE, IGNORE]]], np.uint8)
    ((numbers, shares),) = squares(torch.zeros(1, 4, 1), truth, 3).class_shares(3)
    assert numbers.tolist() == [0]
    assert shares.tolist() == [[[0.5, 0.25, 0], [0, 1, 0], [0.25, 0.25, 0.5], [0, 0, 0]]]


def test_a_sample_is_of_labelled_patches_equally_many_of_every_square():
    g = torch.Generator().manual_seed(0)
    rows, classes = torch.randn(40, 4, 3, generator=g), torch.randint(0, 2, (40, 2, 2), generator=g).numpy()
    classes[7], classes[9, 0] = IGNORE, IGNORE
    labels = squares(rows, in_patches(classes))
    drawn = sample(labels, lambda numbers: rows[numbers], 2, 120)
    assert drawn.rows.shape == (38 * 3 + 2, 3)
    assert drawn.shares.sum(1).eq(1).all()
    known = {tuple(row.tolist()): number for row, number in zip(rows.flatten(0, 1), classes.reshape(-1))}
    assert [known[tuple(row.tolist())] for row in drawn.rows] == drawn.shares.argmax(1).tolist()
    assert len({tuple(row.tolist()) for row in drawn.rows}) == len(drawn.rows)
    again = sample(labels, lambda numbers: rows[numbers], 2, 120)
    assert torch.equal(again.rows, drawn.rows)


def test_the_linear_probe_is_the_minimum_of_its_objective():
    g = torch.Generator().manual_seed(1)
    rows = torch.randn(60, 3, generator=g) * torch.tensor([1.0, 20.0, 0.1]) + torch.tensor([0.0, -5.0, 3.0])
    shares = torch.softmax(3 * torch.randn(60, 4, generator=g), 1) * torch.rand(60, 1, generator=g)
    linear = fit_linear(Patches(rows, shares))
    x, y = rows.double().numpy(), shares.double().numpy()
    mean, std = x.mean(0), x.std(0)

    def objective(flat):
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = (x - mean) / std @ weight + bias
        entropy = (y * (np.log(np.exp(logits).sum(1, keepdims=True)) - logits)).sum() / y.sum()
        return entropy + probes.DECAY / 2 * (weight**2).sum()

    best = minimize(objective, np.zeros(16)).fun
    weight = linear.weight.double().numpy() * std[:, None]
    bias = linear.bias.double().numpy() + mean @ linear.weight.double().numpy()
    assert objective(np.concatenate([weight.ravel(), bias])) == pytest.approx(best, abs=1e-5)
    assert linear(rows).shape == (60, 4)


def test_a_channel_that_never_changes_does_no_harm():
    linear = fit_linear(Patches(torch.tensor([[5.0, 1.0], [5.0, -1.0]]), torch.eye(2)))
    assert linear.weight.isfinite().all()
    assert linear(torch.tensor([[5.0, 2.0], [5.0, -2.0]])).argmax(1).tolist() == [0, 1]


def test_neighbours_vote_by_their_cosine(monkeypatch):
    monkeypatch.setattr(probes, "NEIGHBOURS", 2)
    bank = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])  # lengths do not count
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    angle = math.radians(30)
    votes = fit_neighbours(Patches(bank, shares))(torch.tensor([[[math.cos(angle), math.sin(angle)]]]))
    first, second = (math.exp(cosine / probes.TEMPERATURE) for cosine in (math.cos(angle), math.sin(angle)))
    expected = (first * shares[0] + second * shares[1]) / (first + second)
    assert votes.shape == (1, 1, 2)
    assert torch.allclose(votes[0, 0], expected, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 3, 2048])
def test_fewer_patches_than_neighbours_and_any_number_at_a_time(queries, monkeypatch):
    monkeypatch.setattr(probes, "QUERIES", queries)
    fitted = fit_neighbours(Patches(torch.eye(3), torch.eye(3)))
    assert fitted(torch.eye(3).expand(2, 3, 3)).argmax(2).tolist() == 2 * [[0, 1, 2]]


def test_probes_learn_from_train_and_are_scored_on_val():
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    g = torch.Generator().manual_seed(2)
    classes = torch.randint(0, 2, (20, 2, 2), generator=g)
    features, truth = rows[classes.flatten(1)], in_patches(classes.numpy())
    train = squares(features, truth)
    views = {"features": lambda labels: labels.store.rows, "nothing": lambda labels: lambda n: torch.ones(len(n), 4, 2)}
    right = probe(train, squares(features, truth), views)
    wrong = probe(train, squares(features, 1 - truth), views)
    for kind in ("linear", "neighbours"):
        accuracy, mirrored = right["features"][kind].accuracy, wrong["features"][kind].accuracy
        assert accuracy > 0.95  # pixels between patches are upsampled
        assert mirrored == pytest.approx(1 - accuracy)
        assert right["features"][kind].mapping == (0, 1)
    most = max((truth == 0).mean(), (truth == 1).mean())
    assert right["nothing"]["linear"].accuracy == pytest.approx(most)


def test_evaluate_reports_probes(trained, labelled, capsys):
    args = ["--checkpoint", str(trained), "--data", str(labelled), "--eval-size", "56", "--no-mirror"]
    assert run(evaluate.main, [*args, "--probes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  accuracy")[0].strip() for line in lines if ", features" in line or ", codes" in line] == [
        "linear map, features",
        "20 nearest neighbours, features",
        "linear map, codes",
        "20 nearest neighbours, codes",
    ]
    scores = json.loads((trained.parent / "evaluation" / "scores.json").read_text())
    for view in ("features", "codes"):
        assert scores["probes"][view]["linear"]["accuracy"] > 0.9  # two textures
        assert scores["probes"][view]["neighbours"]["matching"] == "probe"
    assert run(evaluate.main, args) == 0
    assert "probes" not in json.loads((trained.parent / "evaluation" / "scores.json").read_text())


@pytest.mark.parametrize(
    ("flags", "folder", "error"),
    [
        (["--whole"], ".", "--probes: measure central squares"),
        ([], "train", "--probes: train has no images apart"),
    ],
)
def test_probes_that_cannot_be_fitted(flags, folder, error, trained, labelled, capsys):
    data = str(labelled / folder)
    assert run(evaluate.main, ["--checkpoint", str(trained), "--data", data, "--probes", *flags]) == 2
    assert f"error: {error}" in capsys.readouterr().err
