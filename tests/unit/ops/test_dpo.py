# SPDX-License-Identifier: Apache-2.0
"""The DPO loss by hand, and log-probabilities against a plain loop."""

import math

import pytest
import torch

from keelwright.ops.dpo import answer_logprobs, dpo_loss


def test_known_answer_of_one_pair():
    # Margin: (-1 - -2) - (-3 - -1) = 3.
    found = dpo_loss(*(torch.tensor([x]) for x in (-1.0, -3.0, -2.0, -1.0)), beta=0.1)
    assert found.item() == pytest.approx(math.log(1.0 + math.exp(-0.3)), rel=1e-6)


def test_a_policy_equal_to_its_reference_loses_log_two():
    one, other = torch.tensor([-5.0, -1.0]), torch.tensor([-3.0, -9.0])
    assert dpo_loss(one, other, one, other, beta=0.7).tolist() == pytest.approx([math.log(2.0)] * 2)


def test_log_probabilities_are_those_of_the_answer_tokens_alone():
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[-100, -100, 3, 4, -100], [-100, 6, 0, 1, 2]])
    found, tokens = answer_logprobs(logits, labels)
    logs = logits.double().log_softmax(dim=-1)
    expected = [
        sum(float(logs[row, at - 1, labels[row, at]]) for at in range(1, 5) if labels[row, at] >= 0) for row in range(2)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5) and tokens.tolist() == [2, 4]
