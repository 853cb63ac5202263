"""Benchmarks run under `pytest --benchmark-only` alone: a plain `pytest` leaves them out."""

import pytest


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark_only", False):
        ours = [item for item in items if item.path.name.startswith("bench_")]
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]


@pytest.fixture
def percentiles(benchmark):
    """Times a function after a warm-up; puts n, median, p20 and p80 in milliseconds into the report. -> the median."""
    import numpy as np

    def run(function, rounds):
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=2)
        if benchmark.disabled:
            return None
        p20, median, p80 = (1000 * np.percentile(benchmark.stats.stats.data, [20, 50, 80])).tolist()
        benchmark.extra_info.update(n=rounds, p20_ms=p20, median_ms=median, p80_ms=p80)
        return median

    return run
