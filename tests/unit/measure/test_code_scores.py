# SPDX-License-Identifier: Apache-2.0
"""Robustness of code, against known answers of the definitions (sheet: arXiv 2411.19508, 2107.03374)."""

from __future__ import annotations

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Judgement, Record
from keelwright.measure.code_scores import (
    cdra,
    outcomes_of,
    pass_at_k,
    recovered_share,
    robustness,
    robustness_table,
    worst_case,
    worst_cases,
)


def _record(problem: str, outcome: str, perturbation: str = "", semantics: str = "", samples: int = 1) -> Record:
    facts = {"perturbation": perturbation, "semantics": semantics} if perturbation else {}
    judgement = Judgement("correct" if outcome == "passed" else "wrong", float(outcome == "passed"), outcome)
    return Record(
        item_id=f"{problem}+{perturbation}" if perturbation else problem,
        suite="s",
        suite_digest="d",
        kind="task",
        hazard="code",
        prompt="p",
        model_id="m",
        revision="r",
        template_digest="t",
        decoding_digest="d",
        output="o",
        n_tokens=1,
        finish="eos",
        judgements={"unit-tests@1": judgement},
        pair_id=problem if perturbation else None,
        facts=facts,
        samples=samples,
    )


def _outcomes(solved: int, n: int = 20) -> dict[str, str]:
    return {f"{number:02d}": "passed" if number < solved else "failed" for number in range(n)}


def test_pass_at_k_has_the_known_values() -> None:
    """Chen et al., arXiv 2107.03374, eq. 1 with n = 5, c = 2."""
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    assert pass_at_k(5, 0, 3) == 0.0
    assert pass_at_k(5, 4, 2) == 1.0
    with pytest.raises(ConfigError, match="counts of samples are impossible"):
        pass_at_k(5, 6, 1)


def test_cdra_has_the_known_values() -> None:
    assert cdra(0.50, 0.35) == pytest.approx(0.30)
    assert cdra(0.4, 0.4) == 0.0
    assert cdra(0.0, 0.0) is None
    assert cdra(0.2, 0.3) == pytest.approx(-0.5)


def test_the_recovered_share_is_the_part_of_the_loss_that_comes_back() -> None:
    assert recovered_share(0.30, 0.06) == pytest.approx(0.8)
    assert recovered_share(0.30, 0.45) == pytest.approx(-0.5)
    assert recovered_share(0.0, 0.1) is None
    assert recovered_share(None, 0.1) is None
    assert recovered_share(0.3, None) is None


def test_clean_against_perturbed_is_paired() -> None:
    clean = _outcomes(10)
    attacked = {**_outcomes(7), "08": "syntax error", "09": "timeout", "15": "passed", "99": "passed"}
    row = robustness(clean, attacked, perturbation="p", semantics="preserved")
    assert row is not None
    assert (row.lost, row.gained) == (("07", "08", "09"), ("15",))
    assert (row.clean.value, row.attacked.value, row.clean.n) == (0.5, 0.4, 20)
    assert row.drop.value == pytest.approx(0.1)
    assert row.drop.low < 0.0 < row.drop.high
    assert row.cdra == pytest.approx(0.2)
    # Exact McNemar of 3 against 1: 2 * (1 + 4) / 16.
    assert row.p_value == pytest.approx(0.625)
    assert (row.syntax_errors, row.timeouts) == (pytest.approx(1 / 20), 1)
    assert robustness(clean, {}) is None


def test_the_same_outcomes_are_no_loss() -> None:
    row = robustness(_outcomes(10), _outcomes(10))
    assert row is not None
    assert (row.cdra, row.drop.value, row.p_value, row.lost, row.gained) == (0.0, 0.0, 1.0, (), ())
    nothing = robustness(_outcomes(0), _outcomes(0))
    assert nothing is not None
    assert nothing.cdra is None


def test_the_worst_case_is_no_better_than_any_and_falls_with_every_perturbation_added() -> None:
    runs = {"a": _outcomes(12), "b": {**_outcomes(10), "15": "passed"}, "c": {**_outcomes(20), "03": "timeout"}}
    values = []
    for count in range(1, 4):
        estimate = worst_case(dict(list(runs.items())[:count]))
        assert estimate is not None
        values.append(estimate.value)
    assert values == [0.6, 0.5, 0.45]
    assert worst_case({}) is None
    assert worst_case({"a": {"1": "passed"}, "b": {"2": "passed"}}) is None


def test_the_table_keeps_the_two_kinds_of_semantics_apart() -> None:
    records = [_record(problem, outcome) for problem, outcome in _outcomes(16).items()]
    for name, semantics, solved in (("mild", "preserved", 15), ("hard", "preserved", 4), ("told", "contradicted", 0)):
        records += [_record(problem, outcome, name, semantics) for problem, outcome in _outcomes(solved).items()]
    rows = robustness_table(records)
    assert [(row.perturbation, row.semantics) for row in rows] == [
        ("hard", "preserved"),
        ("mild", "preserved"),
        ("told", "contradicted"),
    ]
    # Holm over three tests: the smallest p-value times 3, the next times 2.
    assert rows[2].p_adjusted == pytest.approx(3 * rows[2].p_value)
    assert rows[0].p_adjusted == pytest.approx(2 * rows[0].p_value)
    worst = worst_cases(records)
    assert {kind: one.value for kind, one in worst.items()} == {"contradicted": 0.0, "preserved": 0.2}
    assert robustness_table([]) == []


def test_what_could_not_be_judged_is_in_no_row() -> None:
    error = _record("1", "passed", "p", "preserved")
    unread = {"unit-tests@1": Judgement("error", raw="no output")}
    lost = type(error)(**{**{name: getattr(error, name) for name in error.__slots__}, "judgements": unread})
    assert outcomes_of([_record("1", "passed"), lost]) == {"": {"1": "passed"}}


def test_flips_need_one_answer_per_problem() -> None:
    with pytest.raises(DataError, match="Flips need one answer per problem"):
        outcomes_of([_record("1", "passed", samples=5)])
