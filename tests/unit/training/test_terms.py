# SPDX-License-Identifier: Apache-2.0
"""Steps beside the weights, pulls, and the defaults of an objective."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from keelwright.ops.gradients import squared_norm
from keelwright.training.composer import GradientComposer
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.processes import Replicated
from keelwright.training.rows import Batch, EncodedRow
from keelwright.training.terms import Anchor, Objective, Term, WeightShift, pulled


class Point(nn.Module):
    def __init__(self, *values: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values))


def _composer(model: nn.Module) -> GradientComposer:
    feed = EncodedFeed([EncodedRow(torch.arange(1, 4), 2)], 1, seed=0)
    feeds = Feeds({"user": feed}, pad_id=0, device=torch.device("cpu"))
    return GradientComposer(
        model, dict(model.named_parameters()), feeds, Replicated(Accelerator(device_placement=False))
    )


def _loss(of: Callable[[Tensor], Tensor]) -> Callable[[Point, Batch], Tensor]:
    return lambda model, batch: of(model.x)


def test_a_step_has_the_length_and_direction_that_was_asked_for() -> None:
    # Sheet 13c: g = (3, 4), rho = .05 gives e = (.03, .04).
    composer = _composer(Point(2.0, 1.0))
    along: list[Tensor | None] = [torch.tensor([3.0, 4.0])]
    assert WeightShift(0.05).step(composer, along)[0].tolist() == pytest.approx([0.03, 0.04])
    assert WeightShift(-0.05).step(composer, along)[0].tolist() == pytest.approx([-0.03, -0.04])


def test_an_adaptive_step_follows_the_squares_of_the_weights() -> None:
    # Sheet 13c: w = (2, 1), g = (3, 4), rho = .5 gives (.832050, .277350).
    for sign in (1.0, -1.0):
        composer = _composer(Point(2.0 * sign, 1.0))
        found = WeightShift(0.5, adaptive=True).step(composer, [torch.tensor([3.0, 4.0])])
        assert found[0].tolist() == pytest.approx([0.832050, 0.277350], abs=1e-6)


def test_an_adaptive_step_of_bfloat16_weights_is_computed_in_float32() -> None:
    composer = _composer(Point(2.0, 1.0).bfloat16())
    found = WeightShift(0.5, adaptive=True).step(composer, [torch.tensor([3.0, 4.0])])
    assert found[0].dtype == torch.float32
    assert found[0].tolist() == pytest.approx([0.832050, 0.277350], abs=1e-6)


def test_the_gradient_at_a_worse_place_is_the_papers() -> None:
    # Sheet 13c: L = (x^2 + 10 y^2) / 2 at (1, 1), rho = .05 gives (1.004975, 10.497519).
    composer = _composer(Point(1.0, 1.0))
    bowl = _loss(lambda x: 0.5 * (x[0] ** 2 + 10.0 * x[1] ** 2))
    found = WeightShift(0.05).gradient(composer, Term("a", "user", loss=bowl))
    assert found.gradient[0].tolist() == pytest.approx([1.004975, 10.497519], abs=1e-5)


def test_weights_without_a_gradient_stay_where_they_are() -> None:
    class Two(Point):
        def __init__(self) -> None:
            super().__init__(3.0, 4.0)
            self.unused = nn.Parameter(torch.ones(2))

    model = Two()
    places: list[Tensor] = []

    def loss(model: Two, batch: Batch) -> Tensor:
        places.append(model.unused.detach().clone())
        return 0.5 * (model.x**2).sum()

    for shift in (WeightShift(1.0), WeightShift(1.0, adaptive=True)):
        found = shift.gradient(_composer(model), Term("a", "user", loss=loss))
        assert found.gradient[1] is None
    assert all(torch.equal(one, torch.ones(2)) for one in places)


def test_where_there_is_no_slope_the_step_is_none_and_not_nan() -> None:
    composer = _composer(Point(0.0, 0.0))
    flat = _loss(lambda x: 0.5 * (x**2).sum())
    for shift in (WeightShift(1.0), WeightShift(1.0, eps=1e-12), WeightShift(1.0, adaptive=True)):
        assert shift.gradient(composer, Term("a", "user", loss=flat)).gradient[0].tolist() == [0.0, 0.0]


def test_a_pull_is_strength_times_scale_times_the_way() -> None:
    weights = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    anchor = Anchor(
        [torch.tensor([0.0, 4.0]), torch.tensor([3.0])], 0.5, scale=[torch.tensor([2.0, 1.0]), torch.ones(1)]
    )
    found = pulled([torch.tensor([10.0, 10.0]), None], weights, anchor)
    assert [one.tolist() for one in found] == [[11.0, 9.0], [0.0]]
    plain = pulled([None, None], weights, Anchor(anchor.target, 0.5))
    assert [one.tolist() for one in plain] == [[0.5, -1.0], [0.0]]


def test_a_pull_is_the_gradient_of_its_penalty() -> None:
    weight = torch.tensor([0.3, -0.2], requires_grad=True)
    target, scale = torch.tensor([0.2, 0.0]), torch.tensor([2.0, 0.5])
    (10.0 / 2 * (scale * (weight - target) ** 2).sum()).backward()
    found = pulled([None], [weight], Anchor([target], 10.0, scale=[scale]))
    assert found[0].tolist() == pytest.approx(weight.grad.tolist())
    assert not found[0].requires_grad


def test_the_default_objective_is_plain_tuning() -> None:
    objective = Objective()
    assert objective.terms(5) == (Term("loss", "user"),)
    assert (objective.anchors(0), objective.combine(0, {}), objective.trained(0), objective.state()) == (
        (),
        None,
        None,
        {},
    )
    assert Objective(feed="safety").terms(0)[0].feed == "safety"


def test_objectives_do_not_share_their_figures() -> None:
    first, second = Objective(), Objective()
    first.figures["norm"] = 1.0
    assert second.figures == {}


def test_a_step_of_many_weights_has_one_norm_for_all() -> None:
    composer = _composer(Point(1.0, 1.0))
    along: list[Tensor | None] = [torch.full((2, 3), 2.0), None, torch.full((5,), -1.0)]
    step = WeightShift(0.7).step(composer, along)
    assert float(squared_norm(step).sqrt()) == pytest.approx(0.7)
    assert step[1] is None
