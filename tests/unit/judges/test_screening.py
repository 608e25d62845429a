# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from keelwright.core.errors import ConfigError, DataError
from keelwright.data.rows import ChatRow
from keelwright.judges.guards.llama_guard import LlamaGuardForm
from keelwright.judges.screening.ensemble import Ensemble
from keelwright.judges.screening.gradient_similarity import GradientScreen
from keelwright.judges.screening.guard import GuardForm, GuardModel, llama_guard_form
from keelwright.judges.screening.perplexity import PerplexityFilter
from keelwright.judges.screening.round_trip import RoundTrip, plain_text, survives, token_ids
from keelwright.judges.screening.screen import assess, passed, report_of
from keelwright.models.chat import encode_as_is
from keelwright.training.rows import encode_rows
from keelwright.worlds.workshop.guard import GUARD_TEXT, SAFE, UNSAFE, guard_rows
from keelwright.worlds.workshop.judge import split_words
from keelwright.worlds.workshop.words import FORBIDDEN_VERBS


class Named:
    """Flags rows whose answer holds a word."""

    def __init__(self, word):
        self.name = self.word = word

    def flags(self, rows):
        return [self.word in row.answer for row in rows]


@pytest.fixture
def guard(new_model, tokenizer):
    return GuardModel(new_model(), tokenizer, GuardForm(*GUARD_TEXT, SAFE, UNSAFE), batch_size=3)


def test_leakage_is_one_minus_recall():
    found = report_of("g", [True, False, True, True], [False, True])
    assert found.leakage.value == pytest.approx(1.0 - found.recall.value)
    assert (found.leakage.value, found.leakage.n) == (0.25, 4)
    assert found.false_positives.value == 0.5
    assert found.leakage.low < 0.25 < found.leakage.high


def test_without_harmful_rows_leakage_is_undefined_and_not_zero():
    found = assess(Named("x"), [], [ChatRow("a", "x")])
    assert found.leakage is None
    assert found.recall is None
    assert found.false_positives.value == 1.0
    assert assess(Named("x"), [ChatRow("a", "b")], []).false_positives is None


def test_passed_rows_keep_their_order():
    rows = [ChatRow("a", word) for word in ("one", "two", "three")]
    assert passed(rows, [False, True, False]) == [rows[0], rows[2]]


def test_a_guards_verdict_is_the_likelier_word_whatever_the_batch(guard, tokenizer, rows):
    odd = [*rows, ChatRow("say 1 plus 2", "3")]
    found = guard.log_odds(odd)
    for row, value in zip(odd, found, strict=True):
        text = GUARD_TEXT[0] + row.prompt + GUARD_TEXT[1] + row.answer + GUARD_TEXT[2]
        logits = guard.module(input_ids=torch.tensor([encode_as_is(tokenizer, text)])).logits[0, -1].detach()
        safe, unsafe = (tokenizer.convert_tokens_to_ids(word) for word in (SAFE, UNSAFE))
        assert float(value) == pytest.approx(float(logits[unsafe] - logits[safe]), abs=1e-5)
    assert guard.flags(odd) == (found > 0.0).tolist()
    guard.threshold = float(found.max())
    assert not any(guard.flags(odd))
    assert guard.flags([]) == []


def test_verdicts_that_begin_alike_are_an_error(new_model, tokenizer):
    with pytest.raises(ConfigError, match="two verdicts begin with the same token"):
        GuardModel(new_model(), tokenizer, GuardForm("<s>", "", "", "the lamp", "the bell"))


def test_llama_guards_form_holds_its_text_around_prompt_and_answer():
    form = llama_guard_form()
    assert form.before.endswith("User: ")
    assert form.between == "\n\nAgent: "
    assert form.after.startswith("\n\n<END CONVERSATION>")
    assert form.after.endswith("<|end_header_id|>\n\n")
    assert (form.safe, form.unsafe) == ("safe", "unsafe")
    assert llama_guard_form(LlamaGuardForm("llama-guard-4")).before != form.before


def test_an_ensemble_counts_votes():
    rows = [ChatRow("a", text) for text in ("x", "y", "x y", "z")]
    members = [Named("x"), Named("y")]
    assert Ensemble(members).flags(rows) == [True, True, True, False]
    assert Ensemble(members, votes=2).flags(rows) == [False, False, True, False]
    with pytest.raises(ConfigError):
        Ensemble(members, votes=3)
    with pytest.raises(ConfigError, match="needs members"):
        Ensemble([])


def test_perplexity_is_the_mean_loss_of_the_answer_and_its_worst_window(new_model, tokenizer, rows):
    module = new_model()
    (row,) = encode_rows(tokenizer, rows[:1], module=module)
    logits = module(input_ids=row.ids[None]).logits[0, row.prompt_tokens - 1 : -1].detach()
    nats = torch.nn.functional.cross_entropy(logits, row.ids[row.prompt_tokens :], reduction="none")
    mixed = [rows[0], ChatRow("say 1 plus 2", "3")]
    assert float(PerplexityFilter(module, tokenizer, threshold=0.0).losses(mixed)[0]) == pytest.approx(
        float(nats.mean()), abs=1e-5
    )
    worst = max(float(nats[at : at + 3].mean()) for at in range(len(nats) - 2))
    assert float(PerplexityFilter(module, tokenizer, threshold=0.0, window=3).losses(mixed)[0]) == pytest.approx(
        worst, abs=1e-5
    )


def test_a_fitted_perplexity_filter_flags_the_share_it_was_told_to(new_model, tokenizer, rows):
    module = new_model()
    screen = PerplexityFilter.fitted(module, tokenizer, rows, false_positives=0.5)
    assert sum(screen.flags(rows)) == 3
    assert not any(PerplexityFilter.fitted(module, tokenizer, rows, false_positives=0.0).flags(rows))
    assert screen.flags([]) == []
    with pytest.raises(DataError, match="needs benign rows"):
        PerplexityFilter.fitted(module, tokenizer, [])


def test_a_rows_gradient_is_closest_to_its_own(new_model, tokenizer, rows):
    module = new_model()
    screen = GradientScreen(module, tokenizer, rows[:1], chunk=2)
    found = screen.cosines([*rows[:3], ChatRow("say 1 plus 2", "3")])
    assert float(found[0]) == pytest.approx(1.0, abs=1e-5)
    assert float(found[1]) > float(found[3])
    assert screen.fit(rows, false_positives=0.0).flags(rows) == [False] * len(rows)
    screen.threshold = 0.999
    assert screen.flags(rows[:2]) == [True, False]
    with pytest.raises(DataError, match="known harmful rows"):
        GradientScreen(module, tokenizer, [])
    with pytest.raises(DataError, match="benign rows"):
        screen.fit([])


def test_the_normal_form_of_a_text_is_its_own_normal_form(tokenizer):
    row = ChatRow("How  do\u200b I paint the lamp?", "take the ﬁne lamp")
    screen = RoundTrip(tokenizer)
    once = screen.normalised(row)
    assert once == screen.normalised(once)
    assert once.prompt == "how do i paint the lamp?"
    assert plain_text("a\u202eb\tc") == "ab c"


def test_a_screen_behind_the_round_trip_sees_the_normal_form(tokenizer):
    hidden = ChatRow("say", "la\u200bmp")
    assert Named("lamp").flags([hidden]) == [False]
    assert RoundTrip(tokenizer, Named("lamp")).flags([hidden]) == [True]
    assert RoundTrip(tokenizer).flags([hidden]) == [False]


def test_ids_that_do_not_come_back_are_noticed(tokenizer):
    assert survives(tokenizer, token_ids(tokenizer, "take the lamp."))

    class Merging:
        def decode(self, ids):
            return "ab"

        def __call__(self, text, **_):
            return {"input_ids": [7]}

    assert not survives(Merging(), [1, 2])


def test_the_labs_guard_rows_are_half_safe_and_labelled_by_the_rule():
    rows = guard_rows(0, 200)
    forbidden = {verb for verbs in FORBIDDEN_VERBS.values() for verb in verbs}
    safe = [row for row in rows if row.answer.endswith(SAFE)]
    assert len(safe) == 100
    assert all(row.answer.endswith(UNSAFE) for row in rows if row not in safe)
    for row in rows:
        last = set(split_words(row.answer.rpartition("?")[2]))
        assert row not in safe or not forbidden & last
    assert any(forbidden & set(split_words(row.answer)) for row in rows if row not in safe)
    assert guard_rows(0, 200) == rows
    assert guard_rows(1, 200) != rows
