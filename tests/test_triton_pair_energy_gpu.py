"""Tests of `pair_energy` that need a card: real sizes in every dtype, graph capture, no waits, memory, long offsets."""

from __future__ import annotations

import pytest
import torch

from smooseg_kernels import pair_energy

pytest.importorskip("triton")
from pair_cases import check, make_pairs
from triton_cases import EPS, FP32_EPS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("P", "D", "Z"), [(121, 384, 70), (784, 384, 70), (784, 768, 90), (400, 112, 200)])
def test_real_sizes(P, D, Z, dtype):
    x = make_pairs(B=8, N=8, P_i=P, P_j=P, D=D, Z=Z, dtype=dtype, device="cuda", clamp=(0.0, 0.8))
    check(x, "triton", max(FP32_EPS, EPS[dtype]))


def step(x, threshold):
    codes = [t.detach().requires_grad_() for t in (x.codes_i, x.codes_j)]

    def run():
        out = pair_energy(x.features_i, codes[0], x.features_j, codes[1], threshold, impl="triton", **x.options)
        gradients = torch.autograd.grad(out.energy, codes, torch.ones_like(out.energy))
        return (out.energy, out.similarity, *gradients)

    return run


def real(**options):
    return make_pairs(
        B=32, N=32, P_i=784, P_j=784, D=384, Z=70, dtype=torch.bfloat16, device="cuda", clamp=(0.0, 0.8), **options
    )


def test_graph_capture_reads_the_threshold_again_and_reruns_are_bit_equal():
    x, threshold = real(), torch.tensor(0.1, device="cuda")
    run = step(x, threshold)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [t.clone() for t in run()]
        threshold.fill_(0.3)
        other = [t.clone() for t in run()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for value, want in [(0.1, eager), (0.3, other)] * 5:
        threshold.fill_(value)
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, want))


def test_no_wait_for_the_device():
    run = step(real(hinge=True), 0.1)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_memory_of_a_whole_picture(impl):
    """16,384 patches against as many: one matrix of pairs would be 1.07 GB."""
    x = make_pairs(B=1, P_i=16384, P_j=16384, D=384, Z=70, dtype=torch.bfloat16, device="cuda", clamp=(0.0, 0.8))
    codes = [t.detach().requires_grad_() for t in (x.codes_i, x.codes_j)]

    def run():
        out = pair_energy(x.features_i, codes[0], x.features_j, codes[1], 0.1, impl=impl, **x.options)
        return torch.autograd.grad(out.energy, codes)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before
    assert grown < (64 << 20 if impl == "triton" else 500_000_000), f"{grown / 2**20:.1f} MiB"


def test_offsets_past_2_31():
    """Compares the last rows of the third image, of 1.1e9 elements each, with that image alone."""
    B, P, Q, D, Z = 3, 3_000_000, 16, 384, 16
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.empty(B, P, D, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    codes, other_codes = (
        torch.randn(B, n, Z, generator=generator, device="cuda", dtype=torch.bfloat16) for n in (P, Q)
    )
    other = torch.randn(B, Q, D, generator=generator, device="cuda", dtype=torch.bfloat16)

    def gradient(f, c, o, oc):
        c = c.detach().requires_grad_()
        return torch.autograd.grad(
            pair_energy(f, c, o, oc, 0.1, center=False, clamp=(0.0, None), impl="triton").energy, c
        )[0]

    whole = gradient(features, codes, other, other_codes)[2, -1000:].float() * B * P
    alone = gradient(features[2:, -1000:], codes[2:, -1000:], other[2:], other_codes[2:])[0].float() * 1000
    assert (whole - alone).norm() <= 2e-2 * alone.norm()
    swapped = gradient(other, other_codes, features, codes)[2].float() * B
    small = gradient(other[2:], other_codes[2:], features[2:], codes[2:])[0].float()
    assert (swapped - small).norm() <= 2e-2 * small.norm()


def test_compiles_whole_with_inductor():
    x = make_pairs(B=4, N=4, P_i=196, P_j=121, D=384, Z=70, dtype=torch.bfloat16, device="cuda", clamp=(0.0, 0.8))

    def loss(codes_i, codes_j):
        out = pair_energy(x.features_i, codes_i * 1.0, x.features_j, codes_j * 1.0, 0.1, impl="triton", **x.options)
        return out.energy + 0.5 * out.similarity

    inputs = [x.codes_i.requires_grad_(), x.codes_j.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)
