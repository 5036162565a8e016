"""`loss.png`: which numbers of a log are drawn, and where."""

import math

import numpy as np
import pytest

from nextflow_hf.training.common.loss_plot import COLORS, loss_curves, plot


def test_scales_are_drawn_where_they_are_logged_and_rewards_of_grpo():
    history = [
        {"step": 1, "loss": 3.0, "text_loss": 2.0, "loss_scale_10": 5.0, "loss_scale_2": 4.0},
        {"step": 2, "loss": 2.0, "loss_scale_2": math.nan, "loss_scale_10": 3.0},
        {"step": 2, "eval_loss": 9.0},
        {"step": 2, "train_loss": 9.0},
    ]
    assert loss_curves(history) == {
        "text_loss": [(1, 2.0)], "loss_scale_2": [(1, 4.0)], "loss_scale_10": [(1, 5.0), (2, 3.0)]
    }  # fmt: skip
    assert loss_curves([{"step": 1, "loss": 3.0}]) == {"loss": [(1, 3.0)]}
    assert loss_curves([{"step": 1, "loss": 0.0, "reward": 0.5}]) == {"reward": [(1, 0.5)]}
    assert loss_curves([{"step": 1, "eval_loss": 3.0}]) == {}


@pytest.mark.parametrize(
    "points", [[(1, 2.0)], [(1, 5.0), (50, 1.0), (100, 0.5)], [(3, 1.0), (4, 1.0)], [(1, 1e38), (2, 1e38)]]
)
def test_a_curve_falls_from_the_left_to_the_right(points):
    pixels = np.asarray(plot({"loss": points}))
    color = tuple(int(COLORS[0][i : i + 2], 16) for i in (1, 3, 5))
    rows, columns = np.nonzero((pixels[:, :790] == color).all(-1))
    if len(points) > 1:
        assert rows[columns.argmin()] <= rows[columns.argmax()] and columns.min() <= 75 and columns.max() >= 785
    assert pixels.shape == (540, 960, 3)
