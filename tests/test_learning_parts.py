"""k-means, the model, what a step draws, label-free figures: each against values worked out by hand."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from smooseg_fast.features.sample import Batch
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.learn.step import PIECE, PiecewiseAdam, make_optimizer, train_step
from smooseg_fast.measure.health import entropy, health
from smooseg_fast.segment import model
from smooseg_fast.segment.checkpoint import head_of
from smooseg_fast.segment.kmeans import principal_directions, spherical_kmeans
from smooseg_fast.segment.model import Head, Heads, basis_of, channels_of, project
from smooseg_kernels import products

CPU = torch.device("cpu")


def test_kmeans_finds_separate_groups():
    g = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 20, generator=g), dim=-1)
    group = torch.arange(300) % 5
    rows = (centres[group] + 0.05 * torch.randn(300, 20, generator=g)) * torch.rand(300, 1, generator=g).add(
        0.1
    )  # lengths do not matter
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


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Runs the projection's form for a card on the CPU."""
    monkeypatch.setattr(model, "InBlocks", SimpleNamespace(apply=lambda *inputs: model.Whole.apply(*inputs[:-1])))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("form", ["on a CPU", "on a card", "compiled"])
@pytest.mark.parametrize("H", [1, 3])
def test_projection_is_the_formula(masks, form, H, monkeypatch, request):
    """Values and gradients, for each head."""
    torch.manual_seed(0)
    single = [Head(6, 3, 4, seed).double() for seed in range(H)]
    heads, features = Heads(single), torch.randn(2, 5, 6, dtype=torch.float64)
    m1, m2 = (torch.rand(2, 2, 6, dtype=torch.float64) > 0.3).double() * 1.25 if masks else (None, None)
    upstream = torch.randn(H, 2, 5, 4, dtype=torch.float64)
    if form == "on a card":
        request.getfixturevalue("as_on_a_card")
    elif form == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    got = heads.codes(features, m1, m2)
    (got * upstream).sum().backward()
    for h, head in enumerate(single):
        p = head.projection
        first, second = (features if m is None else features * m[:, None] for m in (m1, m2))
        x = second @ p.hidden.weight.T + p.hidden.bias
        expected = first @ p.linear.weight.T + p.linear.bias + (x * torch.sigmoid(x)) @ p.outer.weight.T + p.outer.bias
        torch.testing.assert_close(got[h], expected)
        (expected * upstream[h]).sum().backward()
        gradients = {name: value.grad[h] for name, value in heads.projection.named_parameters()}
        for name, value in p.named_parameters():
            torch.testing.assert_close(gradients[name], value.grad)
        torch.testing.assert_close(head.projection(features), heads.codes(features)[h])
        with torch.no_grad():
            torch.testing.assert_close(heads.codes(features, m1, m2)[h], expected)


@pytest.mark.parametrize(("form", "H"), [("on a CPU", 2), ("on a card", 1), ("on a card", 2)])
def test_projection_in_bf16(form, H, request):
    """Features of bf16 make the products so: codes bf16, gradients in the weights' own dtype and as near as one
    rounding each.
    """
    if form == "on a card":
        request.getfixturevalue("as_on_a_card")
    heads, features = Heads([Head(24, 3, 8, seed) for seed in range(H)]), torch.randn(5, 40, 24).bfloat16()
    m1, m2 = ((torch.rand(5, 24) > 0.2).float() * 1.25 for _ in "12")
    upstream, found = torch.randn(H, 5, 40, 8), {}
    for dtype in (torch.bfloat16, torch.float32):
        heads.zero_grad()
        codes = heads.codes(features.to(dtype), m1, m2)
        assert codes.dtype == dtype
        (codes.float() * upstream).sum().backward()
        found[dtype] = [codes.float().detach(), *(p.grad for p in heads.projection.parameters())]
    for narrow, wide in zip(*found.values()):
        assert narrow.dtype == torch.float32
        assert 0 < (narrow - wide).norm() < 0.01 * wide.norm()


@pytest.mark.parametrize("masks", [True, False])
def test_the_size_of_a_block_changes_nothing(masks, monkeypatch):
    heads, features = (
        Heads([Head(6, 3, 4, seed) for seed in range(2)]).double(),
        torch.randn(5, 7, 6, dtype=torch.float64),
    )
    m1, m2 = torch.rand(2, 5, 6, dtype=torch.float64) if masks else (None, None)
    found = []
    for images in (1, 2, 5):  # 2 leaves a last block of one
        monkeypatch.setattr(model, "BLOCK_BYTES", images * 2 * features[0].nbytes)
        heads.zero_grad()
        codes = heads.codes(features, m1, m2)
        codes.square().sum().backward()
        found.append([codes.detach(), *(p.grad for p in heads.projection.parameters())])
        with torch.no_grad():
            torch.testing.assert_close(heads.codes(features, m1, m2), codes)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


@pytest.mark.parametrize("H", [1, 3])
def test_products_by_onednn_are_as_exact_as_pytorchs(H, monkeypatch):
    torch.manual_seed(0)
    heads = Heads([Head(6, 3, 4, seed) for seed in range(H)])
    features, masks = torch.randn(5, 7, 6), torch.rand(2, 5, 6)
    monkeypatch.setattr(model, "BLOCK_BYTES", H * 2 * features[0].nbytes)
    for least in ("LEAST_PRODUCTS", "LEAST_SHARED_PRODUCTS", "LEAST_SHARED_PRODUCT"):
        monkeypatch.setattr(products, least, 1)
    results = []
    for dtype, has_library in ((torch.float64, False), (torch.float32, torch.backends.mkldnn.is_available())):
        monkeypatch.setattr(products, "library_idles", lambda has_library=has_library: has_library)
        heads = heads.to(dtype)
        heads.zero_grad()
        codes = heads.codes(features.to(dtype), *masks.to(dtype))
        codes.square().sum().backward()
        results.append([codes.detach().double(), *(p.grad.double().clone() for p in heads.projection.parameters())])
    for exact, value in zip(*results):
        torch.testing.assert_close(value, exact, rtol=0, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("stored", "codes"), [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str
)
def test_resident_features_decide_the_products(stored, codes, monkeypatch):
    heads, seen = Heads([Head(6, 3, 4)]), []
    monkeypatch.setattr(
        Heads, "codes", lambda self, f, *masks: seen.append(f.dtype) or model.codes_of(f, self.projection, *masks)
    )
    settings, features = Settings(relative=True), torch.randn(4, 9, 6).to(stored)
    Loop(heads, features, (9, 6), Schedule(4, 2, 0), torch.zeros(1, 2), settings, lr=1e-3, lr_prototypes=1e-3).step(0)
    assert seen == [codes]


@pytest.mark.parametrize(("least", "threads"), [(2 * 4 * 5 * 6, 2), (2 * 4 * 5 * 6 + 1, 1)])
def test_small_steps_take_one_thread(least, threads, monkeypatch):
    """A step's numbers are heads x squares x patches x channels; the caller's threads come back, also after errors."""
    seen = []

    def step(*inputs, **options):
        seen.append(torch.get_num_threads())
        raise ValueError("stop")

    monkeypatch.setattr("smooseg_fast.learn.loop.train_step", step)
    monkeypatch.setattr("smooseg_fast.learn.loop.LEAST_SHARED_NUMBERS", least)
    settings, rates = Settings(relative=True, patches=5), {"lr": 1e-3, "lr_prototypes": 1e-3}
    heads, schedule = Heads([Head(6, 3, 4, seed) for seed in range(2)]), Schedule(9, 4, 0)
    steps = Loop(heads, torch.randn(9, 7, 6), (7, 6), schedule, torch.zeros(2, 2), settings, **rates)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="stop"):
            steps.step(0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [threads]


def test_steps_in_bf16_go_on_bit_equal_from_a_copy():
    features = torch.randn(6, 50, 24).bfloat16()

    def loop(heads):
        return Loop(
            heads,
            features,
            (50, 24),
            Schedule(6, 3, 0),
            torch.tensor([[0.0, 0.1]]),
            Settings(relative=True),
            lr=1e-2,
            lr_prototypes=1e-2,
        )

    whole = loop(Heads([Head(24, 3, 8)]))
    for step in range(2):
        whole.step(step)
    rest = loop(Heads([whole.heads[0]]))
    rest.optimizer.load_state_dict(deepcopy(whole.optimizer.state_dict()))
    for step in range(2, 4):
        ends = whole.step(step).total, rest.step(step).total
    assert torch.equal(*ends)
    for name, value in whole.heads.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rest.heads.state_dict()[name]), name


def test_starts():
    head = Head(20, 7, 16, seed=3)
    torch.testing.assert_close(head.student.norm(dim=1), torch.ones(7))
    assert torch.equal(head.student, head.teacher)
    assert torch.equal(Head(20, 7, 16, seed=3).student, head.student)
    assert not torch.equal(Head(20, 7, 16, seed=4).student, head.student)
    rows = torch.randn(200, 20)
    head.start_from_features(rows)
    torch.testing.assert_close(
        head.projection(rows[None])[0], rows @ principal_directions(rows, 16).T, atol=1e-5, rtol=1e-5
    )


def test_draws_depend_on_seed_and_step_alone():
    schedule, settings = Schedule(23, 5, data_seed=1), Settings(True, patches=4)
    order = [schedule.draws(step, 9, 6, settings, CPU) for step in range(8)]
    for step in (7, 2, 5):  # in any order, from a fresh schedule
        again = Schedule(23, 5, data_seed=1).draws(step, 9, 6, settings, CPU)
        assert all(
            torch.equal(getattr(again, k), getattr(order[step], k)) for k in ("rows", "partner", "masks", "patches")
        )
    first_epoch = torch.cat([d.rows for d in order[:4]])
    assert len(first_epoch.unique()) == 20  # 23 rows in batches of 5: the short last batch is dropped
    assert not torch.equal(order[0].rows, order[4].rows)
    for d in order:
        assert (d.partner != torch.arange(5)).all()
        assert d.masks.dtype == torch.bool
        assert all(len(set(row.tolist())) == 4 for row in d.patches)
    other = Schedule(23, 5, data_seed=2).draws(0, 9, 6, settings, CPU)
    assert not torch.equal(other.masks, order[0].masks)
    share = (
        torch.cat([Schedule(23, 5, 0).draws(s, 9, 400, settings, CPU).masks for s in range(20)])
        .logical_not()
        .float()
        .mean()
    )
    assert abs(float(share) - 0.2) < 0.01


def test_a_partner_that_is_oneself_takes_the_next():
    partners = torch.stack(
        [Schedule(8, 4, 0).draws(step, 4, 2, Settings(True, dropout=0), CPU).partner for step in range(200)]
    )
    assert (partners != torch.arange(4)).all()
    assert any(len(set(row.tolist())) < 4 for row in partners)  # so partners can repeat


def test_the_step_in_its_order():
    """Losses with the teacher as it stands; the teacher follows the student from before the optimiser's step."""
    torch.manual_seed(0)
    heads = Heads([Head(6, 3, 4, seed) for seed in range(2)])
    with torch.no_grad():
        heads.student.add_(0.1)
    student, teacher = heads.student.detach().clone(), heads.teacher.clone()
    optimizer = make_optimizer(heads, 1e-4, 5e-4)
    settings = Settings(False, teacher_decay=0.9)
    draws = Schedule(2, 2, 0).draws(0, 5, 6, settings, CPU)
    features = torch.randn(2, 5, 6)
    loss = train_step(heads, optimizer, features, draws, torch.tensor([[0.1, 0.2]] * 2), settings)
    torch.testing.assert_close(heads.teacher, 0.9 * teacher + 0.1 * student)
    assert 0 < (heads.student.detach() - student).abs().max() <= 5.1e-4
    assert loss.total.requires_grad is False
    torch.testing.assert_close(loss.total, loss.energy.sum(1) + loss.data)


def test_adam_in_pieces_is_adam():
    """Bit for bit, through a saved state too; lengths below, at and beyond a piece."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((3, 9000), (7,), (PIECE,), (2 * PIECE + 1,))]
    whole, pieces = ([torch.nn.Parameter(tensor.clone()) for tensor in start] for _ in "12")
    optimizers = torch.optim.Adam(whole, lr=1e-2, fused=True), PiecewiseAdam(pieces, lr=1e-2, fused=True)
    for step in range(4):
        for one, other in zip(whole, pieces):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        if step == 2:
            optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
        for optimizer in optimizers:
            optimizer.step()
        assert all(torch.equal(one, other) for one, other in zip(whole, pieces))


def test_draws_are_mapped_field_by_field():
    draws = Schedule(8, 4, 0).draws(0, 9, 6, Settings(True, patches=4), CPU)
    doubled = draws.map(lambda value: 2 * value)
    assert len(draws.tensors()) == 4
    assert all(torch.equal(b, 2 * a) for a, b in zip(draws.tensors(), doubled.tensors()))
    bare = Schedule(8, 4, 0).draws(0, 9, 6, Settings(True, dropout=0), CPU).map(lambda value: value)
    assert (bare.masks, bare.patches, len(bare.tensors())) == (None, None, 2)


def test_health_by_hand():
    head = Head(2, 2, 2)
    with torch.no_grad():
        head.start_from_features(torch.eye(2).repeat(4, 1) + torch.tensor([[0.0, 0.01]]))
        head.projection.linear.weight.copy_(torch.eye(2))
        head.student.copy_(torch.eye(2))
        head.teacher.copy_(torch.eye(2))
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    images = torch.stack([torch.stack([a, a, a, a]), torch.stack([a, a, b, b])])
    (state,) = health(Heads([head]), [Batch(images[:1]), Batch(images[1:])])
    assert state.shares == pytest.approx((0.75, 0.25))
    whole = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert state.perplexity == pytest.approx(math.exp(whole))
    assert state.labels_per_image == pytest.approx((1 + 2) / 2)
    assert state.image_information == pytest.approx((whole - math.log(2) / 2) / whole)
    assert state.agreement == 1.0
    with torch.no_grad():
        head.student.copy_(torch.eye(2).flip(0))
    both = health(Heads([head, Head(2, 2, 2)]), [Batch(images)])
    assert both[0].agreement == 0.0
    assert both[1].agreement == 1.0
    assert float(entropy(torch.tensor([1.0, 0.0]))) == 0.0


def test_one_of_many_heads():
    single = [Head(6, 3, 4, seed) for seed in range(3)]
    for name, value in Heads(single)[1].state_dict().items():
        assert torch.equal(value, single[1].state_dict()[name])
    with pytest.raises(IndexError, match="head 3 of 3"):
        Heads(single)[3]
    state = Heads(single).state_dict()
    for name, value in Heads.from_state(state).state_dict().items():
        assert torch.equal(value, state[name]), name


def make_loop(heads, features, thresholds, **settings):
    sizes, schedule = features.shape[1:], Schedule(len(features), 4, data_seed=5)
    return Loop(
        heads, features, sizes, schedule, thresholds, Settings(relative=True, **settings), lr=1e-3, lr_prototypes=5e-3
    )


@pytest.mark.parametrize("settings", [{}, {"patches": 5}, {"dropout": 0.0}], ids=str)
def test_each_head_of_many_learns_as_it_would_alone(settings):
    torch.manual_seed(0)
    features = torch.randn(9, 12, 10) + torch.randn(9, 1, 10)
    thresholds = torch.tensor([[0.1, 0.1], [-0.1, -0.1], [0.1, 0.1]])
    seeds = (0, 0, 7)
    together = make_loop(Heads([Head(10, 4, 8, seed) for seed in seeds]), features, thresholds, **settings)
    alone = [
        make_loop(Heads([Head(10, 4, 8, seed)]), features, b[None], **settings) for seed, b in zip(seeds, thresholds)
    ]
    for step in range(12):
        losses, single = together.step(step), [loop.step(step) for loop in alone]
        torch.testing.assert_close(losses.total, torch.cat([loss.total for loss in single]), rtol=1e-4, atol=1e-5)
    for h, loop in enumerate(alone):
        for name, value in together.heads[h].state_dict().items():
            torch.testing.assert_close(value, loop.heads[0].state_dict()[name], rtol=1e-3, atol=1e-4)
    assert (together.heads.student[0] - together.heads.student[1]).abs().max() > 1e-3  # thresholds part them


def test_a_head_that_broke_leaves_the_others_alone():
    torch.manual_seed(0)
    features = torch.randn(9, 12, 10)
    heads = Heads([Head(10, 4, 8, 0), Head(10, 4, 8, 0)])
    with torch.no_grad():
        heads.projection.linear.weight[1] = float("nan")
    loop, whole = (
        make_loop(heads, features, torch.full((2, 2), 0.1)),
        make_loop(Heads([Head(10, 4, 8, 0)]), features, torch.full((1, 2), 0.1)),
    )
    for step in range(5):
        losses, alone = loop.step(step), whole.step(step)
    assert losses.total[1].isnan()
    torch.testing.assert_close(losses.total[:1], alone.total, rtol=1e-4, atol=1e-5)


def test_what_a_warm_up_changes_is_put_back():
    torch.manual_seed(0)
    features = torch.randn(9, 12, 10)
    loop = make_loop(Heads([Head(10, 4, 8, 0)]), features, torch.full((1, 2), 0.1))
    fresh = make_loop(Heads([Head(10, 4, 8, 0)]), features, torch.full((1, 2), 0.1))
    with loop.undone():
        for step in range(3):
            loop.step(step)
    for step in range(3):
        assert torch.equal(loop.step(step).total, fresh.step(step).total)


# a projection of few channels


def test_a_basis_keeps_the_cosines_and_spreads_the_channels_evenly():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(500, 6, generator=g) @ torch.randn(6, 40, generator=g)  # six directions in all
    basis = basis_of(rows, 8)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(8), rtol=0, atol=2e-7)
    few = channels_of(rows, basis)
    # float32 sums of forty products: measured 3e-7
    torch.testing.assert_close(cosines(few), cosines(rows), rtol=0, atol=3e-6)
    shares = few.square().sum(0) / few.square().sum()
    assert shares.max() < 4 * shares.min(), "no channel stands for the leading direction alone"
    assert torch.equal(basis, basis_of(rows, 8))


def cosines(rows):
    rows = torch.nn.functional.normalize(rows, dim=-1)
    return rows @ rows.mT


def test_heads_with_a_basis_are_heads_on_its_channels():
    basis = basis_of(torch.randn(90, 12, generator=torch.Generator().manual_seed(1)), 5)
    single = [Head(12, 3, 4, seed, basis=basis) for seed in range(2)]
    plain = Heads([Head(5, 3, 4, seed) for seed in range(2)])
    heads, features, masks = Heads(single), torch.randn(2, 7, 12), torch.rand(2, 2, 12)
    assert single[0].dim == heads[1].dim == heads.dim == 12
    few = features @ basis.mT
    for got, expected in (
        (heads.codes(features), plain.codes(few)),
        (heads.codes(features, *masks), plain.codes(few, *masks[..., :5])),
        (torch.stack([project(head, features) for head in single]), plain.codes(few)),
    ):
        torch.testing.assert_close(got, expected)
    again = Heads.from_state(heads.state_dict())
    assert torch.equal(again.codes(features, *masks), heads.codes(features, *masks))
    assert torch.equal(head_of(heads[1].state_dict()).basis, basis)
    rows = torch.randn(60, 12)
    single[0].start_from_features(rows)
    start = Head(5, 3, 4)
    start.start_from_features(rows @ basis.mT)
    torch.testing.assert_close(single[0].projection.linear.weight, start.projection.linear.weight)
