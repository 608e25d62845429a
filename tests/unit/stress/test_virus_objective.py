# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from keelwright.stress.virus_objective import GradientTerm, GuardTerm, Slot, VirusObjective
from keelwright.training.lora import attach_lora
from keelwright.training.per_sample import trained_tensors
from keelwright.worlds.workshop.tokenizer import vocabulary

LENGTH, VOCAB, SAFE_ID = 4, len(vocabulary()), 9
HARMFUL = torch.tensor([11, 12, 13, 14])
SLOT = Slot(torch.tensor([2, 5, 20, 21]), torch.tensor([3]))
GUARD_SLOT = Slot(torch.tensor([2, 5, 20]), torch.tensor([6]))


@pytest.fixture
def objective(new_model):
    def make(lambda_=0.3, *, legacy=False, dtype=torch.float32, tied=True, chunk=16):
        module, guard = (new_model(seed, tie_word_embeddings=tied).to(dtype) for seed in (0, 1))
        gradient = GradientTerm(module, trained_tensors(module), SLOT, 3, HARMFUL, legacy=legacy, chunk=chunk)
        return VirusObjective(GuardTerm(guard, GUARD_SLOT, SAFE_ID), gradient, lambda_)

    return make


def choices(count=6):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(10, VOCAB, (count, LENGTH), generator=generator)
    return torch.cat([HARMFUL[None], drawn])


def onehot(ids, dtype):
    return torch.nn.functional.one_hot(ids, VOCAB).to(dtype)


def wide_norm(self, states):
    return self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)


def gradient_of(module, slot, ids):
    """Return the gradient of the mean answer loss of one row by plain autograd, as one vector."""
    row = slot.fill(ids[None])
    logits = module(input_ids=row, use_cache=False).logits[0, 2:-1]
    loss = torch.nn.functional.cross_entropy(logits, row[0, 3:])
    found = torch.autograd.grad(loss, [one for _, one in module.named_parameters()])
    return torch.cat([one.flatten() for one in found]).double()


def test_the_harmful_row_itself_keeps_its_whole_gradient(objective):
    assert float(objective().gradient.exact(HARMFUL[None])[0]) == pytest.approx(-1.0, abs=1e-5)


def test_similarity_is_the_cosine_of_plain_gradients(objective):
    term = objective().gradient
    target = gradient_of(term.module, SLOT, HARMFUL)
    for ids, value in zip(choices(), term.exact(choices()), strict=True):
        wanted = -torch.cosine_similarity(gradient_of(term.module, SLOT, ids), target, dim=0)
        assert float(value) == pytest.approx(float(wanted), abs=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_batch_of_choices_has_the_values_of_one_at_a_time(objective, chunk):
    whole = objective().exact(choices())
    torch.testing.assert_close(objective(chunk=chunk).exact(choices()), whole, atol=1e-5, rtol=1e-5)
    singles = torch.cat([objective().exact(one[None]) for one in choices()])
    torch.testing.assert_close(singles, whole, atol=1e-5, rtol=1e-5)


def test_legacy_divides_by_the_rows_own_norm_alone(objective):
    term = objective(legacy=True).gradient
    target = gradient_of(term.module, SLOT, HARMFUL)
    for ids, value in zip(choices(3), term.exact(choices(3)), strict=True):
        own = gradient_of(term.module, SLOT, ids)
        assert float(value) == pytest.approx(-float(own @ target / own.norm()), rel=1e-4)


def test_guard_loss_is_the_cross_entropy_of_the_safe_verdict(objective):
    term = objective().guard
    logits = term.module(input_ids=GUARD_SLOT.fill(choices())).logits[:, -1]
    wanted = torch.nn.functional.cross_entropy(logits, torch.full((len(logits),), SAFE_ID), reduction="none")
    torch.testing.assert_close(term.exact(choices()), wanted.double(), atol=1e-5, rtol=1e-5)


def test_the_objective_is_affine_in_lambda_and_each_end_is_one_term(objective):
    at = {lambda_: objective(lambda_).exact(choices()) for lambda_ in (0.0, 0.25, 0.5, 1.0)}
    one = objective()
    torch.testing.assert_close(at[0.0], one.gradient.exact(choices()))
    torch.testing.assert_close(at[1.0], one.guard.exact(choices()))
    torch.testing.assert_close(at[0.25], 0.75 * at[0.0] + 0.25 * at[1.0])
    torch.testing.assert_close(at[0.5], (at[0.0] + at[1.0]) / 2)


def test_a_term_of_weight_zero_is_not_evaluated(objective, monkeypatch):
    monkeypatch.setattr(GuardTerm, "exact", None)
    monkeypatch.setattr(GuardTerm, "relaxed", None)
    alone = objective(0.0)
    alone.exact(choices())
    alone.slope(HARMFUL, VOCAB)


@pytest.mark.parametrize("tied", [True, False])
def test_at_one_hot_rows_the_relaxed_form_is_the_exact_one(objective, tied):
    one = objective(dtype=torch.float64, tied=tied)
    for ids in choices(3):
        exact = float(one.exact(ids[None])[0])
        assert float(one.relaxed(onehot(ids, torch.float64)).detach()) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tied", [True, False])
def test_the_slope_is_that_of_finite_differences_through_the_inner_gradient(objective, monkeypatch, tied, lambda_):
    # The norms of Llama run in float32 whatever comes in.
    monkeypatch.setattr(LlamaRMSNorm, "forward", wide_norm)
    one, ids = objective(lambda_, dtype=torch.float64, tied=tied), choices()[2]
    slope = one.slope(ids, VOCAB)
    middle, step = onehot(ids, torch.float64), 1e-5
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        way = torch.randn(LENGTH, VOCAB, generator=generator, dtype=torch.float64)
        ends = [float(one.relaxed(middle + sign * step * way).detach()) for sign in (1, -1)]
        assert float((slope * way).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-8)


def test_the_slope_of_the_legacy_form_takes_the_norm_as_a_constant(objective):
    legacy, true = (objective(0.0, legacy=flag, dtype=torch.float64) for flag in (True, False))
    ids = choices()[2]
    along = legacy.slope(ids, VOCAB) / float(true.gradient.target_norm)
    assert not torch.allclose(along, true.slope(ids, VOCAB), rtol=1e-3)


def test_searching_changes_no_weight_and_leaves_no_gradient(objective):
    one = objective()
    before = [value.detach().clone() for value in one.gradient.module.parameters()]
    one.slope(HARMFUL, VOCAB)
    one.exact(choices())
    pairs = zip(before, one.gradient.module.parameters(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)
    assert all(
        value.grad is None for module in (one.gradient.module, one.guard.module) for value in module.parameters()
    )


def test_an_adapter_alone_can_be_what_is_trained(new_model):
    module = new_model()
    adapter = attach_lora(module, rank=2, alpha=4.0, seed=0)
    weights = trained_tensors(module)
    assert all("lora_" in name for name in weights)
    term = GradientTerm(module, weights, SLOT, 3, HARMFUL)
    assert float(term.exact(HARMFUL[None])[0]) == pytest.approx(-1.0, abs=1e-5)
    ids = choices()[1]
    relaxed = float(term.relaxed(onehot(ids, torch.float32)).detach())
    assert relaxed == pytest.approx(float(term.exact(ids[None])[0]), abs=1e-5)
    adapter.detach()
