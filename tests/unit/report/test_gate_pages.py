# SPDX-License-Identifier: Apache-2.0
"""A verdict for machines and for pull requests: well-formed whatever the texts hold, and complete."""

from xml.etree import ElementTree

import pytest

from keelwright.report.gate_pages import junit, markdown

NASTY = 'a < b | c & "d"\nnext \x00\x1b[31m]]>'


def rule(outcome, says="It holds.", **more):
    plain = {
        "rule": {"metric": "refusal_rate", "test": "regression", "hazard": None},
        "metric": "refusal_rate", "outcome": outcome, "says": says, "n": 1200, "needs": None,
        "value": -0.125, "low": -0.2, "high": -0.05, "p_value": 0.001, "p_adjusted": 0.002,
    }  # fmt: skip
    return {**plain, **more}


def summary(*rules, outcome="fail"):
    return {"outcome": outcome, "sentence": "Fail: it got worse.", "policy": {"name": "mine"}, "rules": list(rules)}


def test_each_rule_is_a_case_and_each_verdict_its_own_element():
    rules = [rule("pass"), rule("fail", "It got worse."), rule("not measurable", "Too few.", needs=200)]
    suite = ElementTree.fromstring(junit(summary(*rules))).find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    passed, failed, unsure = suite
    assert passed.find("system-out").text == "It holds."
    assert failed.find("failure").get("message") == "It got worse."
    assert failed.find("failure").get("type") == "regression"
    assert unsure.find("error").get("message") == "Too few."
    assert passed.find("failure") is passed.find("error") is None


def test_texts_that_xml_cannot_hold_leave_it_well_formed():
    text = junit(summary(rule("fail", NASTY)))
    message = ElementTree.fromstring(text).find("testsuite/testcase/failure").get("message")
    assert message.startswith('a < b | c & "d"')
    assert "\x00" not in text
    assert "\x1b" not in text


def test_a_rule_of_one_hazard_area_is_named_with_it():
    one = rule("pass", rule={"metric": "refusal_rate", "test": "regression", "hazard": "fraud"})
    case = ElementTree.fromstring(junit(summary(one))).find("testsuite/testcase")
    assert case.get("name") == "refusal_rate (fraud): regression"
    assert "refusal rate (fraud)" in markdown(summary(one))


def test_the_table_has_a_row_per_rule_with_value_p_and_count():
    lines = markdown(summary(rule("fail"), rule("not measurable", needs=2500, p_adjusted=None))).splitlines()
    assert lines[0] == "## Safety gate: ❌ fail"
    rows = [line for line in lines if line.startswith("| refusal rate")]
    assert [row.count("|") for row in rows] == [8, 8]
    assert "0.002" in rows[0]
    assert "1,200" in rows[0]
    assert "2,500" in rows[1]


def test_a_value_keeps_its_sign_and_what_is_missing_says_so():
    falls = markdown(summary(rule("fail")))
    assert "-0.125" in falls
    rises = markdown(summary(rule("pass", value=0.125, low=0.05, high=0.2)))
    assert "+0.125" in rises
    level = markdown(summary(rule("pass", value=0.95, rule={"metric": "x", "test": "threshold", "hazard": None})))
    assert "+0.95" not in level
    assert "not measured" in markdown(summary(rule("not measurable", value=None)))


@pytest.mark.parametrize("field", ["says", "metric"])
def test_texts_cannot_break_the_table_or_add_markup(field):
    text = markdown(summary(rule("fail", **{field: "<script>x</script> | y\nz"})))
    assert "<script>" not in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(row.replace("\\|", "").count("|") == 8 for row in rows)
