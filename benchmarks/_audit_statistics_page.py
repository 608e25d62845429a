# SPDX-License-Identifier: Apache-2.0
"""The page of `benchmarks.audit_statistics`: its rows as tables, and the words around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, what it must be, and whether it is."""

    part: str
    """`coverage`, `few clusters`, `false alarms`, `power` or `cost`."""
    what: str
    figure: str
    held: bool | None
    """None where the figure is shown and nothing is promised."""
    limit: str = ""
    error: str = ""
    """Monte Carlo standard error; `exact` for an enumeration."""


HEADINGS = {
    "coverage": ("interval, data", "covers", "Monte Carlo error, points", "must be"),
    "few clusters": ("interval, data", "covers", "Monte Carlo error, points", "must be"),
    "false alarms": ("test, data without a change", "rejects", "Monte Carlo error, points", "must be"),
    "power": ("exact McNemar, data", "detects", "Monte Carlo error, points", "must be"),
    "cost": ("what", "CPU seconds, peak memory", "", "must be"),
}
WORDS = {
    "coverage": """## Do the intervals cover?

Nominal 95 %, at least ten expected events. Wilson is allowed 93 to 97 % in the mean over rates; single rates scatter
because counts are whole. Clopper-Pearson is built to cover at least 95 %, which is why gates use it. The intervals of
`bootstrap_statistic` and `paired_statistic` are widened for few groups; those of `bootstrap_mean`, `bootstrap_ratio`
and `paired_bootstrap` (below: *plain*) are not, and too narrow at 40 groups. A corrected rate whose judge shows one
error among its labels has an interval that is too wide. What is not promised is shown all the same.""",
    "few clusters": """## How many clusters does a bootstrap need?

Clusters of one to nine labels, their rates spread (intra-cluster correlation 0.3). Nothing is promised below 20
clusters: there an audit says so and tests by cluster.""",
    "false alarms": """## Does a gate stay silent when nothing changed?

Share of data sets without a change on which the test rejects at 0.05. For exact McNemar it is the worst over the share
of discordant pairs, counted. In the clustered data each cluster's rate moves as a whole, up or down alike.""",
    "power": """## Does the minimum detectable change hold its promise?

`minimum_detectable_change` promises 80 % power of the exact test. The last rows show what the usual normal formula
promises and what the exact test then gives.""",
    "cost": """## What does it cost?

10,000 resamples each, one thread, CPU seconds of this machine. Peak memory is what the call allocates beyond its
inputs.""",
}


def tables(rows: Sequence[Row]) -> str:
    """Return the tables in Markdown, part by part."""
    parts = []
    for part, words in WORDS.items():
        heads = HEADINGS[part]
        lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for row in rows:
            if row.part == part:
                limit = row.limit if row.held is not False else f"**{row.limit}: missed**"
                lines.append(f"| {row.what} | {row.figure} | {row.error} | {limit} |")
        parts.append(f"{words}\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def page(rows: Sequence[Row], *, seed: int, cpu_seconds: float) -> str:
    """Return the whole page."""
    return f"""# The statistics of an audit

What the intervals, tests and power figures of keelwright do on data whose truth is known. Written by
`python -m benchmarks.audit_statistics --write`, not by hand.

Simulated data sets come from fixed, named streams of seed {seed}; methods that are compared see the same data sets.
Beside each simulated figure stands its Monte Carlo standard error; *exact* figures are enumerations. The whole table
took {cpu_seconds:.0f} s of CPU.

{tables(rows)}"""
