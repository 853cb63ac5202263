"""The permutohedral lattice of the dense CRF: its two forms, and the cache of the compiled one."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import smooseg_kernels as sk
from smooseg_kernels.crf import native
from smooseg_kernels.crf.lattice import Permutohedral, corners


def problem(K, H, W, seed=0):
    """Soft scores in patches and a picture of flat regions with grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, K, H // 5 + 1, W // 5 + 1, generator=generator)
    probabilities = torch.nn.functional.interpolate(coarse, (H, W), mode="bilinear")[0].mul(3).softmax(0)
    regions = torch.randint(0, 256, (H // 7 + 1, W // 9 + 1, 3), generator=generator)
    flat = regions.repeat_interleave(7, 0).repeat_interleave(9, 1)[:H, :W]
    return probabilities, (flat + torch.randint(-4, 5, (H, W, 3), generator=generator)).clamp(0, 255).byte()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """One build of the library, in a cache of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SMOOSEG_NATIVE", raising=False)
        native.state.cache_clear()
        if native.lattice_form() != "cpp":
            pytest.skip(f"no C++ form here: {native.state()[1]}")
        yield Path(os.environ["XDG_CACHE_HOME"])
    native.state.cache_clear()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.state.cache_clear()
    yield tmp_path / "cache" / "smooseg_kernels"
    native.state.cache_clear()


@pytest.mark.parametrize("d", [1, 2, 5, 8])
def test_corners_enclose_their_points(d):
    """Weights are barycentric: not negative, of sum 1; and neighbours along an axis know of one another."""
    points = torch.randn(200, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    keys, weights, _ = corners(points)
    assert keys.shape == weights.shape == (200, d + 1)
    assert weights.min() > -1e-12
    torch.testing.assert_close(weights.sum(1), torch.ones(200, dtype=torch.float64))
    assert (keys % (d + 1)).equal(torch.arange(d + 1).expand(200, -1))
    lattice = Permutohedral(points, torch.float64)
    blurs = lattice.bags[1:-1]
    assert len(blurs) == d + 1 if d > 1 else len(blurs) >= 2
    for rows, offsets, values in blurs[-d - 1 :]:
        M = len(offsets)
        matrix = torch.zeros(M, M, dtype=torch.float64)
        matrix.index_put_((torch.arange(M).repeat_interleave(3), rows.long()), values, accumulate=True)
        assert matrix.equal(matrix.T)
        assert (matrix.diagonal() == 0.5).all()


@pytest.mark.parametrize(("d", "allowed"), [(1, 0.05), (2, 0.1), (5, 0.3)])
def test_sums_approach_the_gaussian(d, allowed):
    """Uses the symmetric normalisation, in which the lost mass of sparse points cancels."""
    generator = torch.Generator().manual_seed(d)
    points = 0.8 * torch.randn(800, d, generator=generator, dtype=torch.float64)
    values = torch.rand(800, 3, generator=generator, dtype=torch.float64)
    kernel = torch.cdist(points, points).square().mul(-0.5).exp()
    lattice = Permutohedral(points, torch.float64)

    def normalised(function):
        norm = function(torch.ones_like(values[:, :1])).rsqrt()
        return function(values * norm) * norm

    truth = normalised(lambda v: kernel @ v)
    assert (normalised(lattice) - truth).abs().max() < allowed * truth.max()
    assert (lattice(values) > 0).all()
    ratio = (lattice(values) / (kernel @ values)).mean()
    assert 0.85 < ratio < 1.1


def test_the_filter_is_symmetric_with_its_blurs_turned_round():
    """K = S'BS with symmetric blurs: its transpose is the same with the blurs in the reverse order."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    u, v = torch.rand(2, 300, 1, generator=generator, dtype=torch.float64)
    lattice, turned = (Permutohedral(points, torch.float64) for _ in range(2))
    turned.bags[1:-1] = reversed(turned.bags[1:-1])
    torch.testing.assert_close((u * lattice(v)).sum(), (v * turned(u)).sum())
    assert ((u * lattice(v)).sum() - (v * lattice(u)).sum()).abs() < 0.02 * (u * lattice(v)).sum()


def test_sums_of_thousands_keep_their_digits(compiled):
    """One flat colour: a few lattice points sum every pixel, and fp32 is as near to fp64 as its rounding allows."""
    probabilities, image = problem(4, 90, 90)[0], torch.full((90, 90, 3), 90, dtype=torch.uint8)
    truth = sk.dense_crf(probabilities.double(), image, method="lattice", impl="torch")
    for impl in ("cpp", "torch"):
        got = sk.dense_crf(probabilities, image, method="lattice", impl=impl)
        assert (got - truth).abs().max() < 5e-6  # 2e-5 without parts
    points = torch.zeros(1000, 5, dtype=torch.float64)
    sums = Permutohedral.normalised(points, torch.float32)(torch.ones(1000, 1))
    assert (sums - 1).abs().max() < 3e-6


def test_points_that_reach_too_far_are_refused():
    points = torch.tensor([[0.0] * 5, [1e6] * 5], dtype=torch.float64)
    with pytest.raises(ValueError, match="larger sigmas"):
        Permutohedral(points, torch.float32)


@pytest.mark.parametrize(
    ("K", "H", "W"),
    [(1, 9, 5), (2, 1, 33), (3, 31, 1), (16, 23, 37), (17, 40, 26), (27, 33, 31), (33, 12, 19), (70, 9, 9)],
)
def test_both_forms_agree(compiled, K, H, W):
    probabilities, image = problem(K, H, W)
    cpp = sk.dense_crf(probabilities, image, method="lattice", impl="cpp")
    plain = sk.dense_crf(probabilities, image, method="lattice", impl="torch")
    torch.testing.assert_close(cpp, plain, atol=1e-5, rtol=0)
    assert (cpp.argmax(0) == plain.argmax(0)).double().mean() >= 0.9999
    torch.testing.assert_close(cpp.sum(0), torch.ones(H, W))


@pytest.mark.parametrize(
    "settings",
    [
        {"iterations": 0},
        {"bilateral": (67, 3, 0)},
        {"gaussian": (4.5, 0)},
        {"gaussian": (9, 2)},
        {"gaussian": (0.3, 3)},
        {"gaussian": (0.8, 5)},
        {"bilateral": (67, 3, 500)},
    ],
)
def test_both_forms_agree_in_every_part(compiled, settings):
    probabilities, image = problem(5, 30, 41)
    cpp, plain = (
        sk.dense_crf(probabilities, image, method="lattice", impl=impl, **settings) for impl in ("cpp", "torch")
    )
    torch.testing.assert_close(cpp, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("K", [5, 19])
def test_the_same_bits_for_any_number_of_threads(compiled, K):
    probabilities, image = problem(K, 37, 29)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(sk.dense_crf(probabilities, image, method="lattice", impl="cpp"))
    finally:
        torch.set_num_threads(before)
    assert all(result.equal(results[0]) for result in results)
    plain = [sk.dense_crf(probabilities, image, method="lattice", impl="torch") for _ in range(2)]
    assert plain[0].equal(plain[1])


def test_the_lattice_is_near_the_oracle(compiled):
    """Figures of docs/guide.md come from pictures; this holds the order of the error."""
    probabilities, image = problem(6, 40, 44)
    lattice = sk.dense_crf(probabilities, image, method="lattice")
    oracle = sk.dense_crf(probabilities, image, impl="dense")
    assert (lattice.argmax(0) == oracle.argmax(0)).double().mean() > 0.95


@pytest.mark.skipif(not importlib.util.find_spec("pydensecrf"), reason="needs pydensecrf2, which has no wheel")
@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_agrees_with_pydensecrf2(compiled, impl):
    import numpy as np
    import pydensecrf.densecrf as peer

    K, H, W = 27, 96, 120
    probabilities, image = problem(K, H, W)
    field = peer.DenseCRF2D(W, H, K)
    field.setUnaryEnergy(np.ascontiguousarray(-probabilities.log().flatten(1).numpy()))
    field.addPairwiseGaussian(sxy=1, compat=3)
    field.addPairwiseBilateral(sxy=67, srgb=3, rgbim=image.numpy(), compat=4)
    theirs = torch.from_numpy(np.array(field.inference(10))).view(K, H, W)
    ours = sk.dense_crf(probabilities, image, method="lattice", impl=impl)
    assert (ours.argmax(0) == theirs.argmax(0)).double().mean() >= 0.9999
    assert (ours - theirs).abs().max() < 1e-3


def test_compiled_code_takes_the_operator(compiled):
    scores, image = torch.zeros(5, 3, 4, device="meta"), torch.zeros(3, 4, 3, dtype=torch.uint8, device="meta")
    assert native.mean_field(scores, image, [1.0, 3.0], [67.0, 3.0, 4.0], 10).shape == (5, 3, 4)
    with pytest.raises(RuntimeError, match="fp32"):
        sk.dense_crf(torch.rand(2, 3, 3).double(), torch.zeros(3, 3, 3).byte(), method="lattice", impl="cpp")


def unavailable(capfd, reason, silent=False):
    """Asserts one line that tells why, and that the PyTorch form gives an answer."""
    assert native.lattice_form() == "torch"
    probabilities, image = problem(3, 6, 7)
    assert sk.dense_crf(probabilities, image, method="lattice").shape == (3, 6, 7)
    lines = [line for line in capfd.readouterr().err.splitlines() if "building" not in line]
    assert len(lines) == (not silent)
    assert silent or ("runs in PyTorch" in lines[0] and reason in lines[0]), lines
    with pytest.raises(RuntimeError, match='impl="cpp" cannot run here'):
        sk.dense_crf(probabilities, image, method="lattice", impl="cpp")


def fake_compiler(tmp_path, monkeypatch, body):
    path = tmp_path / "c++"
    path.write_text(f'#!/bin/sh\ncase "$1" in --version) echo fake; exit 0;; esac\n{body}\n')
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


def test_switched_off(cache, monkeypatch, capfd):
    monkeypatch.setenv("SMOOSEG_NATIVE", "0")
    unavailable(capfd, "", silent=True)
    assert not cache.exists()


def test_no_compiler(cache, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "no-such-compiler")
    unavailable(capfd, "no C++ compiler no-such-compiler")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'lattice.cpp:1: error: broken' >&2; exit 1", "error: broken"),
        ("echo 'cannot write: No space left on device' >&2; exit 1", "No space left on device"),
        ("kill -SEGV $$", "Segmentation fault"),
        ("exit 0", "lattice.so"),  # says that it has compiled, and has not
        ("sleep 60", "has not finished in"),
    ],
    ids=["broken", "full disk", "crashes", "nothing", "hangs"],
)
def test_a_compiler_that_fails(body, reason, cache, tmp_path, monkeypatch, capfd):
    fake_compiler(tmp_path, monkeypatch, body)
    monkeypatch.setattr(native, "BUILD_S", 0.3 if "sleep" in body else 20.0)
    unavailable(capfd, reason)
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_no_ninja(cache, monkeypatch, capfd):
    found = native.shutil.which
    monkeypatch.setattr(native.shutil, "which", lambda name, **more: None if name == "ninja" else found(name, **more))
    unavailable(capfd, "pip install ninja")


def test_a_cache_that_cannot_be_written(cache, capfd, monkeypatch):
    cache.parent.write_text("a file where the folder should be")
    unavailable(capfd, str(cache.parent))
    cache.parent.unlink()
    native.state.cache_clear()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(native.tempfile, "TemporaryDirectory", full)
    unavailable(capfd, "No space left")


def test_a_cache_that_others_may_write_to_is_not_executed(cache, capfd):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    unavailable(capfd, "others may write to it")


def test_a_lock_that_is_held_ends_the_wait(cache, tmp_path, monkeypatch, capfd):
    """And the lock of a process that was killed is free at once."""
    cache.mkdir(parents=True, mode=0o700)
    (cache / "lock").touch()
    (cache / ".build-killed").mkdir()
    fake_compiler(tmp_path, monkeypatch, "echo 'error: reached' >&2; exit 1")
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-S", "-c", hold, cache / "lock"], stdout=subprocess.PIPE) as holder:
        try:
            holder.stdout.readline()
            monkeypatch.setattr(native, "LOCK_S", 0.2)
            unavailable(capfd, "another process has held")
        finally:
            holder.kill()
    native.state.cache_clear()
    unavailable(capfd, "error: reached")
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_damaged_library_is_built_again(compiled, cache, monkeypatch):
    """A build that is there is loaded without a lock; one that was cut short never is."""
    source = next((compiled / "smooseg_kernels").glob("*/lattice.so"))
    target = cache / source.parent.name / source.name
    target.parent.mkdir(parents=True, mode=0o700)
    cache.chmod(0o700)
    for name in ("lattice.so", "lattice.sha256"):
        (target.parent / name).write_bytes(source.with_name(name).read_bytes())
        (target.parent / name).chmod(0o700)
    assert native.is_intact(target)
    native.load()
    assert not (cache / "lock").exists()

    target.unlink()  # it is mapped
    target.write_bytes(source.read_bytes()[:5000])
    assert not native.is_intact(target)
    built = []
    monkeypatch.setattr(native, "run", lambda command, limit_s, **_: compile_by_copy(command, built, source))
    native.load()
    assert built
    assert native.is_intact(target)
    assert target.read_bytes() == source.read_bytes()
    assert sorted(path.name for path in cache.iterdir()) == sorted(["lock", target.parent.name])


def compile_by_copy(command, built, source):
    if "-C" not in command:
        return subprocess.run(command, capture_output=True, text=True)
    built.append(command)
    Path(command[command.index("-C") + 1], "lattice.so").write_bytes(source.read_bytes())
    return subprocess.CompletedProcess(command, 0, "")


def test_of_two_builders_one_builds(compiled, cache, monkeypatch):
    """Both start without a library; the second finds that of the first when the lock comes free."""
    import threading

    source = next((compiled / "smooseg_kernels").glob("*/lattice.so"))
    built, original = [], native.run

    def slow(command, limit_s, **more):
        if "-C" not in command:
            return original(command, limit_s, **more)
        time.sleep(0.2)
        return compile_by_copy(command, built, source)

    monkeypatch.setattr(native, "run", slow)
    threads = [threading.Thread(target=native.load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
