"""Runs on a card: the same learning as on a CPU, features resident, codes in bf16."""

import numpy as np
import pytest
import torch
from textures import draw

import smooseg_fast
import smooseg_kernels as sk

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_moment_form_on_a_card(dtype):
    g = torch.Generator().manual_seed(0)
    f, z = torch.randn(4, 97, 70, generator=g), torch.randn(4, 97, 64, generator=g)
    s, t = torch.randn(27, 64, generator=g), torch.randn(27, 64, generator=g)
    partners = ["self", "all", torch.tensor([1, 1, 0, 2])]
    f, z = f.to(dtype), z.to(dtype)
    truth = sk.smooseg_loss(f.double(), z.double(), s.double(), t.double(), partners, [0.0, 0.3, 0.5], impl="dense")
    on_card = [x.cuda() for x in (f, z, s, t)]
    got = sk.smooseg_loss(*on_card, [p if isinstance(p, str) else p.cuda() for p in partners], [0.0, 0.3, 0.5], impl="torch")
    for name in ("total", "energy", "data", "distance", "mean"):
        np.testing.assert_allclose(getattr(got, name).cpu(), getattr(truth, name), rtol=2e-5, atol=2e-6)
