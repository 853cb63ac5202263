"""How time is taken, on a CPU and on a card: percentiles, inputs in turn, CUDA graphs, and the ceilings of this machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], Any]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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
    """Of times in milliseconds, each of one of `calls` calls that were timed together; one time stands for all three."""
    if len(times) == 1:
        p20 = median = p80 = times[0]
    else:
        p20, median, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return {"n": len(times), "calls": calls, "median_ms": median, "p20_ms": p20, "p80_ms": p80}


def timed(
    run: Run, device: str, calls: int = 1, seconds: float = 1.5, warm: int = 3, most: int = 200
) -> dict[str, Any]:
    """Percentiles of the time of one of the `calls` that `run` makes."""
    for _ in range(warm):
        run()
    synchronize(device)
    times, stop = [], time.perf_counter() + seconds
    while len(times) < min(3, most) or (time.perf_counter() < stop and len(times) < most):
        times.append(elapsed(run, device) / calls)
    return percentiles(times, calls)


def in_turn(runs: list[Run]) -> Run:
    """One call of each; for a single one, the call itself."""
    if len(runs) == 1:
        return runs[0]

    def call() -> None:
        for run in runs:
            run()

    return call


def captured(runs: list[Run]) -> tuple[Run, Any]:
    """-> replay of one CUDA graph of all the calls, and what the first of them puts out (filled by every replay)."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = runs[0]()
        for run in runs[1:]:
            run()
    return graph.replay, outputs


def copies_beyond_cache(impl: str, touched_bytes: int, device: str) -> int:
    """How many sets of inputs a rotation needs so that none is still in a card's L2 when its turn comes; 1 on a CPU."""
    if device != "cuda":
        return 1
    if impl.startswith("dense"):
        return 2  # what it writes is many times the cache
    return max(2, math.ceil(3 * torch.cuda.get_device_properties(0).L2_cache_size / touched_bytes))


def ceilings(device: str, dtype: torch.dtype, tiny: bool = False) -> list[dict[str, Any]]:
    """Two rows: bytes a second of a large copy (read and written), and the rate of a large matrix product in `dtype`.

    A ceiling is what the machine can do: the time that a fifth of the calls reach, whoever else was busy.
    """
    on_gpu = device == "cuda"
    size, n = (1 << 20, 64) if tiny else (1 << 31, 8192) if on_gpu else (1 << 28, 2048)
    pace = {"seconds": 0.0, "warm": 1} if tiny else {}
    source = torch.empty(size, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device, **pace)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    product = timed(lambda: a @ b, device, **pace)
    return [
        {"case": "ceiling", "impl": "copy", "mode": "eager", "bytes_per_s": 2 * size / copy["p20_ms"] * 1e3, **copy},
        {
            "case": "ceiling",
            "impl": "matmul",
            "mode": "eager",
            "flops_per_s": 2 * n**3 / product["p20_ms"] * 1e3,
            **product,
        },
    ]
