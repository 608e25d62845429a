# SPDX-License-Identifier: Apache-2.0
"""Write the reference pages that the code itself holds: `python docs/make_reference.py`.

Methods come from the catalogue, metrics, suites and judges from their tables, each with the docstrings as they stand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keelwright.core.catalogue import MethodLine, catalogue
from keelwright.judges.registry import known_judges
from keelwright.measure.metric import Metric
from keelwright.measure.metric_table import METRIC_NAMES, find_metric
from keelwright.measure.metrics import METRICS
from keelwright.measure.panel import TASK_JUDGE
from keelwright.measure.part import PartSpec
from keelwright.measure.suites import find_suite
from keelwright.measure.suites.loading import BUILT_IN, read_suite, suite_names

FOLDER = Path(__file__).parent / "reference"

_K = "25"
"""Stands in for K while a metric of K answers is described."""

_METHODS = """\
Made from the catalogue and the docstrings; `keelwright methods` prints the same tables. Status: *verified* is equal to
the official code or to a published known answer, *faithful* is written from the paper with nothing to compare with,
*reconstruction* fills a gap of the source, which the docstring names. Passes per step count forward and backward passes
of training, plain tuning being 1; weight arithmetic has none."""

_ROOMS = {
    "repair": "How safety comes back: [Repair and merge](../how-to/repair.md), [Heal](../how-to/heal.md).",
    "harden": "How a model is prepared for tuning, or tuned safely: [Harden](../how-to/harden.md), "
    "[Tune](../how-to/tune.md).",
    "stress": "What breaks safety: [Stress](../how-to/stress.md).",
}

_METRICS = """\
`keelwright methods --metrics` prints the names. K stands for a number, as in `asr_at_5`. A name may end in conditions:
`user_helpfulness[domain=QA]`, `over_refusal[judge=refusal-classifier]`, `rr_any[hazard=fraud]`, `asr[set=harmbench]`.
`score:JUDGE` and `cost:JUDGE` are means of a judge's scores; of the first more is better, of the second less.

Interval and test are those of units that stand alone. Units in clusters are resampled by cluster and tested by flipping
or swapping whole clusters; in two crossed ways (instructions and profiles) by both.
[Design of the audit](../design/audit.md) says why."""

_SUITES = """\
Made from the suites' own files; `keelwright methods --suites` prints their names. Several are joined by commas, and a
YAML file of yours is a suite too: [Audit and compare](../how-to/audit.md) and [Files and JSON](files.md) say how."""

_JUDGES = """\
Made from the registry and the docstrings; `keelwright methods --judges` prints the table. A judge that asks a model is
named `NAME:MODEL`, `NAME:vllm:MODEL` or `NAME:openai:MODEL`. Only a judge that knows harm gives a harm figure."""


def methods_page() -> str:
    """Return the page of methods: a table of each room, then each docstring as it stands."""
    lines = list(catalogue().values())
    rooms = dict.fromkeys(line.room for line in lines)
    return _page("Methods", _METHODS, *(block for room in rooms for block in _room(room, lines)))


def _room(room: str, lines: Sequence[MethodLine]) -> list[str]:
    """Return the heading, the table and the docstrings of one room; weight arithmetic has no passes."""
    own = [line for line in lines if line.room == room]
    rows = [
        (
            line.name,
            line.status,
            f"{line.passes_per_step:g}" if line.passes_per_step else "",
            ", ".join(line.needs),
            line.source,
        )
        for line in own
    ]
    columns = ("name", "status", "passes per step", "needs", "source")
    docstrings = [_quoted(line.name, line.load().__module__, "###") for line in own]
    return [f"## {room.capitalize()}", *filter(None, [_ROOMS.get(room)]), _table(columns, rows), *docstrings]


def metrics_page() -> str:
    """Return the page of metrics: what each counts, its interval and its paired test; then what the sources say."""
    found = {name: find_metric(name.removesuffix("K") + _K if name.endswith("_K") else name) for name in METRIC_NAMES}
    rows = [
        (
            f"`{name}`",
            one.counts.replace(_K, "K"),
            one.unit,
            "higher" if one.higher_is_better else "lower",
            *_statistics(one),
        )
        for name, one in found.items()
    ]
    columns = ("name", "counts", "unit", "better", "interval", "paired test")
    modules = dict.fromkeys(one.rows.__module__ for name, one in found.items() if name not in METRICS)
    return _page(
        "Metrics",
        _METRICS,
        "## Headline rates",
        "Of every part that does not stand apart (`headline: false`).",
        _table(columns, rows[: len(METRICS)]),
        "## Further metrics",
        "Of the parts that name them.",
        _table(columns, rows[len(METRICS) :]),
        "## What they count, and where they come from",
        *(_quoted(module.rpartition(".")[2].replace("_", " "), module, "###") for module in modules),
    )


def suites_page() -> str:
    """Return the page of suites: what each says, and its parts."""
    return _page(
        "Suites",
        _SUITES,
        *(_suite(name) for name in suite_names()),
    )


def judges_page() -> str:
    """Return the page of judges: a table of all, then each docstring as it stands."""
    lines = known_judges((TASK_JUDGE,)).values()
    rows = [
        (
            f"`{line.name}`",
            line.title,
            line.reads,
            line.says,
            "yes" if line.knows_harm else "no",
            str(line.to_mapping()["needs"]),
        )
        for line in lines
    ]
    modules: dict[str, list[str]] = {}
    for line in lines:
        modules.setdefault(line.path.partition(":")[0], []).append(line.name)
    return _page(
        "Judges",
        _JUDGES,
        _table(("name", "what", "reads", "tells apart", "knows harm", "needs"), rows),
        "[Trained judges](judges-trained.md) holds the cards of those that ship with weights.",
        *(_quoted(", ".join(names), module) for module, names in modules.items()),
    )


def _statistics(metric: Metric) -> tuple[str, str]:
    if metric.is_binary:
        return "Wilson", "exact McNemar"
    return "bootstrap", "signed ranks (Pratt)" if metric.is_ordinal else "swaps of both sides"


def _suite(name: str) -> str:
    if name in BUILT_IN:
        suite = find_suite(name)
        items = suite.items()
        kinds = {kind: sum(one.kind == kind for one in items) for kind in dict.fromkeys(one.kind for one in items)}
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        facts = f"{counts}; judge `{suite.judge().judge_id}`; at most {suite.max_new_tokens} new tokens."
        return f"## {name}\n\n{suite.says}\n\n{facts}"
    spec = read_suite(name)
    return "\n\n".join([f"## {name}", spec.says, f"Version {spec.version}.", *(_part(one) for one in spec.parts)])


def _part(part: PartSpec) -> str:
    sampled = f", {part.samples} samples at temperature {part.temperature:g}, top-p {part.top_p:g}"
    rows = [
        ("sets", ", ".join(f"`{one}`" for one in part.sets)),
        ("builder", part.builder),
        ("judges", ", ".join(f"`{one}`" for one in part.judges)),
        ("answers", f"at most {part.max_new_tokens} new tokens{sampled if part.temperature else ', greedy'}"),
        ("headline rates", "yes" if part.headline else "no: it stands apart"),
        ("metrics", ", ".join(f"`{one}`" for one in part.metrics) or "-"),
    ]
    return _table(("part", part.name), rows)


def _page(title: str, *blocks: str) -> str:
    return "\n\n".join([f"# {title}", *blocks]) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    lines = [f"| {' | '.join(one.replace('|', '/') for one in row)} |" for row in cells]
    return "\n".join([lines[0], lines[1].replace(" ", ""), *lines[2:]])


def _quoted(title: str, module: str, level: str = "##") -> str:
    text = importlib.import_module(module).__doc__ or ""
    return f"{level} {title}\n\n```text\n{text.strip()}\n```"


PAGES: Mapping[str, Callable[[], str]] = {
    "methods.md": methods_page,
    "metrics.md": metrics_page,
    "suites.md": suites_page,
    "judges.md": judges_page,
}
"""By file name, what makes the page."""


if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
