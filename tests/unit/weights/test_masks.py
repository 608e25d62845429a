# SPDX-License-Identifier: Apache-2.0
"""Learned masks: exports, means and the file."""

import pytest
import torch
from safetensors.torch import save_file

from keelwright.core.errors import DataError, MissingError
from keelwright.weights.masks import Mask, load_mask, save_mask


def make(tie="entry", size=64):
    logits = {"a": torch.tensor([1.0, -1.0, 0.0, 3.0, -2.0, 0.5]), "b": torch.tensor([-1.0, 2.0])}
    shapes = {"a": (2, 3), "b": (2,)}
    if tie == "row":
        logits, shapes = {"a": torch.tensor([1.0, -1.0])}, {"a": (2, 3)}
    return Mask(logits, shapes, tie, size, 0.5, {"seed": 3})


def test_the_mode_keeps_what_is_above_zero():
    mask = make()
    assert mask.values("a", 0, 6).tolist() == [1, 0, 0, 1, 0, 1]
    assert mask.values("a", 2, 5).tolist() == [0, 1, 0]
    assert mask.mean("a") == 0.5
    assert make("row").values("a", 1, 5).tolist() == [1, 1, 0, 0]


def test_the_mean_is_the_sigmoid():
    mask = make()
    assert torch.equal(mask.values("a", 0, 6, export="mean"), torch.sigmoid(mask.logits["a"]))
    assert mask.mean("b", export="mean") == pytest.approx(float(torch.sigmoid(mask.logits["b"]).mean()))


def test_a_sample_is_a_function_of_the_seed_and_has_the_chances_of_the_logits():
    n = 20_000
    mask = Mask({"a": torch.full((n,), 1.0)}, {"a": (n,)})
    one, again, other = (mask.values("a", 0, n, export="sample", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert float(one.mean()) == pytest.approx(0.731, abs=0.01)
    assert torch.equal(mask.values("a", 7, 19, export="sample"), one[7:19])


def test_a_file_gives_the_mask_back(tmp_path):
    mask = make()
    save_mask(mask, tmp_path / "mask.safetensors")
    found = load_mask(tmp_path / "mask.safetensors")
    assert found.digest() == mask.digest() and repr(found) == repr(mask)
    assert found.recipe == {"seed": 3} and found.shapes == mask.shapes


def test_other_logits_or_another_tie_have_another_digest():
    mask = make()
    changed = Mask({**mask.logits, "b": torch.tensor([-1.0, 2.5])}, mask.shapes)
    assert len({mask.digest(), changed.digest(), Mask(mask.logits, mask.shapes, "block", 1).digest()}) == 3


def test_files_that_are_no_mask_are_refused(tmp_path):
    with pytest.raises(MissingError, match="There is no mask"):
        load_mask(tmp_path / "none")
    save_file({"a": torch.zeros(2)}, tmp_path / "plain")
    with pytest.raises(DataError, match="is not a mask") as caught:
        load_mask(tmp_path / "plain")
    assert "without a mask's settings" in caught.value.found
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DataError, match="is not a mask"):
        load_mask(tmp_path / "text")
    short = Mask({"a": torch.zeros(2)}, {"a": (2, 3)})
    save_mask(short, tmp_path / "short")
    with pytest.raises(DataError, match="is not a mask") as caught:
        load_mask(tmp_path / "short")
    assert caught.value.found == "torch.float32 of shape [2] for 'a'"
