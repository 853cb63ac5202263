"""k-means by hand: how centres are drawn, where they move, what an empty cluster takes, which start is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from smooseg_fast.segment.kmeans import lloyd, plus_plus, principal_directions, spherical_kmeans


def on_circle(*degrees):
    angles = torch.deg2rad(torch.tensor(degrees, dtype=torch.float32))
    return torch.stack((angles.cos(), angles.sin()), 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_row_like_a_chosen_one_is_not_drawn():
    """However many there are of it: its distance is 0."""
    rows = torch.eye(3)[[0] * 50 + [1] + [2] * 9]
    for seed in range(20):
        drawn = plus_plus(rows, 3, generator(seed))
        assert sorted(drawn.argmax(1).tolist()) == [0, 1, 2]


def test_rows_are_drawn_by_their_distance():
    """From a centre at 0 degrees 1 - cos is 1 at 90 and 2 at 180: a third and two thirds of the draws."""
    rows = on_circle(0, 90, 180)
    draws = [plus_plus(rows, 2, generator(seed)) for seed in range(900)]
    from_first = [second for first, second in draws if torch.equal(first, rows[0])]
    assert 200 < len(from_first) < 400
    opposite = sum(torch.equal(second, rows[2]) for second in from_first)
    assert opposite / len(from_first) == pytest.approx(2 / 3, abs=0.08)


def test_centres_move_to_the_middle_of_what_is_nearest():
    rows = on_circle(0, 20, 90, 110, 130)
    one = lloyd(rows, on_circle(0, 50), 1)  # 20 is nearer to 0 than to 50
    torch.testing.assert_close(one.centres, F.normalize(torch.stack((rows[:2].sum(0), rows[2:].sum(0)))))
    torch.testing.assert_close(one.centres, on_circle(10, 110))
    assert one.inertia == pytest.approx(
        1 - float((2 * on_circle(10)[0, 0] + 1 + 2 * on_circle(20)[0, 0]) / 5), abs=1e-6
    )
    # 40 is nearer to 60 than to 0, and goes over to the first centre once both have moved, to 10 and 77
    rows = on_circle(0, 20, 40, 90, 100)
    first, last = (lloyd(rows, on_circle(0, 60), iterations) for iterations in (1, 20))
    torch.testing.assert_close(first.centres[:1], on_circle(10))
    torch.testing.assert_close(last.centres, on_circle(20, 95))
    assert last.inertia < first.inertia


def test_an_empty_cluster_takes_the_row_that_is_worst_served():
    rows = on_circle(0, 2, 4, 80)
    found = lloyd(rows, on_circle(0, 0), 1)  # the second of two equal centres is nearest to nothing
    torch.testing.assert_close(found.centres[1], rows[3])
    assert lloyd(rows, on_circle(0, 0), 5).inertia < 1e-3


def test_the_best_of_the_starts_is_kept():
    rows = F.normalize(torch.randn(60, 5, generator=generator(3)), dim=1)
    each = [lloyd(rows, plus_plus(rows, 6, generator(2 * 1009 + start)), 50).inertia for start in range(4)]
    assert len(set(each)) > 1
    assert spherical_kmeans(rows * 7, 6, starts=4, seed=2).inertia == pytest.approx(min(each), abs=1e-6)


def test_directions_point_where_their_largest_part_is_positive():
    rows = torch.randn(40, 5, generator=generator(1))
    found = principal_directions(rows, 5)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()
    assert (found.min(1).values < -0.1).any()
