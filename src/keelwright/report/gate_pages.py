# SPDX-License-Identifier: Apache-2.0
"""A gate's verdict for machines and for pull requests: JUnit XML and Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from xml.etree import ElementTree

from keelwright.report.text import number

_MARKS: Final = {"pass": "✅ pass", "fail": "❌ fail", "not measurable": "⚠️ not measurable"}


def junit(summary: Mapping[str, Any]) -> str:
    """Return the verdict as JUnit XML: one test case per rule; what is not measurable is an error, not a failure.

    Args:
        summary: `summary.json` of `gate`.
    """
    rules = summary["rules"]
    counts = {name: sum(one["outcome"] == name for one in rules) for name in _MARKS}
    suite = ElementTree.Element(
        "testsuite",
        name=f"keelwright gate: {summary['policy']['name']}",
        tests=str(len(rules)),
        failures=str(counts["fail"]),
        errors=str(counts["not measurable"]),
        skipped="0",
    )
    for one in rules:
        rule = one["rule"]
        hazard = f" ({rule['hazard']})" if rule.get("hazard") else ""
        name = f"{one['metric']}{hazard}: {rule['test']}"
        case = ElementTree.SubElement(suite, "testcase", classname=f"keelwright.{one['metric']}", name=name, time="0")
        if one["outcome"] == "fail":
            ElementTree.SubElement(case, "failure", message=_plain(one["says"]), type=rule["test"])
        elif one["outcome"] == "not measurable":
            ElementTree.SubElement(case, "error", message=_plain(one["says"]), type="not measurable")
        else:
            ElementTree.SubElement(case, "system-out").text = _plain(one["says"])
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the verdict as Markdown for a pull request: one row per rule, then what the rows say in full.

    Args:
        summary: `summary.json` of `gate`.
    """
    lines = [
        f"## Safety gate: {_MARKS[summary['outcome']]}",
        "",
        _escaped(summary["sentence"]),
        "",
        "| metric | test | verdict | value | one-sided p | n | needs |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in summary["rules"]:
        p_value = "" if one["p_adjusted"] is None else f"{one['p_adjusted']:.3g}"
        needs = "" if one["needs"] is None else f"{one['needs']:,}"
        metric = one["metric"].replace("_", " ") + (f" ({one['rule']['hazard']})" if one["rule"].get("hazard") else "")
        cells = (metric, one["rule"]["test"], _MARKS[one["outcome"]], _value(one), p_value, f"{one['n']:,}", needs)
        lines.append("| " + " | ".join(_escaped(cell) for cell in cells) + " |")
    lines += ["", "<details><summary>Each rule in words</summary>", ""]
    lines += [f"- {_escaped(one['says'])}" for one in summary["rules"]]
    return "\n".join([*lines, "", "</details>", ""])


def _value(one: Mapping[str, Any]) -> str:
    if one["value"] is None:
        return "not measured"
    sign = "" if one["rule"]["test"] == "threshold" else "+" if one["value"] >= 0 else "-"
    low, high = number(one["low"]), number(one["high"])
    return f"{sign}{number(abs(one['value']))} [{low}, {high}]"


def _plain(text: str) -> str:
    """Return a text without characters that XML cannot hold."""
    return "".join(char for char in text if char in "\t\n" or char >= " ")


def _escaped(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
