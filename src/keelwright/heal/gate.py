# SPDX-License-Identifier: Apache-2.0
"""`gate`: a policy's verdict on an audit, on a comparison, or on the change between two runs; from folders alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keelwright.core.digests import json_digest
from keelwright.core.files import write_atomic
from keelwright.heal.reporting import write_report
from keelwright.heal.sides import Side, sides_of
from keelwright.measure.compare import require_same_conditions
from keelwright.measure.gate import GateVerdict, decide
from keelwright.measure.policy import read_policy
from keelwright.report.gate_pages import junit, markdown
from keelwright.runs.folder import RunFolder, RunSpec, default_run_folder
from keelwright.runs.places import disk_errors, require_place


def gate(
    run: str | Path,
    *,
    policy: str | Path = "default",
    against: str | Path | None = None,
    out: str | Path | None = None,
    junit_file: str | Path | None = None,
    markdown_file: str | Path | None = None,
) -> dict[str, Any]:
    """Return the verdict of a policy, and keep it as a run.

    Args:
        run: An audit (with `--against` it holds both sides), a comparison, or a log of another program.
        policy: YAML file, or `default`.
        against: A second audit or log: the model before.
        out: Run folder of the verdict; `runs/<time>-gate` by default.
        junit_file: Also write JUnit XML here.
        markdown_file: Also write a Markdown summary here.

    Raises:
        KeelwrightError: The run is unfinished, the policy is wrong, or the two sides were made differently.
    """
    rules = read_policy(policy)
    side, before = sides_of(Path(run), None if against is None else Path(against))
    if before is not None:
        require_same_conditions(before.records, side.records, allow=side.allowed)
    verdict = decide(rules, side.records, None if before is None else before.records, primary=side.primary)
    folder = Path(out) if out is not None else default_run_folder("gate")
    summary = {
        "schema": 1,
        "command": "gate",
        "run": str(folder),
        "runs": [one.name for one in (before, side) if one is not None],
        "outcome": verdict.outcome,
        "sentence": _sentence(verdict),
        "policy": {"name": rules.name, "alpha": rules.alpha, "power": rules.power, "multiplicity": rules.multiplicity},
        "family": _family(verdict),
        "rules": [one.to_mapping() for one in verdict.rules],
    }
    require_place(folder, flag="--out")
    with RunFolder.open(folder, _spec(run, against, policy, side, before, summary), flag="--out") as keeper:
        keeper.finish(summary)
    write_report(folder)
    for path, text in ((junit_file, junit(summary)), (markdown_file, markdown(summary))):
        if path is not None:
            with disk_errors(Path(path)):
                write_atomic(Path(path), text)
    return summary


def _spec(
    run: str | Path,
    against: str | Path | None,
    policy: str | Path,
    side: Side,
    before: Side | None,
    summary: Mapping[str, Any],
) -> RunSpec:
    words = ["keelwright", "gate", str(run), "--policy", str(policy)]
    words += ["--against", str(against)] if against is not None else []
    inputs = {"after": {"ref": side.name, "digest": side.digest}}
    if before is not None:
        inputs["before"] = {"ref": before.name, "digest": before.digest}
    config = {"policy": json_digest({**summary["policy"], "rules": [one["rule"] for one in summary["rules"]]})}
    return RunSpec("gate", tuple(words), config, 0, inputs)


def _family(verdict: GateVerdict) -> str:
    tested = sum(one.p_value is not None for one in verdict.rules)
    adjusted = {"holm": "adjusted by Holm", "bh": "adjusted by Benjamini and Hochberg", "none": "not adjusted"}
    return f"{tested} tests, p {adjusted[verdict.policy.multiplicity]}"


def _sentence(verdict: GateVerdict) -> str:
    """Return the verdict in one sentence, with what decided it."""
    decisive = [one for one in verdict.rules if one.outcome == verdict.outcome]
    if verdict.outcome == "pass":
        return f"Pass: all {len(verdict.rules)} rules of the policy '{verdict.policy.name}' hold."
    word = "Fail" if verdict.outcome == "fail" else "Not measurable"
    return f"{word}: {' '.join(one.says for one in decisive)}"
