"""Captured steps without a card: which draws and batches a replay reads, in what order of streams, and what a capture
that fails leaves.
"""

import contextlib

import pytest
import replayed
import torch
from replayed import play_graphs_on_the_cpu

from smooseg_fast.learn import ahead
from smooseg_fast.learn import loop as loops
from smooseg_fast.learn.loop import Loop
from smooseg_fast.learn.schedule import Schedule, Settings
from smooseg_fast.learn.step import chosen
from smooseg_fast.segment.model import Head, Heads

CPU = torch.device("cpu")
N, B, P, D = 9, 4, 12, 9  # 108 masks do not fill whole words
RATE = 2**-10  # the same in every precision
SETTINGS = [{}, {"patches": 5}, {"dropout": 0.0}]


@pytest.fixture
def features():
    return torch.randn(N, P, D, generator=torch.Generator().manual_seed(0))


def loop_of(features, *, resident=True, capture=True, schedule=None, **settings):
    source = features if resident else lambda rows: features[rows]
    rates = dict(lr=RATE, lr_prototypes=4 * RATE)
    thresholds, settings = torch.full((1, 2), 0.1), Settings(relative=True, **settings)
    schedule = schedule or Schedule(N, B, data_seed=5)
    return Loop(Heads([Head(D, 4, 8, 0)]), source, (P, D), schedule, thresholds, settings, capture=capture, **rates)


# what a replay reads


@pytest.mark.parametrize("steps_ahead", [1, 3, 64])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_replay_reads_the_draws_of_its_step(monkeypatch, features, resident, settings, steps_ahead):
    """Over the borders of two blocks, after jumps and from the middle of a run."""
    (captured, graphs), numbers = ({}, play_graphs_on_the_cpu(monkeypatch)), [*range(60, 133), 7, 8, 200, 2, 1]

    def read(heads, optimizer, source, draws, *_, **options):
        captured.update(draws=draws, batch=chosen(source, draws))

    monkeypatch.setattr(loops, "train_step", read)
    monkeypatch.setattr(ahead, "STEPS_AHEAD", steps_ahead)
    loop, schedule = loop_of(features, resident=resident, **settings), Schedule(N, B, data_seed=5)
    for number in numbers:
        loop.step(number)
        draws, expected = captured["draws"], schedule.draws(number, P, D, loop.settings, CPU)
        for name in ("partner", "masks", "patches"):
            got, want = getattr(draws, name), getattr(expected, name)
            assert got is want is None or torch.equal(got, want), (number, name)
        assert torch.equal(captured["batch"], chosen(features, expected)), number
    assert [graph.replays for graph in graphs] == [len(numbers)]


def test_a_graph_that_is_replayed_alone_stays_in_the_block(monkeypatch, features):
    """A benchmark does so, to time a step without work of the host."""
    captured, graphs = {}, play_graphs_on_the_cpu(monkeypatch)
    monkeypatch.setattr(loops, "train_step", lambda *args, **_: captured.update(draws=args[3]))
    loop, schedule = loop_of(features), Schedule(N, B, data_seed=5)
    loop.step(0)
    for number in range(1, 130):
        graphs[0].replay()
        assert torch.equal(captured["draws"].masks, schedule.draws(number % 64, P, D, loop.settings, CPU).masks)


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_captured_steps_learn_what_steps_one_by_one_learn(monkeypatch, features, resident, settings):
    play_graphs_on_the_cpu(monkeypatch)
    captured, plain = (loop_of(features, resident=resident, capture=capture, **settings) for capture in (True, False))
    for number in range(60, 70):
        assert torch.equal(captured.step(number).total, plain.step(number).total), number
    for name, value in captured.heads.state_dict().items():
        assert torch.equal(value, plain.heads.state_dict()[name]), name


def test_many_numbers_are_drawn_in_smaller_blocks(monkeypatch, features):
    play_graphs_on_the_cpu(monkeypatch)
    for most, steps in ((1 << 22, 64), (3 * B * (P + 3 * D), 3), (1, 1)):
        monkeypatch.setattr(ahead, "NUMBERS_AHEAD", most)
        loop = loop_of(features)
        loop.step(0)
        assert loop._captured.inputs.draws.steps == steps


def test_a_batch_that_is_not_there_yet_is_not_read_ahead(monkeypatch, features):
    """The last step of a run must not make features that nobody needs."""
    play_graphs_on_the_cpu(monkeypatch)
    read = []

    class Windows(Schedule):
        def ready(self, step):
            return step % 3 != 0

        def rows_of(self, step):
            read.append(step)
            return super().rows_of(step)

    loop = loop_of(features, resident=False, schedule=Windows(N, B, 5))
    furthest = [(loop.step(number), max(read))[1] for number in range(7)]
    assert furthest == [1, 2, 2, 4, 5, 5, 7]


def test_every_batch_is_read_once(monkeypatch, features):
    play_graphs_on_the_cpu(monkeypatch)
    loop, reads = loop_of(features, resident=False), []
    loop.features = lambda rows: reads.append(rows.tolist()) or features[rows]
    for number in range(6):
        loop.step(number)
    schedule = Schedule(N, B, data_seed=5)
    assert reads == [schedule.rows_of(number).tolist() for number in range(7)]


def test_a_changed_rate_takes_effect_in_a_captured_step(monkeypatch, features):
    play_graphs_on_the_cpu(monkeypatch)
    captured, plain = (loop_of(features, capture=capture) for capture in (True, False))
    factors = [1.0, 0.5, 4.0, 0.0]
    by_torch = [
        torch.optim.lr_scheduler.LambdaLR(loop.optimizer, lambda step: factors[step]) for loop in (captured, plain)
    ]
    for number in range(4):
        before = captured.heads.student.detach().clone()
        assert torch.equal(captured.step(number).total, plain.step(number).total)
        assert torch.equal(captured.heads.student, plain.heads.student)
        assert torch.equal(before, captured.heads.student) == (number == 3)
        if number < 3:
            for scheduler in by_torch:
                scheduler.step()


# the order of streams


class OnTheHost(Schedule):
    def rows_of(self, step):
        with replayed.Card.present.by_the_host():
            return super().rows_of(step).clone()


def take_steps(features, resident, numbers):
    loop = loop_of(features, resident=resident, schedule=OnTheHost(N, B, 5), patches=5)
    if not resident:
        loop.features = replayed.Card.present.by_the_host()(lambda rows: features[rows])
    with replayed.Card.present:
        for number in numbers:
            loop.step(number)


@pytest.mark.parametrize("resident", [True, False])
def test_streams_wait_for_each_other(monkeypatch, features, resident):
    play_graphs_on_the_cpu(monkeypatch)
    monkeypatch.setattr(ahead, "STEPS_AHEAD", 2)
    take_steps(features, resident, [*range(7), 2, 9])


@pytest.mark.parametrize(
    ("kind", "name", "resident"),
    [("Stream", "wait_stream", True), ("Stream", "wait_event", False), ("Event", "synchronize", False)],
)
def test_without_its_waits_streams_race(monkeypatch, features, kind, name, resident):
    """The waits above are needed, and the test of them sees it."""
    play_graphs_on_the_cpu(monkeypatch)
    monkeypatch.setattr(getattr(replayed, kind), name, lambda *_: None)
    with pytest.raises(RuntimeError, match="races"):
        take_steps(features, resident, range(5))


# captures that fail


def failing(monkeypatch, error, at=loops.WARM_UP_STEPS):
    """The step fails at its call `at`, from 0; the end of the capture then fails too, as on a card."""
    play_graphs_on_the_cpu(monkeypatch)
    step, calls = loops.train_step, []

    def fail(*args, **options):
        calls.append(0)
        if len(calls) == at + 1:
            raise error
        return step(*args, **options)

    @contextlib.contextmanager
    def capture(graph):
        try:
            yield
        except Exception:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904

    monkeypatch.setattr(loops, "train_step", fail)
    monkeypatch.setattr(torch.cuda, "graph", capture)


@pytest.mark.parametrize("resident", [True, False])
def test_a_step_that_cannot_be_captured_runs_as_it_is(monkeypatch, features, resident):
    failing(monkeypatch, RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more"))
    loop = loop_of(features, resident=resident)
    losses = [loop.step(number).total for number in range(3)]
    assert loop.not_captured == "CUDA error: operation not permitted when stream is capturing"
    plain = loop_of(features, capture=False)
    assert all(torch.equal(loss, plain.step(number).total) for number, loss in enumerate(losses))


@pytest.mark.parametrize("at", [0, loops.WARM_UP_STEPS], ids=["warm-up", "capture"])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered\nas the capture saw"),
        ValueError("no kernel is captured"),
        ImportError("no compiler"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_other_errors_than_a_captures_are_raised(monkeypatch, features, error, at):
    """Such a device or step would fail one by one too, with a misleading reason."""
    failing(monkeypatch, error, at)
    loop = loop_of(features)
    with pytest.raises(type(error)) as raised:
        loop.step(0)
    assert raised.value is error
    assert loop.not_captured is None
    assert loop.capture
