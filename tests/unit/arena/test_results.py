# SPDX-License-Identifier: Apache-2.0
"""What rows over seeds come to."""

import pytest

from keelwright.arena.results import claims


def row(arm: str, seed: int, harm: float | None, *, step: int = 10, stress: str = "poison") -> dict:
    metrics = {"harm_rate": None if harm is None else {"value": harm, "low": 0.0, "high": 1.0, "n": 100}}
    return {"arm": arm, "stress": stress, "stage": stress, "step": step, "seed": seed, "metrics": metrics}


def test_a_claim_is_the_mean_difference_over_seeds():
    rows = [row("undefended", seed, harm) for seed, harm in enumerate((0.9, 0.8, 0.7))]
    rows += [row("booster", seed, harm) for seed, harm in enumerate((0.1, 0.2, 0.0))]
    (found,) = claims(rows)
    assert found["arm"] == "booster" and found["against"] == "undefended" and found["seeds"] == 3
    assert found["difference"] == pytest.approx(-0.7)
    # Differences -.8, -.6, -.7: t(2) = 4.303, standard error .1 / sqrt 3.
    assert (found["low"], found["high"]) == (pytest.approx(-0.9484, abs=1e-3), pytest.approx(-0.4516, abs=1e-3))


def test_two_seeds_make_no_claim_and_steps_are_paired():
    two = [row(arm, seed, 0.5) for arm in ("undefended", "booster") for seed in range(2)]
    assert claims(two) == []
    apart = [row("undefended", seed, 0.5, step=10) for seed in range(3)]
    apart += [row("booster", seed, 0.1, step=20) for seed in range(3)]
    assert claims(apart) == []


def test_a_metric_that_was_not_measured_makes_no_claim():
    rows = [row("undefended", seed, None) for seed in range(3)] + [row("booster", seed, 0.5) for seed in range(3)]
    assert claims(rows) == []


def test_differences_that_are_all_alike_are_tested_by_sign_flips():
    rows = [row("undefended", seed, 1.0) for seed in range(3)] + [row("booster", seed, 0.0) for seed in range(3)]
    (found,) = claims(rows)
    assert found["difference"] == -1.0
    assert found["test"].startswith("sign flips")
    assert found["p_value"] == 0.25
