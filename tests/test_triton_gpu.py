"""Tests that need a card: real sizes in every dtype, graph capture, no waits, long offsets, memory, the compiler."""

from __future__ import annotations

import pytest
import torch

from smooseg_kernels import assign, layers, smooseg_loss

pytest.importorskip("triton")
from triton_cases import check_against_dense, evaluate, make_case

pytestmark = pytest.mark.gpu
REAL = dict(B=32, P=784, D=384, K=27, Z=64, device="cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize(
    ("dtype", "H"),
    [
        (torch.bfloat16, None),
        (torch.bfloat16, 4),
        (torch.bfloat16, 16),
        (torch.float16, None),
        (torch.float16, 2),
        (torch.float32, None),
    ],
    ids=str,
)
def test_real_sizes(dtype, H):
    """Compares with the moment form in float64, which other tests compare with the dense form."""
    check_against_dense(make_case(**REAL, H=H, dtype=dtype), oracle_impl="torch")


@pytest.mark.parametrize(
    ("dtype", "D", "K"),
    [(torch.bfloat16, 768, 3), (torch.bfloat16, 1024, 27), (torch.float16, 112, 20), (torch.float32, 768, 3)],
    ids=str,
)
def test_other_widths_and_every_option(dtype, D, K):
    torch.manual_seed(1)
    options = dict(channel_scale=(torch.rand(6, D) > 0.2) * 1.25, patch_weight=torch.rand(6, 784), relative=True)
    case = make_case(
        B=6, P=784, D=D, K=K, Z=64, dtype=dtype, device="cuda", partners=("self", "index", "all"), **options
    )
    check_against_dense(case, oracle_impl="torch")


def step(case):
    codes, student = case.codes.detach().requires_grad_(), case.student.detach().requires_grad_()

    def run():
        out = smooseg_loss(case.features, codes, student, case.teacher, case.partners, case.thresholds, impl="triton")
        return (out.total, *torch.autograd.grad(out.total, [codes, student], torch.ones_like(out.total)))

    return run


@pytest.mark.parametrize("H", [None, 2])
def test_graph_capture_and_bit_equal_reruns(H):
    run = step(make_case(**REAL, H=H, dtype=torch.bfloat16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = [x.clone() for x in run()]
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(20):
        for tensor in captured:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, eager))


def test_a_captured_layer_draws_new_partners_each_time():
    """A layer never waits for the device and copies nothing from the host."""
    features = torch.randn(16, 384, 14, 14, device="cuda", dtype=torch.bfloat16)
    probs = torch.randn(16, 27, 14, 14, device="cuda").softmax(1).requires_grad_()
    layer = layers.SmoothnessLoss(within=-0.02, across=0.5)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(features, probs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(features, probs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = layer(features, probs)
        (gradient,) = torch.autograd.grad(terms.energy_within + terms.energy_across, probs)
    seen = []
    for _ in range(5):
        graph.replay()
        seen.append((terms.energy_within.item(), terms.energy_across.item()))
    assert len({within for within, _ in seen}) == 1
    assert len({across for _, across in seen}) > 1
    assert gradient.isfinite().all()


def test_no_wait_for_the_device():
    case = make_case(**REAL, dtype=torch.bfloat16)
    run = step(case)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        assign(case.codes, case.teacher, grid=(28, 28), size=(320, 320), impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_besides_inputs_and_gradient():
    run = step(make_case(**REAL, dtype=torch.bfloat16))
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    grown = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in out)
    assert grown < 16 << 20, f"{grown / 2**20:.1f} MiB, scratch included"


def test_offsets_past_2_31_between_images():
    """Three images of 0.77e9 elements each: every image alone stays below 2^31."""
    B, P, D, Z = 3, 2_000_000, 384, 16
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.empty(B, P, D, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    codes = torch.randn(B, P, Z, generator=generator, device="cuda")
    prototypes = torch.randn(5, Z, generator=generator, device="cuda")
    threshold = torch.tensor([0.1], device="cuda")

    def run(images):
        rows = codes[images].detach().requires_grad_()
        out = smooseg_loss(features[images], rows, prototypes, prototypes, ["self"], threshold, impl="triton")
        return out.energy.detach(), torch.autograd.grad(out.energy.sum(), rows)[0]

    energy, gradient = run(slice(0, B))
    alone = [run(slice(n, n + 1)) for n in range(B)]
    torch.testing.assert_close(energy, torch.stack([e for e, _ in alone]).mean(0), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(gradient[-1] * B, alone[-1][1][0], rtol=2e-2, atol=float(gradient.abs().max()) * 1e-2)


def test_offsets_past_2_31_within_an_image():
    P, D, Z = 5_700_000, 384, 16
    generator = torch.Generator("cuda").manual_seed(0)
    features = torch.empty(1, P, D, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
    codes = torch.randn(1, P, Z, generator=generator, device="cuda")
    prototypes = torch.randn(5, Z, generator=generator, device="cuda")
    results = []
    for impl in ("triton", "torch"):
        rows = codes.detach().requires_grad_()
        out = smooseg_loss(
            features, rows, prototypes, prototypes, ["self"], torch.tensor([0.1], device="cuda"), impl=impl
        )
        results.append((out.energy.detach(), torch.autograd.grad(out.energy.sum(), rows)[0]))
        torch.cuda.empty_cache()
    (energy, gradient), (energy_torch, gradient_torch) = results
    torch.testing.assert_close(energy, energy_torch, rtol=1e-2, atol=1e-4)
    last, last_torch = gradient[0, -1000:], gradient_torch[0, -1000:]
    assert (last - last_torch).norm() <= 3e-2 * last_torch.norm()


def test_compiles_whole_with_inductor():
    case = make_case(B=4, P=196, D=384, K=27, Z=64, dtype=torch.bfloat16, device="cuda")

    def loss(codes, student):
        out = smooseg_loss(
            case.features, codes * 1.0, student, case.teacher, case.partners, case.thresholds, impl="triton"
        )
        return out.total + 0.5 * out.energy.sum()

    inputs = [case.codes.requires_grad_(), case.student.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-6)


def test_auto_takes_triton_on_a_gpu():
    case = make_case(B=4, P=196, D=384, K=27, Z=64, dtype=torch.bfloat16, device="cuda")
    auto, fused = evaluate(case, "auto"), evaluate(case, "triton")
    assert all(torch.equal(auto.values[name], fused.values[name]) for name in auto.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(320, 320), (1024, 2048)])
def test_assignment_at_real_sizes(dtype, size):
    case = make_case(B=2, P=784, D=4, K=27, Z=64, dtype=dtype, device="cuda")
    labels = torch.randint(-1, 28, (2, *size), device="cuda")
    got, counts = assign(case.codes, case.teacher, grid=(28, 28), size=size, labels=labels, classes=27, impl="triton")
    want, _ = assign(
        case.codes.double(), case.teacher.double(), grid=(28, 28), size=size, labels=labels, classes=27, impl="torch"
    )
    assert (got != want).float().mean() < 1e-4  # near ties
    inside = (labels >= 0) & (labels < 27)
    again = torch.bincount(got[inside] * 27 + labels[inside], minlength=27 * 27).view(27, 27)
    assert torch.equal(counts, again)


def test_labels_of_nan_codes_stay_within_the_prototypes():
    """A label beyond K would be counted outside of the counts. The interpreter's argmax never returns one."""
    codes = torch.full((2, 100, 64), torch.nan, device="cuda")
    labels = torch.zeros(2, 100, dtype=torch.int64, device="cuda")
    assigned, counts = assign(codes, torch.randn(5, 64, device="cuda"), labels=labels, classes=3, impl="triton")
    assert int(assigned.min()) >= 0
    assert int(assigned.max()) < 5
    assert int(counts.sum()) == 200
