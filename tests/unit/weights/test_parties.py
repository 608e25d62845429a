# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from keelwright.core.errors import NumericalError
from keelwright.core.protocols import Silent
from keelwright.models.loading import load
from keelwright.weights.parties import check_weights, open_party

ALIGNED = "lab:workshop/aligned"


def test_a_live_model_is_copied_where_its_weights_may_change():
    model = load(ALIGNED)
    party = open_party("aligned", model, offline=True)
    assert party.load(device="cpu", offline=True) is model
    copied = party.load_copy(device="cpu", offline=True)
    with torch.no_grad():
        next(copied.module.parameters()).zero_()
    assert next(model.module.parameters()).abs().sum() > 0


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_weight_that_is_no_number_is_named_with_role_tensor_and_place(value):
    model = load(ALIGNED)
    name, weight = next((name, one) for name, one in model.module.named_parameters() if one.dim() == 1)
    with torch.no_grad():
        weight[2] = value
    good, bad = (open_party(role, one, offline=True) for role, one in (("aligned", ALIGNED), ("tuned", model)))
    check_weights([good], Silent())
    with pytest.raises(NumericalError, match=f"'{name}' of 'tuned'") as caught:
        check_weights([good, bad], Silent())
    assert caught.value.found == f"{value} at element 2"
    assert ALIGNED in caught.value.expected
