# SPDX-License-Identifier: Apache-2.0
"""The gradient composer: known answers, what it leaves alone, what it counts once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError
from keelwright.data.rows import ChatRow
from keelwright.ops.gradients import Gradient, squared_norm
from keelwright.training.composer import Composed, GradientComposer, Taken
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.lora import attach_lora
from keelwright.training.losses import answer_loss
from keelwright.training.processes import Processes, Replicated
from keelwright.training.rows import Batch, EncodedRow, encode_rows
from keelwright.training.terms import Anchor, Objective, Term, WeightShift

Model = Callable[..., LlamaForCausalLM]
CURVE = torch.tensor([[1.0, 0.0], [0.0, 10.0]])


class Point(nn.Module):
    """Two weights."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values))
        self.passes = 0


def bowl(model: Point, batch: Batch) -> Tensor:
    """h = x'Ax / 2, once per row."""
    model.passes += 1
    return len(batch.rows) * 0.5 * model.x @ CURVE @ model.x


def slope(model: Point, batch: Batch) -> Tensor:
    model.passes += 1
    return len(batch.rows) * model.x.sum()


@dataclass
class Terms(Objective):
    """An objective of fixed terms."""

    listed: Sequence[Term] = ()
    pulls: Sequence[Anchor] = ()
    names: Sequence[str] | None = None
    seen: dict[str, Gradient] = field(default_factory=dict)

    def terms(self, step: int) -> Sequence[Term]:
        return self.listed

    def anchors(self, step: int) -> Sequence[Anchor]:
        return self.pulls

    def trained(self, step: int) -> Sequence[str] | None:
        return self.names


def alone() -> Processes:
    return Replicated(Accelerator(device_placement=False))


def composer_of(
    model: nn.Module,
    rows: Mapping[str, Sequence[EncodedRow]] | None = None,
    *,
    batch_size: int = 4,
    meet: Processes | None = None,
    **split: int,
) -> GradientComposer:
    plain = [EncodedRow(torch.arange(1, 4), 2) for _ in range(6)]
    feeds = {
        name: EncodedFeed(one, batch_size, seed=1)
        for name, one in (rows or dict.fromkeys(("user", "harmful"), plain)).items()
    }
    weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    drawn = Feeds(feeds, pad_id=0, device=torch.device("cpu"), **split)
    return GradientComposer(model, weights, drawn, meet or alone())


def at(size: float, **settings: object) -> WeightShift:
    return WeightShift(size, **settings)


def booster(lambda_: float = 1.0, alpha: float = 0.1, loss: Callable[..., Tensor] = bowl) -> Terms:
    return Terms(
        listed=(
            Term("alignment", "user", loss=loss if loss is not bowl else slope),
            Term("harm", "harmful", weight=lambda_, loss=loss),
            Term("harm after a step", "harmful", weight=-lambda_, loss=loss, at=at(-alpha)),
        )
    )


def _flat(gradient: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([one.flatten() for one in gradient if one is not None])


def _difference(composer: GradientComposer, alpha: float) -> Tensor:
    before = composer.gradient(bowl, "harmful").gradient
    after = at(-alpha).gradient(composer, Term("h", "harmful", loss=bowl)).gradient
    return _flat(before) - _flat(after)


def test_the_harmful_difference_on_a_bowl_is_what_the_paper_says() -> None:
    # A x = (1, 10), ||A x|| = sqrt(101); alpha A (A x) / ||A x|| = .1 (1, 100) / 10.0499.
    found = _difference(composer_of(Point(1.0, 1.0)), 0.1)
    torch.testing.assert_close(found, torch.tensor([0.00995037, 0.995037]), rtol=1e-4, atol=1e-6)


def test_a_composed_step_on_a_bowl_is_the_sum_of_its_parts() -> None:
    found = composer_of(Point(1.0, 1.0)).compose(booster(lambda_=5.0), 0)
    expected = torch.tensor([1.0, 1.0]) + 5.0 * torch.tensor([0.00995037, 0.995037])
    torch.testing.assert_close(_flat(found.gradient), expected, rtol=1e-4, atol=1e-5)
    drop = found.losses["harm"] - found.losses["harm after a step"]
    assert found.losses["alignment"] == pytest.approx(2.0)
    assert found.losses["harm"] == pytest.approx(5.5)
    assert drop == pytest.approx(0.1 * 101**0.5 - 0.005 * 1001 / 101, rel=1e-4)


def test_the_drop_of_a_short_step_is_the_length_of_the_gradient() -> None:
    composer = composer_of(Point(1.0, 1.0))
    norm = 101**0.5
    gaps = []
    for alpha in (0.1, 0.01, 0.001):
        before = float(composer.gradient(bowl, "harmful").value)
        after = float(at(-alpha).gradient(composer, Term("h", "harmful", loss=bowl)).value)
        gaps.append(abs((before - after) / alpha - norm))
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]
    assert gaps[2] < 0.01


def test_booster_takes_three_passes_per_micro_batch_and_not_four() -> None:
    for accumulate in (1, 2):
        model = Point(1.0, 1.0)
        composer_of(model, accumulate=accumulate).compose(booster(), 0)
        assert model.passes == 3 * accumulate


def test_terms_that_share_loss_and_rows_share_a_pass_and_others_do_not() -> None:
    model = Point(1.0, 1.0)
    composer = composer_of(model)
    found = composer.compose(Terms(listed=(Term("a", "user", loss=bowl), Term("b", "user", 0.5, loss=bowl))), 0)
    assert model.passes == 1
    assert _flat(found.gradient).tolist() == [1.5, 15.0]
    others = (Term("c", "harmful", loss=bowl), Term("d", "user", loss=slope), Term("e", "user", loss=bowl, per="row"))
    composer.compose(Terms(listed=(Term("a", "user", loss=bowl), *others)), 0)
    assert model.passes == 1 + 4


def test_a_term_of_weight_zero_is_not_evaluated() -> None:
    model = Point(1.0, 1.0)
    composer_of(model).compose(booster(lambda_=0.0, loss=slope), 0)
    assert model.passes == 1


def test_what_was_taken_between_steps_is_not_taken_for_the_steps() -> None:
    model = Point(1.0, 1.0)
    composer = composer_of(model)
    first = _flat(composer.gradient(bowl, "user").gradient)
    with torch.no_grad():
        model.x.mul_(3.0)
    assert torch.equal(_flat(composer.gradient(bowl, "user").gradient), 3 * first)
    assert torch.equal(_flat(composer.compose(Terms(listed=(Term("a", "user", loss=bowl),)), 0).gradient), 3 * first)
    with torch.no_grad():
        model.x.mul_(2.0)
    assert torch.equal(_flat(composer.gradient(bowl, "user").gradient), 6 * first)


def test_no_term_and_a_name_twice_are_refused() -> None:
    composer = composer_of(Point(1.0, 1.0))
    with pytest.raises(ConfigError, match=r"terms with names of their own(?s:.)*no term"):
        composer.compose(Terms(listed=(Term("a", "user", weight=0.0, loss=bowl),)), 0)
    with pytest.raises(ConfigError, match="a, a"):
        composer.compose(Terms(listed=(Term("a", "user", loss=bowl), Term("a", "harmful", loss=bowl))), 0)


def test_after_an_error_the_next_step_starts_clean() -> None:
    model = Point(1.0, 1.0)
    composer = composer_of(model)

    def fails(model: Point, batch: Batch) -> Tensor:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        composer.compose(Terms(listed=(Term("a", "user", loss=bowl), Term("b", "user", loss=fails)), names=()), 0)
    with torch.no_grad():
        model.x.mul_(2.0)
    assert _flat(composer.compose(Terms(listed=(Term("a", "user", loss=bowl),)), 0).gradient).tolist() == [2.0, 20.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_their_bits_back_after_every_shifted_gradient(dtype: torch.dtype) -> None:
    model = Point(1.0, 1.0).to(dtype)
    before = model.x.detach().clone()
    composer = composer_of(model)
    # In bfloat16 the curve is too: adding and taking away .1 (1, 10) / 10.05 would not give 1 back.
    moved: list[Tensor] = []

    def watched(model: Point, batch: Batch) -> Tensor:
        moved.append(model.x.detach().clone())
        return len(batch.rows) * 0.5 * model.x.float() @ CURVE @ model.x.float()

    for shift in (at(-0.1), at(0.05, adaptive=True), at(3.0)):
        shift.gradient(composer, Term("h", "harmful", loss=watched))
        assert torch.equal(model.x, before)
        assert not torch.equal(moved[-1], before)


def test_weights_have_their_bits_back_after_an_error() -> None:
    model = Point(0.1, 0.2)
    before = model.x.detach().clone()
    composer = composer_of(model)
    with pytest.raises(RuntimeError), composer.moved([torch.tensor([1.0, 1.0])]):
        raise RuntimeError("stopped")
    assert torch.equal(model.x, before)


def test_moves_within_moves_are_undone_one_by_one() -> None:
    model = Point(0.1, 0.2)
    composer = composer_of(model)
    first = model.x.detach().clone()
    with composer.moved([torch.tensor([1.0, 1.0])]):
        second = model.x.detach().clone()
        with composer.moved([torch.tensor([0.3, 0.3])]):
            assert float(model.x[0].detach()) == pytest.approx(1.4)
        assert torch.equal(model.x, second)
    assert torch.equal(model.x, first)


def test_gradients_of_bfloat16_weights_are_added_up_in_float32() -> None:
    model = Point(1.0, 1.0).bfloat16()
    composer = composer_of(model, accumulate=4)

    def third(model: Point, batch: Batch) -> Tensor:
        return len(batch.rows) * (model.x * torch.tensor([1.0, 1.0 / 3.0])).sum()

    found = composer.compose(Terms(listed=(Term("a", "user", loss=third), Term("b", "harmful", -0.999, loss=third))), 0)
    assert found.gradient[0] is not None
    assert found.gradient[0].dtype == torch.float32
    expected = 0.001 * torch.tensor([1.0, float(torch.tensor(1.0 / 3.0).bfloat16())])
    torch.testing.assert_close(_flat(found.gradient), expected, rtol=5e-3, atol=0)


def test_only_gradients_of_the_weights_that_the_step_changes_are_taken() -> None:
    class Two(Point):
        def __init__(self) -> None:
            super().__init__(1.0, 1.0)
            self.y = nn.Parameter(torch.ones(2))

    asked: list[int] = []

    class Watched(Replicated):
        def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> Gradient:
            asked.append(len(weights))
            return super().gradient(loss, weights)

    def both(model: Two, batch: Batch) -> Tensor:
        return bowl(model, batch) + len(batch.rows) * 2.0 * model.y.sum()

    composer = composer_of(Two(), meet=Watched(Accelerator(device_placement=False)))
    found = composer.compose(Terms(listed=(Term("a", "user", loss=both, at=at(0.1)),), names=("y",)), 0)
    assert asked == [1, 1]
    assert found.gradient[0] is None
    assert found.gradient[1] is not None
    everything = composer.compose(Terms(listed=(Term("a", "user", loss=both),)), 0)
    assert all(one is not None for one in everything.gradient)
    nothing = composer.compose(Terms(listed=(Term("a", "user", loss=both),), names=()), 0)
    assert nothing.gradient == [None, None]
    assert nothing.losses == everything.losses


def test_a_pull_is_added_without_a_pass() -> None:
    model = Point(1.0, 2.0)
    target, strong = [torch.tensor([0.0, 1.0])], [torch.tensor([1.0, 10.0])]
    terms = (Term("a", "user", loss=bowl, per="row"),)
    found = composer_of(model).compose(
        Terms(listed=terms, pulls=(Anchor(target, 0.5), Anchor(target, 2.0, scale=strong))), 0
    )
    assert model.passes == 1
    assert _flat(found.gradient).tolist() == [1.0 + 0.5 + 2.0, 20.0 + 0.5 + 20.0]


def test_surgery_sees_the_gradients_by_name_and_replaces_the_sum() -> None:
    @dataclass
    class Surgery(Terms):
        replace: bool = True

        def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
            self.seen = dict(gradients)
            return gradients["harm"] if self.replace else None

    model = Point(1.0, 1.0)
    listed = (Term("task", "user", loss=slope, per="row"), Term("harm", "harmful", 7.0, loss=bowl, per="row"))
    replaced = composer_of(model).compose(Surgery(listed=listed), 0)
    assert _flat(replaced.gradient).tolist() == [1.0, 10.0]
    kept = Surgery(listed=listed, replace=False)
    summed = composer_of(model).compose(kept, 0)
    assert _flat(summed.gradient).tolist() == [1.0 + 7.0, 1.0 + 70.0]
    assert {name: _flat(one).tolist() for name, one in kept.seen.items()} == {"task": [1.0, 1.0], "harm": [1.0, 10.0]}


class Threads:
    """Two threads that sum as two processes do."""

    def __init__(self, count: int) -> None:
        self._barrier, self._parts, self.sums = threading.Barrier(count, timeout=60), {}, 0

    def stop(self) -> None:
        self._barrier.abort()

    def _meet(self, part: list[Tensor | None]) -> list[list[Tensor | None]]:
        self._parts[threading.get_ident()] = part
        self._barrier.wait()
        found = [self._parts[key] for key in sorted(self._parts)]
        self._barrier.wait()
        return found

    def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> Gradient:
        return list(torch.autograd.grad(loss, list(weights), allow_unused=True))

    def reduce(self, gradient: Gradient) -> Gradient:
        self.sums += 1
        return [None if None in parts else sum(parts[1:], parts[0]) for parts in _columns(self._meet(list(gradient)))]

    def sum(self, value: Tensor) -> Tensor:
        return torch.stack([part[0] for part in self._meet([value])]).sum(dim=0)

    def norm(self, gradient: Gradient) -> Tensor:
        return squared_norm(gradient).sqrt()


def _columns(parts: list[list[Tensor | None]]) -> list[list[Tensor | None]]:
    return [list(one) for one in zip(*parts, strict=True)]


def in_threads(work: Callable[[int, Threads], object], count: int = 2) -> tuple[list[object], Threads]:
    meeting, found = Threads(count), [None] * count

    def run(number: int) -> None:
        try:
            found[number] = work(number, meeting)
        finally:
            if found[number] is None:
                meeting.stop()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert None not in found, "a thread failed: its error is above"
    return found, meeting


OBJECTIVES = {
    "sft": lambda: Terms(listed=(Term("loss", "user"),)),
    "booster": lambda: booster(5.0, 0.05, loss=answer_loss),
    "sam": lambda: Terms(listed=(Term("task", "user", at=at(0.05)),)),
    "adaptive sam": lambda: Terms(listed=(Term("task", "user", at=at(0.5, adaptive=True)),)),
    "per row": lambda: Terms(listed=(Term("task", "user", per="row", at=at(0.05)), Term("harm", "harmful", -0.1))),
}


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]) -> dict[str, list[EncodedRow]]:
    """Rows of different length: a mean over micro-batches is not the mean over the batch."""
    other = [ChatRow(row.prompt, " ".join(row.answer.split()[: 1 + 2 * index])) for index, row in enumerate(rows)]
    return {
        "user": encode_rows(tokenizer, other, module=new_model()),
        "harmful": encode_rows(tokenizer, rows[::-1] + other[:3], module=new_model()),
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_to_the_batch(name: str, new_model: Model, encoded: dict[str, list[EncodedRow]]) -> None:
    whole = composer_of(new_model(), encoded, batch_size=6).compose(OBJECTIVES[name](), 3)
    for parts in (2, 3, 6):
        found = composer_of(new_model(), encoded, batch_size=6, accumulate=parts).compose(OBJECTIVES[name](), 3)
        assert found.losses == pytest.approx(whole.losses, rel=1e-5)
        torch.testing.assert_close(_flat(found.gradient), _flat(whole.gradient), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_processes_add_up_to_the_batch(name: str, new_model: Model, encoded: dict[str, list[EncodedRow]]) -> None:
    whole = composer_of(new_model(), encoded, batch_size=6).compose(OBJECTIVES[name](), 3)
    models = [new_model(), new_model()]

    def work(number: int, meeting: Threads) -> Composed:
        split = {"accumulate": 2, "process": number, "processes": 2}
        composer = composer_of(models[number], encoded, batch_size=6, meet=meeting, **split)
        return composer.compose(OBJECTIVES[name](), 3)

    found, _ = in_threads(work)
    for one in found:
        assert one.losses == pytest.approx(whole.losses, rel=1e-5)
        torch.testing.assert_close(_flat(one.gradient), _flat(whole.gradient), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("name", "sums"), [("sft", 1), ("sam", 2), ("booster", 2)])
def test_a_gradient_is_summed_over_processes_no_oftener_than_needed(
    name: str, sums: int, new_model: Model, encoded: dict[str, list[EncodedRow]]
) -> None:
    models = [new_model(), new_model()]

    def work(number: int, meeting: Threads) -> Composed:
        composer = composer_of(models[number], encoded, meet=meeting, process=number, processes=2)
        return composer.compose(OBJECTIVES[name](), 0)

    _, meeting = in_threads(work)
    # Both threads count: the normed gradient, and the rest of the sum.
    assert meeting.sums == 2 * sums


def test_a_sum_over_processes_that_is_asked_for_again_is_the_same_one() -> None:
    asked: list[bool] = []

    @dataclass
    class Twice(Terms):
        def combine(self, step: int, gradients: Mapping[str, Gradient]) -> Gradient | None:
            first, second = gradients["harm after a step"], gradients["harm after a step"]
            asked.append(first is second)
            asked.append(gradients["harm"] is gradients["harm"])
            return None

    models = [Point(1.0, 1.0), Point(1.0, 1.0)]
    expected = composer_of(Point(1.0, 1.0)).compose(booster(), 0)

    def work(number: int, meeting: Threads) -> Composed:
        composer = composer_of(models[number], meet=meeting, process=number, processes=2)
        return composer.compose(Twice(listed=booster().listed), 0)

    found, meeting = in_threads(work)
    assert asked == [True] * 4
    assert meeting.sums == 2 * 3
    for one in found:
        torch.testing.assert_close(_flat(one.gradient), _flat(expected.gradient), rtol=1e-5, atol=1e-6)


def test_the_step_beside_the_weights_is_that_of_the_summed_gradient_not_of_each_share() -> None:
    def uneven(model: Point, batch: Batch) -> Tensor:
        # The rows pull in directions that differ: shares of the gradient have other norms than their sum.
        pulls = torch.stack([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([-1.0, 1.0])])
        return ((model.x * pulls[batch.rows % 3]).sum(dim=1) + 0.5 * (model.x**2).sum()).sum()

    term = Term("a", "user", loss=uneven, per="row")
    whole = _flat(at(0.3).gradient(composer_of(Point(1.0, 1.0)), term).gradient)
    models = [Point(1.0, 1.0), Point(1.0, 1.0)]

    def work(number: int, meeting: Threads) -> Taken:
        composer = composer_of(models[number], meet=meeting, process=number, processes=2)
        return composer.reduced(at(0.3).gradient(composer, term))

    found, _ = in_threads(work)
    for one in found:
        torch.testing.assert_close(_flat(one.gradient), whole, rtol=1e-5, atol=1e-6)


def test_both_passes_drop_the_same_units(new_model: Model, encoded: dict[str, list[EncodedRow]]) -> None:
    composer = composer_of(new_model(attention_dropout=0.5).train(), encoded, accumulate=2)
    term = Term("harm", "harmful")
    plain = composer.take(term)
    shifted = at(0.0).gradient(composer, term)
    assert torch.equal(_flat(plain.gradient), _flat(shifted.gradient))
    assert torch.equal(plain.value, shifted.value)


def test_other_steps_parts_and_processes_drop_other_units() -> None:
    class Dropping(Point):
        def forward(self) -> Tensor:
            return nn.functional.dropout(torch.ones(64), 0.5, training=True)

    seen: list[Tensor] = []

    def drops(model: Dropping, batch: Batch) -> Tensor:
        seen.append(model())
        return model.x.sum()

    for split in ({"accumulate": 2}, {"process": 1, "processes": 2}):
        composer = composer_of(Dropping(1.0), **split)
        for step in (0, 1):
            composer.step = step
            composer.gradient(drops, "user")
    masks = {tuple(one.tolist()) for one in seen}
    assert len(masks) == len(seen) == 6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_activations_computed_again_change_nothing(
    name: str, new_model: Model, encoded: dict[str, list[EncodedRow]]
) -> None:
    models = [new_model(attention_dropout=0.2).train(), new_model(attention_dropout=0.2).train()]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second = (composer_of(model, encoded).compose(OBJECTIVES[name](), 0) for model in models)
    assert first.losses == pytest.approx(second.losses, rel=1e-6)
    torch.testing.assert_close(_flat(second.gradient), _flat(first.gradient), rtol=1e-4, atol=1e-7)


def test_of_a_model_with_an_adapter_only_its_factors_have_gradients(
    new_model: Model, encoded: dict[str, list[EncodedRow]]
) -> None:
    model = new_model()
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    attach_lora(model, rank=2, alpha=4.0, seed=0)
    composer = composer_of(model, encoded)
    assert all(".lora_" in name for name in composer.names)
    found = composer.compose(OBJECTIVES["booster"](), 0)
    assert all(one is not None for one in found.gradient)
    for name, one in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(one, before[name.replace(".base_layer", "")])
            assert one.grad is None
