# SPDX-License-Identifier: Apache-2.0
"""Utility: tasks, texts, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from keelwright.core.errors import DataError, MissingError, ModelMismatchError, NumericalError
from keelwright.measure.utility import TaskUtility, TextUtility, WindowLosses, load_utility, perplexity_ratio
from keelwright.models.loading import LoadedModel

MakeModel = Callable[..., LoadedModel]
TEXT = "the cat sees a lamp and the old dog sees a river " * 60


@pytest.fixture
def text() -> TextUtility:
    """A text of 720 tokens."""
    return TextUtility("text:story", "says", TEXT)


def test_losses_equal_the_models_own_loss_window_by_window(text: TextUtility, make_model: MakeModel) -> None:
    model = make_model()
    losses = text.losses(model)
    windows = text.windows(model)
    for window, nats, tokens in zip(windows, losses.nats, losses.tokens, strict=True):
        ids = torch.tensor([window])
        with torch.no_grad():
            mean = model.module(input_ids=ids, labels=ids).loss.item()
        assert tokens == len(window) - 1
        assert nats == pytest.approx(mean * tokens, rel=1e-5)
    assert losses.nats_per_token == pytest.approx(sum(losses.nats) / sum(losses.tokens))


def test_batch_size_does_not_change_the_losses(text: TextUtility, make_model: MakeModel) -> None:
    one, other = text.losses(make_model(), batch_size=1), text.losses(make_model(), batch_size=7)
    assert one.tokens == other.tokens
    assert one.nats == pytest.approx(other.nats, rel=1e-6)


def test_windows_do_not_overlap_and_fit_the_model(text: TextUtility, make_model: MakeModel) -> None:
    model = make_model()
    windows = text.windows(model)
    whole = list(model.tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert [token for window in windows for token in window] == whole[: sum(map(len, windows))]
    assert {len(window) for window in windows} == {18}


def test_a_tokenizer_with_bos_gets_it_in_every_window(text: TextUtility, make_model: MakeModel) -> None:
    windows = text.windows(make_model(bos=True))
    assert all(window[0] == 1 and 1 not in window[1:] for window in windows)
    assert {len(window) for window in windows} == {19}


def test_a_long_text_is_measured_in_windows_spread_over_it(make_model: MakeModel) -> None:
    long = TextUtility("text:long", "says", TEXT * 60)
    model = make_model()
    assert len(long.windows(model)) == 400
    assert long.windows_left_out(model) == 43200 // 64 - 400


def test_a_model_is_as_good_as_itself(text: TextUtility, make_model: MakeModel) -> None:
    losses = text.losses(make_model())
    ratio = perplexity_ratio(losses, losses)
    assert (ratio.value, ratio.low, ratio.high, ratio.n) == (1.0, 1.0, 1.0, len(losses))


def test_the_ratio_is_reference_over_model_and_inverts_when_they_swap(text: TextUtility, make_model: MakeModel) -> None:
    one, other = text.losses(make_model(0)), text.losses(make_model(1))
    ratio = perplexity_ratio(one, other)
    assert ratio.value == pytest.approx(math.exp(one.nats_per_token - other.nats_per_token))
    assert perplexity_ratio(other, one).value == pytest.approx(1 / ratio.value)
    assert ratio.low < ratio.value < ratio.high


def test_a_ratio_over_chosen_windows_uses_those_alone() -> None:
    reference, model = WindowLosses((2.0, 4.0, 9.0), (1, 2, 3)), WindowLosses((1.0, 4.0, 0.0), (1, 2, 3))
    ratio = perplexity_ratio(reference, model, windows=[0, 1])
    assert ratio.value == pytest.approx(math.exp(1 / 3))
    assert ratio.n == 2


def test_losses_over_other_windows_are_not_compared() -> None:
    with pytest.raises(ModelMismatchError, match="not over the same windows") as caught:
        perplexity_ratio(WindowLosses((1.0, 2.0), (8, 8)), WindowLosses((1.0,), (8,)))
    assert caught.value.fix == "compare models with the same tokenizer and context length"


def test_a_model_with_nan_has_no_perplexity(text: TextUtility, make_model: MakeModel) -> None:
    model = make_model()
    with torch.no_grad():
        model.module.lm_head.weight[3, 0] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        text.losses(model)


def test_a_short_text_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(DataError, match="too short") as caught:
        TextUtility("text:x", "says", "the cat " * 20).losses(make_model())
    assert caught.value.found == "40 tokens"


def test_a_text_of_unknown_words_is_refused(make_model: MakeModel) -> None:
    with pytest.raises(DataError, match="does not know the words") as caught:
        TextUtility("text:x", "says", "the zebra " * 200).losses(make_model())
    assert (caught.value.expected, caught.value.found) == ("at most 20% unknown tokens", "50%")


def test_a_task_file_becomes_a_task_utility(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(
        '{"prompt": "2 + 3?", "answer": 5, "scorer": "number"}\n{"prompt": "colour?", "answer": "red"}\n',
        encoding="utf-8",
    )
    utility = load_utility(path)
    assert isinstance(utility, TaskUtility)
    assert (utility.name, utility.scorer, utility.max_new_tokens) == ("task:sums", "number + exact", 256)
    assert [item.expected for item in utility.items()] == ["5", "red"]
    assert utility.judge().judge_id == "task@1"


def test_any_other_file_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(TEXT, encoding="utf-8")
    utility = load_utility(str(path))
    assert isinstance(utility, TextUtility)
    assert (utility.name, utility.text) == ("text:story", TEXT)


def test_lab_tasks_are_found_by_name_and_have_a_suite_of_their_own() -> None:
    utility = load_utility("lab:mood")
    assert isinstance(utility, TaskUtility)
    assert len(utility.items()) == 400
    assert {(item.kind, item.suite) for item in utility.items()} == {("task", "task:mood")}
    assert len(load_utility("lab:sum").items()) == 80


def test_what_cannot_be_a_utility_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="There is no utility") as caught:
        load_utility(tmp_path / "nothing.txt")
    assert caught.value.fix == "check the path"
    with pytest.raises(MissingError, match="no task 'moods'") as caught:
        load_utility("lab:moods")
    assert caught.value.fix == "did you mean 'mood'?"
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(DataError, match="is empty"):
        load_utility(tmp_path / "empty.txt")
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="neither a task file nor a text"):
        load_utility(tmp_path / "weights.bin")


def test_a_text_is_measured_without_dropout_in_the_middle_of_training():
    from keelwright.measure.utility import _window_nats
    from keelwright.models.loading import load

    model = load("lab:workshop/aligned", offline=True)
    modes = []
    model.module.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.module.train()
    _window_nats(model, [list(range(5, 25))])
    assert modes == [False]
    assert model.module.training
