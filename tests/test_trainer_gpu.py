"""Runs on a card: the same learning as on a CPU, features resident, codes in bf16."""

import numpy as np
import pytest
import torch
from textures import draw

import smooseg_fast
import smooseg_kernels as sk
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.segment.model import Head, Heads

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]

SMALL = dict(size=128, eval_size=128, steps=30, batch_size=4, prototypes=2, progress=False)


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return [draw(number, 144, 192)[0] for number in range(6)]


@pytest.mark.parametrize("impl", ["auto", "torch", "dense"])
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


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("patches", [None, 50])
def test_a_captured_step_is_the_step(resident, patches):
    """Replayed from a graph or not: the same heads; the steps that warm up leave no trace."""
    torch.manual_seed(0)
    features = (torch.randn(24, 97, 64) + torch.randn(24, 1, 64)).half()
    thresholds = torch.tensor([[0.06, 0.06], [-0.05, -0.05]])
    source = features.cuda() if resident else lambda rows: features[rows].float()
    loops = []
    for capture in (True, False):
        heads = Heads([Head(64, 7, 16, seed) for seed in (0, 1)]).cuda()
        settings = Settings(relative=True, patches=patches)
        loop = Loop(
            heads,
            source,
            (97, 64),
            Schedule(24, 8, 3),
            thresholds,
            settings,
            lr=1e-3,
            lr_prototypes=5e-3,
            capture=capture,
        )
        losses = torch.stack([loop.step(step).total.clone() for step in range(20)])
        loops.append((losses, heads.state_dict()))
    torch.testing.assert_close(loops[0][0], loops[1][0], rtol=1e-5, atol=1e-6)
    for name, value in loops[0][1].items():
        torch.testing.assert_close(value, loops[1][1][name], rtol=1e-4, atol=1e-5)


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
