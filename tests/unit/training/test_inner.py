# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from keelwright.training.composer import GradientComposer
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.inner import InnerTraining
from keelwright.training.processes import Replicated
from keelwright.training.rows import Batch, EncodedRow
from keelwright.training.terms import Objective, Term

GOALS = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
SLOPE = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, -0.2], [0.0, -0.2, 0.5]])


class Point(nn.Module):
    """A weight vector that is pulled about."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))

    def forward(self) -> Tensor:
        return self.w


def _pull(model: Callable[[], Tensor], batch: Batch) -> Tensor:
    """Half the squared distance to each row's goal."""
    return 0.5 * (model() - GOALS[batch.rows]).square().sum()


def _bowl(model: Callable[[], Tensor], batch: Batch) -> Tensor:
    """A quadratic form that depends on the rows drawn."""
    w = model()
    return (1.0 + batch.rows.float()).sum() * 0.5 * (w @ SLOPE @ w)


def _composer(accumulate: int = 1) -> GradientComposer:
    row = EncodedRow(torch.tensor([1, 2]), 1)
    feeds = {name: EncodedFeed([row] * 12, 6, seed) for seed, name in enumerate(("adversary", "held out", "ordinary"))}
    model = Point()
    found = Feeds(feeds, pad_id=0, device=torch.device("cpu"), accumulate=accumulate)
    return GradientComposer(model, dict(model.named_parameters()), found, Replicated(Accelerator(cpu=True)))


def _term(inner: InnerTraining, **settings: object) -> Term:
    return Term("resistance", "held out", loss=_bowl, at=inner, **settings)


def _by_hand(composer: GradientComposer, inner: InnerTraining, step: int) -> Tensor:
    """The same, written out."""
    feeds, total = composer.feeds, torch.zeros(3)
    for run in range(inner.runs):
        rate, switch = inner.plan(step, run)
        w = composer.weights[0].detach().clone().requires_grad_()
        optimizer = torch.optim.AdamW([w], lr=rate, betas=inner.betas, weight_decay=inner.weight_decay)
        number = step * inner.runs + run
        held = torch.tensor(feeds.indices("held out", number))
        for k in range(inner.steps):
            picked = feeds.indices("ordinary" if k < switch else "adversary", number * inner.steps + k)
            w.grad = (w.detach() - GOALS[torch.tensor(picked)]).sum(dim=0) / 6
            optimizer.step()
            if (k + 1) % inner.every == 0:
                factor = math.exp(inner.decay * (k - (inner.steps - 1))) / inner.runs
                total += factor * (1.0 + held.float()).sum() / 6 * (SLOPE @ w.detach())
    return total


INNER = InnerTraining("adversary", 6, every=2, lrs=(0.1, 0.3), decay=0.5, runs=3, loss=_pull, seed=4)


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("before", [None, "ordinary"])
def test_the_gradient_equals_a_loop_written_out(step: int, before: str | None) -> None:
    composer = _composer()
    inner = InnerTraining(
        "adversary", 6, every=2, lrs=(0.1, 0.3), decay=0.5, runs=3, loss=_pull, seed=4, before=before, before_share=0.7
    )
    composer.step = step
    found = inner.gradient(composer, _term(inner)).gradient[0]
    torch.testing.assert_close(found, _by_hand(composer, inner, step))


def test_weights_are_the_same_bits_afterwards() -> None:
    composer = _composer()
    before = composer.weights[0].detach().clone()
    INNER.gradient(composer, _term(INNER))
    assert torch.equal(composer.weights[0], before)
    assert composer.weights[0].grad is None


def test_weights_are_the_same_bits_after_a_loss_that_failed() -> None:
    composer = _composer()
    before = composer.weights[0].detach().clone()

    def broken(model: object, batch: Batch) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        INNER.gradient(composer, Term("resistance", "held out", loss=broken, at=INNER))
    assert torch.equal(composer.weights[0], before)


def test_a_step_in_parts_is_the_step_in_one() -> None:
    whole, parts = (_composer(accumulate) for accumulate in (1, 3))
    first, second = (INNER.gradient(one, _term(INNER)) for one in (whole, parts))
    torch.testing.assert_close(first.gradient[0], second.gradient[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first.value, second.value, rtol=1e-5, atol=1e-6)


def test_places_count_less_the_earlier_they_are() -> None:
    inner = InnerTraining("adversary", 6, every=2, decay=0.5, runs=2)
    found = [inner.weight_of(k) for k in range(6)]
    assert found == pytest.approx([0, math.exp(-2.0) / 2, 0, math.exp(-1.0) / 2, 0, 0.5])


def test_the_composed_step_holds_the_gradient_times_the_terms_weight() -> None:
    composer = _composer()

    class Both(Objective):
        def terms(self, step: int) -> tuple[Term, ...]:
            return (Term("retain", "ordinary", loss=_pull), _term(INNER, weight=4.0))

    composed = composer.compose(Both(), 2).gradient[0]
    plain = composer.gradient(_pull, "ordinary", draw=2).gradient[0]
    torch.testing.assert_close(composed - plain, 4.0 * _by_hand(composer, INNER, 2))


def test_all_places_of_a_run_see_the_same_rows_and_every_run_others() -> None:
    composer, seen = _composer(), []

    def watch(model: Callable[[], Tensor], batch: Batch) -> Tensor:
        seen.append(tuple(batch.rows.tolist()))
        return _bowl(model, batch)

    INNER.gradient(composer, Term("resistance", "held out", loss=watch, at=INNER))
    runs = [seen[0:3], seen[3:6], seen[6:9]]
    assert len(seen) == 9
    assert all(len(set(run)) == 1 for run in runs)
    assert len({run[0] for run in runs}) == 3


def test_rates_and_switches_are_a_function_of_step_and_run() -> None:
    inner = InnerTraining("adversary", 60, lrs=(0.1, 0.2, 0.3), before="ordinary", before_share=0.25, seed=1)
    plans = [inner.plan(step, run) for step in range(150) for run in range(2)]
    assert plans == [inner.plan(step, run) for step in range(150) for run in range(2)]
    assert {rate for rate, _ in plans} == {0.1, 0.2, 0.3}
    switched = [switch for _, switch in plans if switch]
    assert 0.17 < len(switched) / 300 < 0.33
    # The mean of Beta(6, 3) is 2/3.
    assert 36 < sum(switched) / len(switched) < 43


def test_figures_say_how_the_adversary_fared() -> None:
    figures: dict[str, float] = {}
    inner = InnerTraining("adversary", 20, lrs=(0.2,), loss=_pull, figures=figures)
    composer = _composer()
    inner.gradient(composer, _term(inner))
    assert set(figures) == {"adversary loss at first", "adversary loss at last", "resistance at last"}
    assert figures["adversary loss at last"] < figures["adversary loss at first"]


def test_the_adversarys_gradients_are_let_go_as_it_goes(tokenizer, new_model, rows, monkeypatch):
    from keelwright.training.composer import GradientComposer

    held = []
    whole = GradientComposer.compose

    def compose(self, objective, step):
        taken = self.processes.reduce

        def reduce(gradient):
            held.append(len(self._sums or ()))
            return taken(gradient)

        monkeypatch.setattr(self.processes, "reduce", reduce, raising=False)
        return whole(self, objective, step)

    monkeypatch.setattr(GradientComposer, "compose", compose)
    from keelwright.data.row_sets import RowSets
    from keelwright.data.rows import ChatRow
    from keelwright.harden.tar import Tar, TarConfig
    from keelwright.training.config import TrainConfig
    from keelwright.training.loop import train

    refusals = tuple(ChatRow(row.prompt, "no, such a deed would harm the village.") for row in rows)
    config = TarConfig(inner_steps=8, every=4, loss="refusal", inner_batch=2, held_out_batch=2, switch_share=0.0)
    given = RowSets(harmful=tuple(rows), safety=refusals)
    train(new_model(), tokenizer, Tar(config).recipe(given, TrainConfig(steps=1, batch_size=2)))
    assert len(held) >= 8 and max(held) <= 2
