# SPDX-License-Identifier: Apache-2.0
"""Shifted activations: what is added where, once per output, the same in parts as in the whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError
from keelwright.data.rows import ChatRow
from keelwright.training.activation_shift import ActivationNoise, ActivationShift, activation_gradients
from keelwright.training.composer import GradientComposer, Taken
from keelwright.training.feeds import EncodedFeed, Feeds
from keelwright.training.lora import attach_lora
from keelwright.training.losses import answer_loss
from keelwright.training.processes import Replicated
from keelwright.training.rows import Batch, EncodedRow, encode_rows
from keelwright.training.sites import attention_outputs
from keelwright.training.terms import Shift, Term

Model = Callable[..., LlamaForCausalLM]
TERM = Term("alignment", "safety")


@pytest.fixture
def encoded(tokenizer: PreTrainedTokenizerFast, new_model: Model, rows: list[ChatRow]) -> list[EncodedRow]:
    """Rows of different length, so that there is padding and parts are padded less than the whole."""
    other = [ChatRow(row.prompt, " ".join(row.answer.split()[: 1 + 2 * index])) for index, row in enumerate(rows)]
    return encode_rows(tokenizer, other, module=new_model())


def composer_of(
    model: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    batch_size: int = 6,
    meet: object = None,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    **split: int,
) -> GradientComposer:
    feeds = Feeds({"safety": EncodedFeed(rows, batch_size, seed=1)}, pad_id=0, device=torch.device("cpu"), **split)
    weights = {name: one for name, one in model.named_parameters() if one.requires_grad}
    processes = meet or Replicated(Accelerator(device_placement=False))
    return GradientComposer(model, weights, feeds, processes, autocast=autocast)


def flat(taken: Taken) -> Tensor:
    return torch.cat([one.flatten() for one in taken.gradient if one is not None])


class Watch:
    """What each site passes on, with every hook that stands before this one applied."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[Tensor] = []
        blocks = model.model.layers
        for block in blocks:
            # The residual stream after attention is what the norm after it reads.
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda _, given: self.seen.append(given[0].detach())
            )


def shift_by_hand(model: LlamaForCausalLM, batch: Batch, rho: float) -> tuple[Tensor, list[Tensor]]:
    """Vaccine written out: gradients with respect to zeros that are added to each attention output."""
    sites = list(attention_outputs(model).values())
    added = [torch.zeros(*batch.input_ids.shape, 16, requires_grad=True) for _ in sites]

    def hook(place: int) -> Callable[..., tuple[object, ...]]:
        return lambda module, inputs, output: (output[0] + added[place], *output[1:])

    count = int((batch.labels[:, 1:] != -100).sum())
    handles = [site.register_forward_hook(hook(place)) for place, site in enumerate(sites)]
    along = torch.autograd.grad(answer_loss(model, batch) / count, added)
    norm = torch.cat([one.flatten() for one in along]).norm()
    shifts = [rho * one / (norm + 1e-7) for one in along]
    for place, one in enumerate(shifts):
        added[place] = one
    gradient = torch.autograd.grad(answer_loss(model, batch) / count, list(model.parameters()))
    for handle in handles:
        handle.remove()
    return torch.cat([one.flatten() for one in gradient]), shifts


@pytest.mark.parametrize("rho", [0.01, 2.0])
def test_the_gradient_is_that_of_the_method_written_out(
    rho: float, new_model: Model, encoded: list[EncodedRow]
) -> None:
    composer = composer_of(new_model(), encoded)
    expected, _ = shift_by_hand(new_model(), composer.feeds.batches("safety", 0)[0], rho)
    found = ActivationShift(rho).gradient(composer, TERM)
    torch.testing.assert_close(flat(found), expected, rtol=1e-4, atol=1e-6)
    assert float((flat(found) - flat(composer.take(TERM))).norm()) > 1e-4 * rho


def test_what_is_added_has_the_length_rho_over_all_sites_rows_and_tokens(
    new_model: Model, encoded: list[EncodedRow]
) -> None:
    _, shifts = shift_by_hand(new_model(), composer_of(new_model(), encoded).feeds.batches("safety", 0)[0], 3.0)
    assert float(torch.cat([one.flatten() for one in shifts]).norm()) == pytest.approx(3.0, rel=1e-5)
    model = new_model()
    composer, watch = composer_of(model, encoded, accumulate=2), Watch(model)
    ActivationShift(3.0).gradient(composer, TERM)
    # Two passes over two parts of two blocks. In the first block only its own shift is in the stream.
    first, second = watch.seen[0:4:2], watch.seen[4:8:2]
    length = sum(float((two - one).square().sum()) for one, two in zip(first, second, strict=True))
    own = activation_gradients(composer, answer_loss, "safety", attention_outputs(model))
    assert length**0.5 == pytest.approx(3.0 * float(own.norms[0] / own.norm), rel=1e-4)


def test_size_zero_is_the_gradient_at_the_activations(new_model: Model, encoded: list[EncodedRow]) -> None:
    composer = composer_of(new_model(), encoded)
    assert torch.equal(flat(ActivationShift(0.0).gradient(composer, TERM)), flat(composer.take(TERM)))


def test_a_small_shift_raises_the_loss_by_its_length_times_the_norm(
    new_model: Model, encoded: list[EncodedRow]
) -> None:
    composer = composer_of(new_model(), encoded)
    norm = float(activation_gradients(composer, answer_loss, "safety", attention_outputs(composer.model)).norm)
    plain = float(composer.take(TERM).value)
    for rho in (0.02, 0.1):
        raised = float(ActivationShift(rho).gradient(composer, TERM).value) - plain
        assert raised == pytest.approx(rho * norm, rel=0.1)
    assert float(ActivationShift(-0.02).gradient(composer, TERM).value) < plain


@pytest.mark.parametrize("shift", [ActivationShift(2.0), ActivationNoise(0.25, seed=3)], ids=["gradient", "noise"])
def test_micro_batches_add_up_to_the_batch(shift: Shift, new_model: Model, encoded: list[EncodedRow]) -> None:
    whole = shift.gradient(composer_of(new_model(), encoded), TERM)
    for parts in (2, 3, 6):
        found = shift.gradient(composer_of(new_model(), encoded, accumulate=parts), TERM)
        assert float(found.value) == pytest.approx(float(whole.value), rel=1e-5)
        torch.testing.assert_close(flat(found), flat(whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shift", [ActivationShift(2.0), ActivationNoise(0.25, seed=3)], ids=["gradient", "noise"])
def test_processes_add_up_to_the_batch(shift: Shift, new_model: Model, encoded: list[EncodedRow]) -> None:
    whole = shift.gradient(composer_of(new_model(), encoded), TERM)
    models, meeting = [new_model(), new_model()], threading.Barrier(2, timeout=60)
    parts: dict[int, Tensor] = {}
    found: dict[int, Taken] = {}

    class Both(Replicated):
        def sum(self, value: Tensor) -> Tensor:
            parts[threading.get_ident()] = value
            meeting.wait()
            total = torch.stack([parts[key] for key in sorted(parts)]).sum(dim=0)
            meeting.wait()
            return total

    def work(number: int) -> None:
        meet = Both(Accelerator(device_placement=False))
        split = {"accumulate": 2, "process": number, "processes": 2}
        found[number] = shift.gradient(composer_of(models[number], encoded, meet=meet, **split), TERM)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    torch.testing.assert_close(flat(found[0]) + flat(found[1]), flat(whole), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shift", [ActivationShift(2.0), ActivationNoise(0.25, seed=3)], ids=["gradient", "noise"])
def test_activations_computed_again_are_moved_again_and_not_twice(
    shift: Shift, new_model: Model, encoded: list[EncodedRow]
) -> None:
    models = [new_model(attention_dropout=0.2).train(), new_model(attention_dropout=0.2).train()]
    models[1].gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, second = (shift.gradient(composer_of(one, encoded, accumulate=2), TERM) for one in models)
    assert float(second.value) == pytest.approx(float(first.value), rel=1e-6)
    torch.testing.assert_close(flat(second), flat(first), rtol=1e-4, atol=1e-7)


def test_a_model_with_an_adapter_is_shifted_and_only_the_adapter_has_gradients(
    new_model: Model, encoded: list[EncodedRow]
) -> None:
    model = new_model()
    attach_lora(model, rank=2, alpha=4.0, seed=0)
    composer = composer_of(model, encoded)
    found = ActivationShift(2.0).gradient(composer, TERM)
    # The new adapter changes nothing yet, so activations, shift and loss are those of the model without it.
    plain = ActivationShift(2.0).gradient(composer_of(new_model(), encoded), TERM)
    assert float(found.value) == pytest.approx(float(plain.value), rel=1e-6)
    assert len(found.gradient) == len(composer.names)
    assert all(one.grad is None for one in model.parameters())


def test_sites_below_everything_that_is_trained_are_shifted_too(new_model: Model, encoded: list[EncodedRow]) -> None:
    frozen, whole = new_model(tie_word_embeddings=False), new_model(tie_word_embeddings=False)
    for name, one in frozen.named_parameters():
        one.requires_grad_(name.startswith("lm_head"))
    for model in (frozen, whole):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    found = ActivationShift(2.0).gradient(composer_of(frozen, encoded), TERM)
    expected = ActivationShift(2.0).gradient(composer_of(whole, encoded), TERM)
    assert float(found.value) == pytest.approx(float(expected.value), rel=1e-6)
    torch.testing.assert_close(found.gradient[-1], expected.gradient[-1], rtol=1e-4, atol=1e-7)


def test_under_bfloat16_autocast_the_shift_is_near_that_in_float32(new_model: Model, encoded: list[EncodedRow]) -> None:
    def half() -> AbstractContextManager[object]:
        return torch.autocast("cpu", dtype=torch.bfloat16)

    composer = composer_of(new_model(), encoded, autocast=half)
    found = activation_gradients(composer, answer_loss, "safety", attention_outputs(composer.model))
    assert found.norms.dtype == torch.float32
    plain = ActivationShift(2.0).gradient(composer_of(new_model(), encoded), TERM)
    moved = ActivationShift(2.0).gradient(composer, TERM)
    assert float(moved.value) == pytest.approx(float(plain.value), rel=0.02)
    assert float(torch.cosine_similarity(flat(moved), flat(plain), dim=0)) > 0.99


@pytest.mark.parametrize("shift", [ActivationShift(2.0), ActivationNoise(0.25)], ids=["gradient", "noise"])
def test_padding_is_not_moved(shift: Shift, new_model: Model, encoded: list[EncodedRow]) -> None:
    def all_tokens(model: Callable[..., object], batch: Batch) -> Tensor:
        # A loss that looks at padding as well has a gradient there.
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        return output.logits.square().sum()

    model = new_model()
    composer, watch = composer_of(model, encoded), Watch(model)
    kept = composer.feeds.batches("safety", 0)[0].attention_mask.bool()
    assert not bool(kept.all())
    composer.take(Term("all", "safety", loss=all_tokens))
    shift.gradient(composer, Term("all", "safety", loss=all_tokens))
    moved = (watch.seen[-2] - watch.seen[0]).norm(dim=-1)
    assert float(moved[~kept].max()) == 0.0
    assert float(moved[kept].min()) > 0.0


def test_only_the_chosen_layers_are_moved_and_share_one_norm(new_model: Model, encoded: list[EncodedRow]) -> None:
    model = new_model()
    composer, watch = composer_of(model, encoded), Watch(model)
    plain = composer.take(TERM)
    ActivationShift(2.0, layers=(1,)).gradient(composer, TERM)
    before, after = watch.seen[:2], watch.seen[-2:]
    assert torch.equal(before[0], after[0])
    assert float((after[1] - before[1]).norm()) == pytest.approx(2.0, rel=1e-4)
    nowhere = ActivationShift(2.0, layers=()).gradient(composer, TERM)
    assert torch.equal(flat(nowhere), flat(plain))


def test_a_layer_that_the_model_has_not_is_refused(new_model: Model, encoded: list[EncodedRow]) -> None:
    with pytest.raises(ConfigError, match="'layers'"):
        ActivationShift(2.0, layers=(0, 2)).gradient(composer_of(new_model(), encoded), TERM)


def test_noise_has_its_variance_and_belongs_to_step_and_seed(new_model: Model, encoded: list[EncodedRow]) -> None:
    model = new_model()
    composer, watch = composer_of(model, encoded), Watch(model)
    kept = composer.feeds.batches("safety", 0)[0].attention_mask.bool()
    composer.take(TERM)
    ActivationNoise(0.25, seed=1).gradient(composer, TERM)
    noise = (watch.seen[2] - watch.seen[0])[kept]
    assert float(noise.std()) == pytest.approx(0.5, rel=0.05)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.05)
    values = [float(ActivationNoise(0.25, seed=seed).gradient(composer, TERM).value) for seed in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    rows = noise.split(kept.sum(dim=1).tolist())
    assert not torch.allclose(rows[0][:4], rows[1][:4])


def test_noise_takes_one_pass_and_the_gradient_two(new_model: Model, encoded: list[EncodedRow]) -> None:
    passes: list[int] = []

    def counted(model: Callable[..., object], batch: Batch) -> Tensor:
        passes.append(1)
        return answer_loss(model, batch)

    term = Term("alignment", "safety", loss=counted)
    ActivationNoise(0.25).gradient(composer_of(new_model(), encoded, accumulate=2), term)
    assert len(passes) == 2
    ActivationShift(2.0).gradient(composer_of(new_model(), encoded, accumulate=2), term)
    assert len(passes) == 6


def test_the_first_pass_takes_no_gradient_of_weights(new_model: Model, encoded: list[EncodedRow]) -> None:
    asked: list[int] = []

    class Watched(Replicated):
        def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
            asked.append(len(weights))
            return super().gradient(loss, weights)

    ActivationShift(2.0).gradient(
        composer_of(new_model(), encoded, meet=Watched(Accelerator(device_placement=False))), TERM
    )
    assert len(asked) == 1


def _hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_hooks_are_gone_afterwards_and_after_an_error(new_model: Model, encoded: list[EncodedRow]) -> None:
    model = new_model()
    ActivationShift(2.0).gradient(composer_of(model, encoded, accumulate=2), TERM)
    assert _hooks(model) == 0

    class Failing(Replicated):
        def gradient(self, loss: Tensor, weights: Sequence[Tensor]) -> list[Tensor | None]:
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError) as caught:
        ActivationShift(2.0).gradient(
            composer_of(model, encoded, meet=Failing(Accelerator(device_placement=False))), TERM
        )
    # The error still holds the frames in which the hooks were put on.
    assert caught.traceback
    assert _hooks(model) == 0


def test_a_loss_of_two_calls_is_shifted_at_both(new_model: Model, encoded: list[EncodedRow]) -> None:
    def twice(model: Callable[..., object], batch: Batch) -> Tensor:
        return 0.25 * answer_loss(model, batch) + 0.75 * answer_loss(model, batch)

    # Twice the outputs, each with its share of the gradient: lengths .25 and .75 over sqrt(.625).
    composer = composer_of(new_model(), encoded)
    sites = attention_outputs(composer.model)
    once = activation_gradients(composer, answer_loss, "safety", sites)
    both = activation_gradients(composer, twice, "safety", sites)
    assert len(both.gradients) == 2 * len(once.gradients)
    assert float(both.norm) == pytest.approx(0.625**0.5 * float(once.norm), rel=1e-5)
    model = new_model()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ConfigError, match="cannot be told apart"):
        ActivationShift(2.0).gradient(composer_of(model.train(), encoded), Term("a", "safety", loss=twice))


def test_norms_by_site_belong_to_the_whole_step(new_model: Model, encoded: list[EncodedRow]) -> None:
    def norms(**split: int) -> Tensor:
        composer = composer_of(new_model(), encoded, **split)
        return activation_gradients(composer, answer_loss, "safety", attention_outputs(composer.model)).norms

    assert norms().shape == (2,)
    torch.testing.assert_close(norms(accumulate=3), norms(), rtol=1e-4, atol=1e-7)


def test_own_sites_may_be_given(new_model: Model, encoded: list[EncodedRow]) -> None:
    def feed_forward(model: nn.Module) -> Mapping[str, nn.Module]:
        return {name: one for name, one in model.named_modules() if name.endswith("mlp")}

    composer = composer_of(new_model(), encoded)
    found = ActivationShift(2.0, sites=feed_forward).gradient(composer, TERM)
    assert float(found.value) > float(composer.take(TERM).value)
    assert not torch.equal(flat(found), flat(ActivationShift(2.0).gradient(composer, TERM)))
