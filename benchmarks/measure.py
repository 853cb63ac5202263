"""How time is taken on a CPU and on a card: percentiles, inputs in turn, CUDA graphs, a profiler, ceilings."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def elapsed(run: Run, device: str) -> float:
    """Milliseconds of one call, on the device's own clock."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def percentiles(times: list[float], calls: int = 1) -> dict[str, Any]:
    """p20, median and p80 of times in milliseconds a call, each the mean of `calls` calls timed together."""
    quantiles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    return {"n": len(times), "calls": calls, "median_ms": quantiles[4], "p20_ms": quantiles[1], "p80_ms": quantiles[7]}


def timed(run: Run, device: str, calls: int = 1, *, seconds: float) -> dict[str, Any]:
    """Percentiles of the time of one of the `calls` that `run` makes, from 3 to 200 samples."""
    for _ in range(3):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    times, stop = [], time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < stop and len(times) < 200):
        times.append(elapsed(run, device) / calls)
    return percentiles(times, calls)


def in_turn(runs: list[Run]) -> Run:
    """One call of each, with the outputs of the first; a single one is returned as it is, without a loop around it."""

    def call() -> Any:
        outputs = runs[0]()
        for run in runs[1:]:
            run()
        return outputs

    return call if len(runs) > 1 else runs[0]


def captured(run: Run) -> tuple[Run, Any]:
    """-> replay of a CUDA graph of the call, and its outputs (filled by every replay)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def kernel_times(run: Run, calls: int, repeats: int = 20) -> dict[str, dict[str, float]]:
    """Microseconds of each kernel in one of the `calls` that `run` makes, by name, from the profiler.

    mean_us and median_us are of all its launches in a call together.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = {}
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            times.setdefault(event.name[:60], []).append(event.device_time_total)
    launches = {name: len(values) / (repeats * calls) for name, values in times.items()}
    return {
        name: {
            "mean_us": statistics.fmean(values) * launches[name],
            "median_us": statistics.median(values) * launches[name],
            "launches": launches[name],
        }
        for name, values in times.items()
        if sum(values) > 0
    }


def copies_beyond_cache(impl: str, touched_bytes: int, device: str) -> int:
    """How many sets of inputs to rotate so that none is still in a card's L2 when its turn comes; 1 on a CPU."""
    if device != "cuda":
        return 1
    if impl.startswith("dense"):
        return 2  # its matrices are many times the cache
    return max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / touched_bytes))


def ceilings(device: str, dtype: torch.dtype, tiny: bool = False, seconds: float = 1.5) -> list[dict[str, Any]]:
    """Two rows: bytes a second of a large copy (read and written), operations a second of a large matrix product.

    Both rates come from p20: other programs may slow the machine, never speed it up.
    """
    size, n = (1 << 20, 64) if tiny else (1 << 31, 8192) if device == "cuda" else (1 << 28, 2048)
    seconds = 0.0 if tiny else seconds
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, seconds=seconds)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    product = timed(lambda: a @ b, device, seconds=seconds)
    rates = {"bytes_per_s": 2e3 * size / copy["p20_ms"]}, {"flops_per_s": 2e3 * n**3 / product["p20_ms"]}
    common = {"case": "ceiling", "mode": "eager"}
    return [{**common, "impl": "copy", **rates[0], **copy}, {**common, "impl": "matmul", **rates[1], **product}]
