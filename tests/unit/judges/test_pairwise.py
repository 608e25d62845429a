# SPDX-License-Identifier: Apache-2.0
import re

import pytest

from keelwright.judges.pairwise import PairwiseJudge, count_preferences


def places(prompt):
    return re.findall(r"\[ANSWER ([AB]) \w+\]\n(.*?)\n\[END", prompt, flags=re.DOTALL)


def prefers_longer(prompt):
    texts = dict(places(prompt))
    if len(texts["A"]) == len(texts["B"]):
        return "#better: tie"
    return "Reason.\n#better: " + max(texts, key=lambda name: len(texts[name]))


def test_an_answer_wins_when_it_is_preferred_in_both_places(scripted, asked):
    engine = scripted(prefers_longer)
    judge = PairwiseJudge(engine)
    pairs = [(asked(), "a longer answer", "short"), (asked(), "short", "a longer answer"), (asked(), "same", "sama")]
    found = judge.compare_all(pairs)
    assert [(one.outcome, one.is_swapped) for one in found] == [("win", False), ("loss", False), ("tie", False)]
    # The second pair is the first one turned round, so its questions are the same two.
    assert len(engine.asked) == 4


def test_a_judge_that_always_takes_the_first_gives_ties_that_are_counted(scripted, asked):
    found = PairwiseJudge(scripted(lambda prompt: "#better: A")).compare_all([(asked(), "x", "y")] * 3)
    counts = count_preferences(found)
    assert (counts.wins, counts.ties, counts.losses, counts.swapped, counts.unparsed) == (0, 3, 0, 3, 0)
    assert counts.win_rate.value == 0.0


def test_a_pair_of_which_one_order_cannot_be_read_is_left_out(scripted, asked):
    engine = scripted(lambda prompt: "#better: A" if dict(places(prompt))["A"] == "x" else "hm")
    (found,) = PairwiseJudge(engine).compare_all([(asked(), "x", "y")])
    assert found.outcome == "unparsed"
    assert found.raw.startswith("not in the format")
    counts = count_preferences([found])
    assert (counts.judged, counts.win_rate, counts.unparsed) == (0, None, 1)


def test_rates_have_their_interval_over_judged_pairs(scripted, asked):
    pairs = [(asked(), "a longer answer", "short")] * 3 + [(asked(), "same", "sama")]
    counts = count_preferences(PairwiseJudge(scripted(prefers_longer)).compare_all(pairs))
    assert counts.win_rate.value == pytest.approx(0.75)
    assert counts.loss_rate.value == 0.0
    assert counts.win_rate.n == 4


def test_the_id_names_wording_and_model(scripted):
    assert re.fullmatch(r"pairwise@1/[0-9a-f]{12}/scripted@r1", PairwiseJudge(scripted(str)).judge_id)
