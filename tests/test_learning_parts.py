"""k-means, the model, what a step draws, label-free figures: each against values worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smooseg_fast.health import closeness, entropy, health, warning
from smooseg_fast.kmeans import principal_directions, spherical_kmeans
from smooseg_fast.model import Head, Projection
from smooseg_fast.objective import Schedule, Settings, make_optimizer, train_step

CPU = torch.device("cpu")


def test_kmeans_finds_separate_groups():
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 20, generator=g), dim=-1)
    group = torch.arange(300) % 5
    rows = (centres[group] + 0.05 * torch.randn(300, 20, generator=g)) * torch.rand(300, 1, generator=g).add(0.1)  # lengths do not matter
    found = spherical_kmeans(rows, 5, starts=5)
    labels = (F.normalize(rows, dim=-1) @ found.centres.T).argmax(1)
    assert all(len(labels[group == k].unique()) == 1 for k in range(5))
    assert len(labels.unique()) == 5
    cosines = (F.normalize(rows, dim=-1) @ found.centres.T).max(1).values
    assert found.inertia == pytest.approx(float(1 - cosines.mean()), abs=1e-6)
    assert torch.equal(found.centres, spherical_kmeans(rows, 5, starts=5).centres)


def test_kmeans_with_repeated_rows_and_zero_rows():
    rows = torch.zeros(20, 4)
    rows[:10, 0] = 1
    found = spherical_kmeans(rows, 4, starts=2)
    assert torch.isfinite(found.centres).all()


def test_principal_directions_keep_inner_products_best():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, generator=g) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) + 1
    found = principal_directions(rows, 8)
    assert found.shape == (8, 6)
    assert (found[6:] == 0).all()
    torch.testing.assert_close(found[:6] @ found[:6].T, torch.eye(6), atol=1e-5, rtol=0)
    codes = rows @ found[:3].T
    singular = torch.linalg.svdvals(rows)
    lost = torch.linalg.matrix_norm(rows @ rows.T - codes @ codes.T)
    torch.testing.assert_close(lost, singular[3:].pow(4).sum().sqrt(), rtol=1e-3, atol=0)


def test_projection_is_the_formula():
    torch.manual_seed(0)
    model = Projection(6, 4)
    f, m1, m2 = torch.randn(2, 5, 6), torch.rand(2, 6), torch.rand(2, 6)
    w = model.state_dict()
    expected = (f * m1[:, None]) @ w["linear.weight"].T + w["linear.bias"]
    hidden = (f * m2[:, None]) @ w["hidden.weight"].T + w["hidden.bias"]
    expected = expected + (hidden * torch.sigmoid(hidden)) @ w["outer.weight"].T + w["outer.bias"]
    torch.testing.assert_close(model(f, m1, m2), expected)
    torch.testing.assert_close(model(f), model(f, torch.ones(2, 6), torch.ones(2, 6)))


def test_starts():
    head = Head(20, 7, 16, seed=3)
    torch.testing.assert_close(head.student.norm(dim=1), torch.ones(7))
    assert torch.equal(head.student, head.teacher)
    assert torch.equal(Head(20, 7, 16, seed=3).student, head.student)
    assert not torch.equal(Head(20, 7, 16, seed=4).student, head.student)
    rows = torch.randn(200, 20)
    head.start_from_features(rows)
    torch.testing.assert_close(head.projection(rows[None])[0], rows @ principal_directions(rows, 16).T, atol=1e-5, rtol=1e-5)


def test_draws_depend_on_seed_and_step_alone():
    schedule, settings = Schedule(23, 5, data_seed=1), Settings((0.1, 0.1), True, patches=4)
    order = [schedule.draws(step, 9, 6, settings, CPU) for step in range(8)]
    for step in (7, 2, 5):  # in any order, from a fresh schedule
        again = Schedule(23, 5, data_seed=1).draws(step, 9, 6, settings, CPU)
        assert all(torch.equal(getattr(again, k), getattr(order[step], k)) for k in ("rows", "partner", "masks", "patches"))
    first_epoch = torch.cat([d.rows for d in order[:4]])
    assert len(first_epoch.unique()) == 20  # 23 rows in batches of 5: the short last batch is dropped
    assert not torch.equal(order[0].rows, order[4].rows)
    for d in order:
        assert (d.partner != torch.arange(5)).all()
        assert set(d.masks.unique().tolist()) <= {0.0, 1.25}
        assert all(len(set(row.tolist())) == 4 for row in d.patches)
    other = Schedule(23, 5, data_seed=2).draws(0, 9, 6, settings, CPU)
    assert not torch.equal(other.masks, order[0].masks)
    share = torch.cat([Schedule(23, 5, 0).draws(s, 9, 400, settings, CPU).masks for s in range(20)]).eq(0).float().mean()
    assert abs(float(share) - 0.2) < 0.01


def test_a_partner_that_is_oneself_takes_the_next():
    partners = torch.stack([Schedule(8, 4, 0).draws(step, 4, 2, Settings((0.0, 0.0), True, dropout=0), CPU).partner for step in range(200)])
    assert (partners != torch.arange(4)).all()
    assert any(len(set(row.tolist())) < 4 for row in partners)  # so partners can repeat


def test_the_step_in_its_order():
    """Losses with the teacher as it stands; the teacher follows the student from before the optimiser's step."""
    torch.manual_seed(0)
    head = Head(6, 3, 4)
    with torch.no_grad():
        head.student.add_(0.1)
    student, teacher = head.student.detach().clone(), head.teacher.clone()
    optimizer = make_optimizer(head, 1e-4, 5e-4)
    settings = Settings((0.1, 0.2), False, teacher_decay=0.9)
    draws = Schedule(2, 2, 0).draws(0, 5, 6, settings, CPU)
    features = torch.randn(2, 5, 6)
    loss = train_step(head, optimizer, features, draws, torch.tensor([0.1, 0.2]), settings)
    torch.testing.assert_close(head.teacher, 0.9 * teacher + 0.1 * student)
    assert 0 < (head.student.detach() - student).abs().max() <= 5.1e-4
    assert loss.total.requires_grad is False
    torch.testing.assert_close(loss.total, loss.energy.sum() + loss.data)


def test_health_by_hand():
    head = Head(2, 2, 2)
    with torch.no_grad():
        head.start_from_features(torch.eye(2).repeat(4, 1) + torch.tensor([[0.0, 0.01]]))
        head.projection.linear.weight.copy_(torch.eye(2))
        head.student.copy_(torch.eye(2))
        head.teacher.copy_(torch.eye(2))
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.stack([torch.stack([a, a, a, a]), torch.stack([a, a, b, b])])
    state = health(head, [images[:1], images[1:]])
    assert state.shares == pytest.approx((0.75, 0.25))
    whole = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert state.perplexity == pytest.approx(math.exp(whole))
    assert state.labels_per_image == pytest.approx((1 + 2) / 2)
    assert state.image_information == pytest.approx((whole - math.log(2) / 2) / whole)
    assert state.agreement == 1.0
    with torch.no_grad():
        head.student.copy_(torch.eye(2).flip(0))
    assert health(head, [images]).agreement == 0.0
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0.0


def test_closeness_and_its_warning():
    g = torch.Generator().manual_seed(0)
    f = torch.randn(4, 50, 8, generator=g) + 1
    within, across = closeness(f, (-0.02, 0.5), relative=False)
    unit = F.normalize(f, dim=-1)
    s = unit @ unit.mT
    w = s - s.mean(2, keepdim=True) + s.mean()
    assert within.mean == pytest.approx(float(s.mean()), abs=1e-6)
    assert within.std == pytest.approx(float(w.std()), abs=1e-5)
    assert within.quantiles[2] == pytest.approx(float(w.median()), abs=1e-3)
    assert within.force == pytest.approx(within.mean + 0.02)
    assert across.mean == pytest.approx(float((unit @ unit.roll(2, 0).mT).mean()), abs=1e-6)
    assert "net forces differ in sign" in warning(within, replace(across, threshold=5.0))
    relative = closeness(f, (0.06, 0.06), relative=True)
    assert [c.force for c in relative] == pytest.approx([-0.06, -0.06])
    assert warning(*relative) is None
