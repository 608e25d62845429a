# SPDX-License-Identifier: Apache-2.0
"""Suites as YAML: read, composed, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from keelwright.core.errors import ConfigError, DataError, KeelwrightError, MissingError
from keelwright.measure.metric_table import find_metric
from keelwright.measure.part import PartSpec
from keelwright.measure.suites.building import BUILDERS, judges_of
from keelwright.measure.suites.loading import BUILT_IN, read_suite, suite_names

MINE = """
name: mine
says: What I ask.
parts:
  - sets: [xstest]
    judges: [refusal-lists, refusal-classifier]
    max_new_tokens: 64
    metrics: [contrast_gap]
"""


def test_every_shipped_suite_can_be_read_and_names_what_is_known() -> None:
    assert {"core", "workshop", "over-refusal", "harm", "qi", "toxicity", "user-specific", "utility"} <= set(
        suite_names()
    )
    for name in suite_names():
        suite = read_suite(name)
        assert suite.name == name
        assert suite.parts
        assert name in BUILT_IN or suite.says
        for part in suite.parts:
            assert part.builder in BUILDERS
            for metric in part.metrics:
                find_metric(metric)


def test_a_file_gives_its_parts_with_the_suites_name_and_sentence(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(MINE)
    (part,) = read_suite(str(file)).parts
    assert (part.name, part.says, part.sets) == ("mine", "What I ask.", ("xstest",))
    assert part.judges == ("refusal-lists", "refusal-classifier")


def test_suites_are_composed_by_commas_and_by_name(tmp_path: Path) -> None:
    file = tmp_path / "both.yaml"
    file.write_text(MINE + "suites: [core, over-refusal]\n")
    assert [part.name for part in read_suite(str(file)).parts] == ["mine", "core", "over-refusal"]
    together = read_suite(f"core,{file}")
    assert [part.name for part in together.parts] == ["core", "mine", "over-refusal"]


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("name: [", DataError, "is not YAML"),
        ("- a", ConfigError, "is not a suite"),
        ("name: a\nbits: []", ConfigError, "has no key 'bits'"),
        ("name: a", ConfigError, "is not a whole suite"),
        ("name: a\nparts: {sets: [x]}", ConfigError, "'parts' is not a list"),
        ("name: a\nparts: [x]", ConfigError, "a part is not a mapping"),
        ("name: a\nparts: [{sets: [x], judge: [y]}]", ConfigError, "has no setting 'judge'"),
        ("name: a\nparts: [{judges: [y]}]", ConfigError, "names no set"),
        ("name: a\nparts: [{sets: [x], samples: many}]", ConfigError, "'samples' has the wrong type"),
        ("name: a\nsuites: [nope]", ConfigError, "There is no suite 'nope'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(
    tmp_path: Path, text: str, error: type[KeelwrightError], words: str
) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(error, match=words):
        read_suite(str(file))


def test_a_suite_that_contains_itself_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("name: a\nsuites: [b.yaml]")
    Path("b.yaml").write_text("name: b\nsuites: [a.yaml]")
    with pytest.raises(ConfigError, match="contains itself") as caught:
        read_suite("a.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in str(caught.value)


def test_unknown_names_offer_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="There is no suite 'over-refusl'") as caught:
        read_suite("over-refusl")
    assert caught.value.fix == "did you mean 'over-refusal'?"
    with pytest.raises(MissingError, match="There is no suite file"):
        read_suite(str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="No suite was named"):
        read_suite(" , ")


def test_a_judge_that_must_be_named_is_asked_for_before_anything_is_loaded() -> None:
    part = PartSpec(sets=("x",), judges=("qi-rubric:", "qi-keywords"), name="qi")
    with pytest.raises(ConfigError, match="needs the judge 'qi-rubric'") as caught:
        judges_of(part, ())
    assert caught.value.fix == "add --judge qi-rubric:MODEL"
    chosen = judges_of(part, ("qi-rubric:openai:gpt", "refusal-lists"))
    assert chosen == ("qi-rubric:openai:gpt", "qi-keywords", "refusal-lists")
