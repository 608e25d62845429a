# SPDX-License-Identifier: Apache-2.0
"""Failed items are held back until an answer shows that the server was still there."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, MissingError, OfflineError
from keelwright.core.records import Generation
from keelwright.models.engines.failures import GIVE_UP_AFTER, Outcome, Outcomes, unknown_model


@pytest.fixture
def outcomes():
    return Outcomes("https://host/v1", "tiny", is_local=False)


def answered(name, began=0.0):
    return Outcome(Generation(name, "x", 1, "eos"), began=began)


def failed(name, reason="connection", ended=0.0):
    return Outcome(Generation(name, "", 0, "error"), reason, "reset", ended=ended)


def names(generations):
    return [one.item_id for one in generations]


def test_a_failure_is_handed_over_with_the_next_answer_that_was_sent_after_it(outcomes):
    assert outcomes.take(failed("a", ended=5.0)) == []
    assert names(outcomes.take(answered("b", began=4.0))) == ["b"]
    assert names(outcomes.take(answered("c", began=6.0))) == ["a", "c"]


def test_failures_between_answers_never_stop_the_run(outcomes):
    for number in range(3 * GIVE_UP_AFTER):
        outcomes.take(failed(f"bad {number}", ended=float(number)))
        outcomes.take(answered(f"good {number}", began=float(number)))
    assert outcomes.rest() == []


def test_failures_at_the_end_are_handed_over_where_others_were_answered(outcomes):
    outcomes.take(answered("a"))
    outcomes.take(failed("b", ended=1.0))
    assert names(outcomes.rest()) == ["b"]
    assert outcomes.summary() == ["1 without an answer: connection (reset)"]


def test_a_row_of_failures_stops_the_run(outcomes):
    outcomes.take(answered("first"))
    with pytest.raises(OfflineError, match=f"does not answer for {GIVE_UP_AFTER} items in a row"):
        for number in range(GIVE_UP_AFTER):
            outcomes.take(failed(f"{number}", ended=1.0))


def test_a_filter_that_blocks_everything_is_a_result_and_stops_nothing(outcomes):
    for number in range(2 * GIVE_UP_AFTER):
        assert len(outcomes.take(failed(f"{number}", "blocked"))) == 1
    assert outcomes.rest() == []


@pytest.mark.parametrize(
    ("reason", "is_local", "kind"),
    [
        ("connection", False, OfflineError),
        ("connection", True, MissingError),
        ("server error", False, MissingError),
        ("refused request", False, ConfigError),
        ("prompt too long", True, ConfigError),
    ],
)
def test_who_can_do_something_about_it_decides_the_error(reason, is_local, kind):
    assert type(Outcomes("u", "m", is_local=is_local).stopped(reason, "words")) is kind


def test_a_long_list_of_models_is_cut_and_the_nearest_name_offered():
    error = unknown_model("llama-3", "u", [f"model-{number:02}" for number in range(40)] + ["llama-3.1"])
    assert error.expected.endswith("and 21 more")
    assert "did you mean 'llama-3.1'?" in error.fix
