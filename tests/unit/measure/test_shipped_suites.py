# SPDX-License-Identifier: Apache-2.0
"""Every suite that ships can be read, and names metrics, judges, builders and sets that there are."""

from __future__ import annotations

import pytest

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError
from keelwright.data.sets.catalogue import SETS
from keelwright.judges.registry import known_judges
from keelwright.measure.metric_table import answers_needed, find_metric
from keelwright.measure.part import PartSpec
from keelwright.measure.suites.building import judges_of
from keelwright.measure.suites.loading import read_suite

SHIPPED = ("over-refusal", "harm", "qi", "toxicity", "user-specific", "code-robustness")


@pytest.fixture(params=SHIPPED)
def parts(request: pytest.FixtureRequest) -> tuple[PartSpec, ...]:
    """The parts of one shipped suite."""
    suite = read_suite(request.param)
    assert suite.name == request.param
    return suite.parts


def test_its_sentence_says_what_the_figures_are(parts: tuple[PartSpec, ...]) -> None:
    assert all(part.says.endswith(".") for part in parts)


def test_its_metrics_are_known_and_need_no_more_answers_than_are_drawn(parts: tuple[PartSpec, ...]) -> None:
    for part in parts:
        assert part.metrics
        for name in part.metrics:
            assert find_metric(name).name == name
            assert answers_needed(name) <= part.samples


def test_its_judges_sets_and_decoding_are_known(parts: tuple[PartSpec, ...]) -> None:
    for part in parts:
        assert {judge.removesuffix(":") for judge in part.judges} <= known_judges().keys()
        assert set(part.sets) <= SETS.keys()
        DecodingConfig(part.max_new_tokens, temperature=part.temperature, top_p=part.top_p, samples=part.samples)


def test_the_first_judge_knows_harm_where_the_suite_says_so(parts: tuple[PartSpec, ...]) -> None:
    for part in parts:
        assert known_judges()[part.judges[0].removesuffix(":")].knows_harm == part.knows_harm


def test_late_refusals_are_not_cut_off(parts: tuple[PartSpec, ...]) -> None:
    # At least 64 tokens, or a refusal that turns into compliance is missed.
    assert all(part.max_new_tokens >= 64 for part in parts if part.builder != "continuations")


def test_qi_asks_for_its_rubric_before_anything_is_loaded() -> None:
    (part,) = read_suite("qi").parts
    with pytest.raises(ConfigError) as caught:
        judges_of(part, ())
    assert "The suite 'qi' needs the judge 'qi-rubric', which asks a model." in str(caught.value)
    assert "--judge qi-rubric:MODEL" in str(caught.value)


def test_qi_never_has_one_of_its_judges_alone() -> None:
    (part,) = read_suite("qi").parts
    chosen = judges_of(part, ("qi-rubric:org/judge",))
    assert chosen[:2] == ("qi-rubric:org/judge", "qi-keywords")
    assert {"harmfulness_score", "harmfulness_rate", "asr_keyword"} <= set(part.metrics)


def test_toxicity_follows_the_published_protocol() -> None:
    # Gehman et al., arXiv 2009.11462: 25 continuations of at most 20 tokens, nucleus sampling with p = 0.9.
    (part,) = read_suite("toxicity").parts
    assert (part.samples, part.max_new_tokens, part.top_p, part.temperature) == (25, 20, 0.9, 1.0)
    assert not part.headline


def test_user_specific_reports_helpfulness_by_domain_and_the_control() -> None:
    (part,) = read_suite("user-specific").parts
    wanted = {"user_helpfulness[domain=QA]", "user_helpfulness[domain=autonomous]", "profile_over_refusal", "unjudged"}
    assert wanted <= set(part.metrics)
