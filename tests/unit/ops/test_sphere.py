# SPDX-License-Identifier: Apache-2.0
"""Points on the arc between two vectors."""

import math

import pytest
import torch

from keelwright.ops.sphere import arc_weights, many_arc_weights


@pytest.mark.parametrize("degrees", [0.01, 1.0, 60.0, 90.0, 179.0])
@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0, 1.5, -0.5])
def test_the_point_lies_on_the_circle_at_its_share_of_the_angle(degrees, t):
    angle = math.radians(degrees)
    first, second = arc_weights(math.cos(angle), t)
    found = (first + second * math.cos(angle), second * math.sin(angle))
    # The cosine of a small angle holds half of its digits.
    assert found == pytest.approx((math.cos(t * angle), math.sin(t * angle)), abs=1e-11)


def test_many_pairs_are_as_each_alone_and_linear_ones_take_the_chord():
    cosines = torch.tensor([0.5, -0.25, 1.0, -1.0, 0.0], dtype=torch.float64)
    is_linear = torch.tensor([False, False, True, True, True])
    first, second = many_arc_weights(cosines, 0.3, is_linear)
    wanted = [arc_weights(float(one), 0.3) for one in cosines[:2]] + [(0.7, 0.3)] * 3
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [pytest.approx(one, abs=1e-15) for one in wanted]
