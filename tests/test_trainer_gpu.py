"""Runs on a card: the same learning as on a CPU, features resident, codes in bf16."""

import numpy as np
import pytest
import torch
from textures import draw

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast.learn import loop as loops
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.learn.step import chosen
from smooseg_fast.segment.model import Head, Heads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

SMALL = dict(size=128, eval_size=128, steps=30, batch_size=4, prototypes=2, progress=False)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return [draw(number, 144, 192)[0] for number in range(6)]


@pytest.mark.parametrize("impl", ["auto", "triton", "torch", "dense"])
def test_two_textures_are_told_apart(images, impl):
    segmenter = smooseg_fast.fit(images, device="cuda", impl=impl, **SMALL)
    assert segmenter.head.teacher.is_cuda
    image, label = draw(9, 144, 192)
    same = (segmenter.predict(image) == label).mean()
    assert max(same, 1 - same) > 0.9


def test_a_checkpoint_moves_between_devices(images, tmp_path):
    segmenter = smooseg_fast.fit(images, device="cuda", **SMALL)
    path = segmenter.save(tmp_path / "one.safetensors")
    on_cpu = smooseg_fast.Segmenter.load(path, device="cpu")
    image = draw(9)[0]
    assert (segmenter.predict(image) != on_cpu.predict(image)).mean() < 0.01


def test_deterministic_runs_are_bit_equal(images):
    first, again = (smooseg_fast.fit(images, device="cuda", deterministic=True, **SMALL) for _ in range(2))
    for name, value in first.head.state_dict().items():
        assert torch.equal(value, again.head.state_dict()[name]), name


# captured steps


def loop_of(features, *, resident=True, capture=True, **settings):
    source = features.cuda() if resident else lambda rows: features[rows].float()
    heads = Heads([Head(64, 7, 16, seed) for seed in (0, 1)]).cuda()
    thresholds = torch.tensor([[0.06, 0.06], [-0.05, -0.05]])
    options = dict(lr=2**-10, lr_prototypes=2**-8, capture=capture)
    sizes, settings = features.shape[1:], Settings(relative=True, **settings)
    return Loop(heads, source, sizes, Schedule(len(features), 8, 3), thresholds, settings, **options)


@pytest.fixture
def features():
    g = torch.Generator().manual_seed(0)
    return (torch.randn(24, 97, 64, generator=g) + torch.randn(24, 1, 64, generator=g)).half()


@pytest.mark.parametrize("patches", [None, 50])
@pytest.mark.parametrize("dropout", [0.2, 0.0])
def test_a_card_draws_what_a_cpu_draws(patches, dropout):
    schedule, settings = Schedule(24, 8, 3), Settings(relative=True, dropout=dropout, patches=patches)
    both = [schedule.choices(60, 70, 97, 33, settings, torch.device(device)) for device in ("cuda", "cpu")]
    for on_card, expected in zip(*both):
        assert on_card is expected is None or torch.equal(on_card.cpu(), expected)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("patches", [None, 196])
def test_a_captured_step_reads_its_own_draws_and_batch(resident, patches, monkeypatch):
    """Over 130 steps and two borders of blocks, while the card lags behind the host and the copies."""
    P, D = 784, 64
    features, captured, replayed = torch.randn(24, P, D).half(), {}, []

    def read(heads, optimizer, source, draws, *_, **options):
        torch.cuda._sleep(500_000)  # what comes too early overwrites what is not read yet
        batch = chosen(source, draws)
        captured.update(batch=batch, partner=draws.partner, masks=draws.masks, patches=draws.patches)

    monkeypatch.setattr(loops, "train_step", read)
    loop = loop_of(features, resident=resident, patches=patches)
    for number in range(10, 140):
        loop.step(number)
        replayed.append({name: None if value is None else value.clone() for name, value in captured.items()})
    assert loop.not_captured is None
    cpu, schedule = torch.device("cpu"), Schedule(24, 8, 3)
    for number, got in zip(range(10, 140), replayed):
        draws = schedule.draws(number, P, D, loop.settings, cpu)
        expected = {"batch": chosen(features, draws), **{name: getattr(draws, name) for name in list(got)[1:]}}
        for name, value in expected.items():
            same = got[name] is value is None or torch.equal(got[name].cpu(), value.to(got[name].dtype))
            assert same, (number, name)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("patches", [None, 50])
def test_a_captured_step_is_the_step(features, resident, patches, impl):
    """Replayed from a graph or not: the same heads; the steps that warm up leave no trace."""
    runs = []
    for capture in (True, False):
        loop = loop_of(features, resident=resident, capture=capture, patches=patches, impl=impl)
        losses = torch.stack([loop.step(step).total.clone() for step in range(55, 75)])
        assert loop.not_captured is None
        runs.append((losses, loop.heads.state_dict()))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-5, atol=1e-6)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(value, runs[1][1][name], rtol=1e-4, atol=1e-5)


def test_a_changed_rate_takes_effect_in_a_captured_step(features):
    loop = loop_of(features)
    scheduler = torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: float(step != 1))
    loop.step(0)
    scheduler.step()
    before = loop.heads.student.detach().clone()
    loop.step(1)
    assert torch.equal(loop.heads.student, before)
    scheduler.step()
    loop.step(2)
    assert not torch.equal(loop.heads.student, before)


def test_a_step_that_waits_for_the_card_is_not_captured(features, monkeypatch):
    step = loops.train_step

    def waiting(*args, **options):
        losses = step(*args, **options)
        losses.total.sum().item()
        return losses

    plain = loop_of(features, capture=False)
    expected = [plain.step(number).total for number in range(3)]
    monkeypatch.setattr(loops, "train_step", waiting)
    loop = loop_of(features)
    for number in range(3):
        torch.testing.assert_close(loop.step(number).total, expected[number])
    assert "captur" in loop.not_captured


def test_memory_that_runs_out_in_a_capture_is_no_failed_capture(features, monkeypatch):
    step, calls = loops.train_step, []

    def hungry(*args, **options):
        calls.append(0)
        if len(calls) > loops.WARM_UP_STEPS:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return step(*args, **options)

    monkeypatch.setattr(loops, "train_step", hungry)
    loop = loop_of(features)
    with pytest.raises(torch.OutOfMemoryError, match="memory"):
        loop.step(0)
    assert loop.not_captured is None
    assert float(torch.ones(3, device="cuda").sum()) == 3  # the card still works


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_moment_form_on_a_card(dtype):
    g = torch.Generator().manual_seed(0)
    f, z = torch.randn(4, 97, 70, generator=g), torch.randn(4, 97, 64, generator=g)
    s, t = torch.randn(27, 64, generator=g), torch.randn(27, 64, generator=g)
    partners = ["self", "all", torch.tensor([1, 1, 0, 2])]
    f, z = f.to(dtype), z.to(dtype)
    truth = sk.smooseg_loss(f.double(), z.double(), s.double(), t.double(), partners, [0.0, 0.3, 0.5], impl="dense")
    on_card = [x.cuda() for x in (f, z, s, t)]
    got = sk.smooseg_loss(
        *on_card, [p if isinstance(p, str) else p.cuda() for p in partners], [0.0, 0.3, 0.5], impl="torch"
    )
    for name in ("total", "energy", "data", "distance", "mean"):
        np.testing.assert_allclose(getattr(got, name).cpu(), getattr(truth, name), rtol=2e-5, atol=2e-6)
