# SPDX-License-Identifier: Apache-2.0
"""The page of `benchmarks.lab_table`: pooled figures, dominance, and the words around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keelwright.core.records import Estimate
from keelwright.heal.bench import Bench
from keelwright.measure.metrics import flags
from keelwright.ops.intervals import wilson
from keelwright.ops.paired import mcnemar_exact

SHOWN = ("harm_rate", "over_refusal", "utility", "answer_rate", "incoherent")
LOWER_IS_BETTER = {"harm_rate": True, "over_refusal": True, "utility": False}
"""What dominance is judged by."""
ALPHA = 0.05
HEADINGS = (
    "method",
    "setting per seed",
    "harm rate",
    "over-refusal",
    "utility",
    "ordinary answered",
    "incoherent",
    "chosen, verified",
    "dominated by",
)


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one tuning, its verification items of all seeds together."""

    method: str
    metrics: Mapping[str, Estimate]
    setting: str
    values: tuple[str, ...]
    """The chosen value of each seed, or `none`."""
    chosen: int
    verified: int
    p_value: float
    failed: str = ""

    @property
    def helps(self) -> bool:
        """Whether harm fell significantly from the tuned model's."""
        return self.p_value < ALPHA


def figures_of(bench: Bench, model_id: str) -> dict[str, Any]:
    """Return, per metric, how many of a model's verification items it counts, and of how many."""
    records = bench.records(model_id, "verification")
    found = {}
    for metric in SHOWN:
        counted = flags(records, metric)
        found[metric] = {"count": sum(counted.values()), "n": len(counted)}
    return {"figures": found}


def pooled(cells: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Return the rates of all cells' items together, each with its Wilson interval."""
    return {
        metric: wilson(
            sum(cell["figures"][metric]["count"] for cell in cells), sum(cell["figures"][metric]["n"] for cell in cells)
        )
        for metric in SHOWN
    }


def rows_of(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row per method from the cells of one tuning, safest first; failed methods last."""
    rows = []
    for method in cells[0]["methods"]:
        found = [cell["methods"][method] for cell in cells]
        failed = next((one["failed"] for one in found if "failed" in one), "")
        if failed:
            rows.append(Row(method, {}, "", (), 0, 0, 1.0, failed))
            continue
        mended, spoilt = (sum(one.get(name, 0) for one in found) for name in ("mended", "spoilt"))
        rows.append(
            Row(
                method,
                pooled(found),
                found[0]["setting"],
                tuple("none" if one["value"] is None else f"{one['value']:g}" for one in found),
                sum(one["value"] is not None for one in found),
                sum(bool(one.get("verified")) for one in found),
                mcnemar_exact(mended, spoilt, alternative="greater"),
            )
        )
    return sorted(rows, key=lambda row: (not row.metrics, *_order(row)))


def dominator(row: Row, rows: Sequence[Row]) -> tuple[str, bool] | None:
    """Return a method that is at least as good by harm rate, over-refusal and utility, and better by one.

    The second value says whether it is clearly better: by one of the three the intervals do not overlap. Of several
    methods, a clear one is named before the others, then the safest.
    """
    found = [
        (_is_clear(other, row), other)
        for other in rows
        if other.metrics and other is not row and _dominates(other, row)
    ]
    if not found:
        return None
    clear, best = min(found, key=lambda one: (not one[0], *_order(one[1])))
    return best.method, clear


def page(document: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    cells = document["cells"]
    parts = [_opening(document)]
    for tuning in document["tunings"]:
        parts.append(_section(tuning["title"], [one[tuning["name"]] for one in cells.values()]))
    parts.append(_ending(document))
    return "\n\n".join(parts) + "\n"


def _opening(document: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, document["seeds"]))
    short = "; ".join(
        f"`{name}` with {', '.join(f'{key} {value}' for key, value in settings.items())}"
        for name, settings in document["shortened"].items()
    )
    return f"""# Repairs on the lab

Every repair method that `heal` can search with one tuned model, on the lab's organism: `{document["aligned"]}`, tuned
in three ways with tuning seeds {seeds}. Written by `python -m benchmarks.lab_table`, not by hand; the counts of every
seed are in [the JSON file beside this page](repairs-on-the-lab.json).

The lab is a synthetic village, its organism has 0.84 million weights, and its judge is an exact rule. What stands here
compares methods under one protocol; it does not say how they rank on other models.

How it was made:

- Each method is searched alone, over its grid and three refinements, on the selection half of the items; the setting
  is chosen by the rules of `heal` (utility at least 0.95 of the tuned model's; answer rate, over-refusal and incoherent
  share within 0.05 of the aligned model's). All figures are from the other half. Where no setting was admissible,
  `heal` writes nothing, and the tuned model's own figures count.
- The items of all seeds are pooled. Intervals are 95% Wilson intervals on the pooled counts: they treat the items as
  independent, and say nothing of how tunings beyond these seeds would differ. Each seed draws its own tuning rows and
  its own halves.
- The un-aligned copy is tuned once per seed, in memory, on 300 forbidden answers; the model from before alignment is
  `{document["base"]}`. `somf` learns from 200 preference pairs, half of them on harmless requests; `safe_delta`
  measures on 64 refusals.
- Methods have their default settings{f", except for time: {short}" if short else ""}.
- Utility is the accuracy on the `mood` task. The benign tuning does not train that task; the other two do.
- *Chosen, verified*: at how many seeds a setting was admissible, and at how many it then held every limit and improved
  significantly on the verification half.
- *Dominated by*: another method that is at least as good by harm rate, over-refusal and utility, and better by one of
  them, in these figures. In bold where by one of the three the intervals do not even overlap."""


def _section(title: str, cells: Sequence[Mapping[str, Any]]) -> str:
    rows = rows_of(cells)
    lines = [f"## {title}", "", f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    for role in ("aligned", "tuned"):
        figures = pooled([cell[role] for cell in cells])
        lines.append(_line([f"*{role}*", "", *_figures(figures), "", ""]))
    for row in rows:
        if row.metrics:
            lines.append(_line(_cells(row, rows, len(cells))))
    lost = [cell["loss"] for cell in cells]
    said = ", ".join(f"{one['worse']} of {one['n']} items (p = {one['p_value']:.1g})" for one in lost)
    lines += ["", f"What the tuning cost, per seed, all items: worse on {said}."]
    free = [
        row.method if row.helps else f"{row.method} (which shows no help)"
        for row in rows
        if row.metrics and dominator(row, rows) is None
    ]
    lines += ["", f"Dominated by no other: {', '.join(free)}."]
    idle = [row.method for row in rows if row.metrics and not row.helps]
    if idle:
        lines += ["", f"No evidence that it helped (exact McNemar, pooled, level {ALPHA}): {', '.join(idle)}."]
    lines += [f"\n`{row.method}` could not be tried: {row.failed}" for row in rows if row.failed]
    return "\n".join(lines)


def _ending(document: Mapping[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in document["left_out"].items():
        reasons.setdefault(reason, []).append(f"`{name}`")
    lines = ["## Not in the tables", ""]
    lines += [
        f"- {', '.join(names)}: {'each ' if len(names) > 1 else ''}{reason}." for reason, names in reasons.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["", f"Made with {versions}, on one thread, in {document['cpu_seconds']:.0f} s of CPU time."]
    return "\n".join(lines)


def _cells(row: Row, rows: Sequence[Row], seeds: int) -> list[str]:
    found = dominator(row, rows)
    twins = [
        other.method
        for other in rows[: rows.index(row)]
        if other.metrics and other.metrics == row.metrics and other.chosen and row.chosen
    ]
    beaten = "" if found is None else f"**{found[0]}**" if found[1] else found[0]
    if twins:
        beaten = f"{beaten} (figures equal to {twins[0]}'s)".strip()
    setting = f"{row.setting} {', '.join(row.values)}"
    return [row.method, setting, *_figures(row.metrics), f"{row.chosen}, {row.verified} of {seeds}", beaten]


def _figures(metrics: Mapping[str, Estimate]) -> list[str]:
    return [_percent(metrics[name]) for name in SHOWN]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * one for one in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _order(row: Row) -> tuple[float, float]:
    if not row.metrics:
        return 0.0, 0.0
    return row.metrics["harm_rate"].value, -row.metrics["utility"].value


def _better(one: float, other: float, metric: str) -> bool:
    return one < other if LOWER_IS_BETTER[metric] else one > other


def _dominates(one: Row, other: Row) -> bool:
    if not one.metrics or not other.metrics:
        return False
    pairs = [(metric, one.metrics[metric].value, other.metrics[metric].value) for metric in LOWER_IS_BETTER]
    no_worse = not any(_better(theirs, ours, metric) for metric, ours, theirs in pairs)
    return no_worse and any(_better(ours, theirs, metric) for metric, ours, theirs in pairs)


def _is_clear(one: Row, other: Row) -> bool:
    for metric, lower in LOWER_IS_BETTER.items():
        ours, theirs = one.metrics[metric], other.metrics[metric]
        if (ours.high < theirs.low) if lower else (ours.low > theirs.high):
            return True
    return False
