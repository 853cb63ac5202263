"""Borders between classes: counts by hand, tolerance, unlabelled pixels."""

from __future__ import annotations

import math

import pytest
import torch

from smooseg_fast.measure.boundary import BoundaryCounts, borders_of


def halves(column: int, size: int = 40) -> torch.Tensor:
    labels = torch.zeros(1, size, size, dtype=torch.int64)
    labels[:, :, column:] = 1
    return labels


def counts(predicted, truth) -> BoundaryCounts:
    result = BoundaryCounts()
    result.add(predicted, truth)
    return result


def test_borders_are_the_pixels_before_a_change():
    labels = torch.tensor([[[0, 0, 1], [0, 2, 1]]])
    assert borders_of(labels).tolist() == [[[False, True, False], [True, True, False]]]


def test_the_same_segmentation_under_other_names_is_right():
    assert counts(5 - halves(10), halves(10)).f_measure == 1.0


@pytest.mark.parametrize(("moved", "f_measure"), [(1, 1.0), (2, 0.0)])
def test_a_border_may_move_by_the_tolerance(moved, f_measure):
    """0.75 % of the diagonal of 40 x 40 pixels is less than one pixel: one is allowed."""
    assert counts(halves(10 + moved), halves(10)).f_measure == f_measure


def test_precision_and_recall_by_hand():
    """The truth has one border, the prediction that and another, far away: precision 1/2, recall 1."""
    predicted = halves(10)
    predicted[:, :, 30:] = 2
    result = counts(predicted, halves(10))
    assert (result.predicted, result.predicted_near, result.true, result.true_near) == (80, 40, 40, 40)
    assert result.f_measure == pytest.approx(2 / 3)


def test_borders_next_to_unlabelled_pixels_are_left_out():
    truth = halves(10)
    truth[:, :, 25:] = 255
    predicted = halves(10)
    predicted[:, :, 25:] = 3
    result = counts(predicted, truth)
    assert (result.predicted, result.f_measure) == (40, 1.0)


def test_pictures_add_up_and_nothing_to_find_is_no_number():
    result = counts(halves(10), halves(10))
    result.add(halves(30), halves(10))
    assert result.f_measure == pytest.approx(0.5)
    assert math.isnan(counts(halves(10), halves(0)).f_measure)
    assert counts(halves(0), halves(10)).f_measure == 0.0
