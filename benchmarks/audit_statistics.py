# SPDX-License-Identifier: Apache-2.0
"""Whether the statistics of an audit do what they say: coverage, false alarms, power, time and memory.

Enumerations where the cases can be counted, simulations from fixed streams elsewhere. Prints the tables; with `--write`
also writes `docs/reference/statistics.md` and a JSON file beside it. Exits 1 when a promise is missed or the budget of
CPU time exceeded.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks._audit_statistics_page import Row, page, tables
from keelwright.core.records import Estimate
from keelwright.core.seeds import derive_seed
from keelwright.models.threads import threads_for
from keelwright.ops.agreement import Confusion, kappa_interval, rogan_gladen_interval
from keelwright.ops.bootstrap import bootstrap_mean, bootstrap_ratio, cluster_permutation, paired_bootstrap
from keelwright.ops.clusters import near_duplicate_clusters
from keelwright.ops.intervals import clopper_pearson, wilson
from keelwright.ops.paired import holm, mcnemar_exact, minimum_detectable_change, paired_difference, required_pairs
from keelwright.ops.power import mcnemar_power
from keelwright.ops.ranks import signed_ranks
from keelwright.ops.resampling import Floats
from keelwright.ops.statistic import bootstrap_statistic, gap, paired_statistic, ratio, swap_test
from keelwright.ops.training_seeds import seed_test
from keelwright.ops.unpaired import fisher_exact, unpaired_difference

ROOT = Path(__file__).parents[1]
SEED = 0
REPEATS = 2000
RESAMPLES = 2000
"""Of each interval in the simulations, half as many for crossed factors; an audit draws 10,000."""
CPU_BUDGET_S = 300.0
LOW, HIGH = 0.93, 0.97
ICC = 0.3

Case = Callable[[np.random.Generator, int], Estimate]


def _streams(*names: str | int) -> Iterator[tuple[np.random.Generator, int]]:
    """Yield one generator per data set, and a seed for its resamples."""
    for repeat in range(REPEATS):
        seed = derive_seed(SEED, "audit statistics", *names, repeat)
        yield np.random.Generator(np.random.PCG64(seed)), seed


def _error(share: float) -> str:
    return f"{100 * math.sqrt(max(share * (1 - share), 1e-6) / REPEATS):.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def simulated_coverage(part: str, what: str, truth: float, case: Case, *, promised: bool = True) -> Row:
    """Return how often the interval of `case` holds the truth. Cases of one data set's name see the same data."""
    covered = [
        found.low <= truth <= found.high
        for found in (case(rng, seed) for rng, seed in _streams(what.rsplit(": ", maxsplit=1)[-1]))
    ]
    share = sum(covered) / REPEATS
    return Row(
        part,
        what,
        _percent(share),
        LOW <= share <= HIGH if promised else None,
        "93 to 97 %" if promised else "not promised",
        _error(share),
    )


def enumerated_coverage() -> Iterator[Row]:
    """Yield the coverage of the two intervals of a share, counted over every outcome."""
    for n in (20, 50, 100, 300, 1000):
        rates = [p for p in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5) if n * p >= 10]
        for name, interval in (("Wilson", wilson), ("Clopper-Pearson", clopper_pearson)):
            ends = [interval(k, n) for k in range(n + 1)]
            found = []
            for p in rates:
                chances = [math.exp(_log_chance(k, n, p)) for k in range(n + 1)]
                found.append(sum(c for c, end in zip(chances, ends, strict=True) if end.low <= p <= end.high))
            mean = sum(found) / len(found)
            held = LOW <= mean <= HIGH if name == "Wilson" else min(found) >= 0.95
            shown = f"{_percent(mean)} (least {_percent(min(found))})"
            rule = "93 to 97 % in the mean" if name == "Wilson" else "95 % or more"
            yield Row("coverage", f"{name}, n = {n}, rates {rates[0]:g} to {rates[-1]:g}", shown, held, rule, "exact")
    for n, discordant, change in ((50, 0.4, 0.1), (100, 0.2, 0.1), (100, 0.3, 0.0), (150, 0.1, 0.05)):
        share, gained, lost = 0.0, (discordant + change) / 2, (discordant - change) / 2
        for b in range(n + 1):
            for c in range(n + 1 - b):
                log = _log_three(b, c, n, gained, lost)
                if log > -25.0:
                    end = paired_difference(b, c, n)
                    share += math.exp(log) * (end.low <= change <= end.high)
        what = f"Tango, n = {n}, discordant {discordant:g}, change {change:g}"
        yield Row("coverage", what, _percent(share), LOW <= share <= HIGH, "93 to 97 %", "exact")


def _log_chance(k: int, n: int, p: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return ways + k * math.log(p) + (n - k) * math.log1p(-p)


def _log_three(b: int, c: int, n: int, gained: float, lost: float) -> float:
    ways = math.lgamma(n + 1) - math.lgamma(b + 1) - math.lgamma(c + 1) - math.lgamma(n - b - c + 1)
    return ways + b * math.log(gained) + c * math.log(lost) + (n - b - c) * math.log1p(-gained - lost)


def _table(values: Floats) -> Floats:
    return np.stack([values, np.ones_like(values)], axis=1)


def clustered(rng: np.random.Generator, groups: int, rate: float) -> tuple[Floats, Floats, list[int]]:
    """Return each unit's own rate and label in clusters of one to nine, and its cluster."""
    sizes = rng.integers(1, 10, size=groups)
    spread = (1 - ICC) / ICC
    own = np.repeat(rng.beta(rate * spread, (1 - rate) * spread, size=groups), sizes)
    labels = (rng.random(len(own)) < own).astype(np.float64)
    return own, labels, np.repeat(np.arange(groups), sizes).tolist()


def items_case(n: int, draw: Callable[[np.random.Generator, int], Floats], interval: str) -> Case:
    return lambda rng, seed: bootstrap_statistic(
        _table(draw(rng, n)), ratio, interval=interval, resamples=RESAMPLES, seed=seed
    )


def cluster_case(groups: int, rate: float) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        _, labels, clusters = clustered(rng, groups, rate)
        return bootstrap_statistic(_table(labels), ratio, clusters=clusters, resamples=RESAMPLES, seed=seed)

    return case


def paired_cluster_case(groups: int) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        own, before, clusters = clustered(rng, groups, 0.3)
        after = (rng.random(len(own)) < 0.5 * own).astype(np.float64)
        return paired_statistic(_table(before), _table(after), ratio, clusters=clusters, resamples=RESAMPLES, seed=seed)

    return case


def contrast_case(groups: int) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        _, unsafe, first = clustered(rng, groups, 0.7)
        _, safe, second = clustered(rng, groups, 0.2)
        columns = np.zeros((len(unsafe) + len(safe), 4))
        columns[: len(unsafe), :2], columns[len(unsafe) :, 2:] = _table(unsafe), _table(safe)
        return bootstrap_statistic(columns, gap, clusters=[*first, *second], resamples=RESAMPLES, seed=seed)

    return case


def crossed_case(rows: int, others: int, *, labels: bool) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        first, second = np.repeat(np.arange(rows), others), np.tile(np.arange(others), rows)
        level = 0.5 * rng.normal(size=rows)[first] + 0.5 * rng.normal(size=others)[second]
        level = level + rng.normal(size=len(level))
        values = (level > 0.0).astype(np.float64) if labels else 0.5 + level
        return bootstrap_statistic(
            _table(values),
            ratio,
            clusters=first.tolist(),
            second_clusters=second.tolist(),
            resamples=RESAMPLES // 2,
            seed=seed,
        )

    return case


def pairs_case(n: int, gained: float, lost: float) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        fate = rng.random(n)
        change = np.where(fate < gained, 1.0, np.where(fate > 1.0 - lost, -1.0, 0.0))
        return paired_bootstrap(np.zeros(n), change, resamples=RESAMPLES, seed=seed)

    return case


def sizes_case(groups: int, *, widened: bool) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        sizes = rng.integers(20, 200, size=groups).astype(np.float64)
        sums = sizes * rng.gamma(4.0, 0.5, size=groups)
        if widened:
            return bootstrap_statistic(np.stack([sums, sizes], axis=1), ratio, resamples=RESAMPLES, seed=seed)
        return bootstrap_ratio(sums, sizes, resamples=RESAMPLES, seed=seed)

    return case


def judge_case(n: int, validated: int, rate: float, sensitivity: float, specificity: float) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        observed = rate * sensitivity + (1 - rate) * (1 - specificity)
        tp, tn = (int(rng.binomial(validated, right)) for right in (sensitivity, specificity))
        judge = Confusion(tp=tp, fn=validated - tp, fp=validated - tn, tn=tn)
        flagged = (rng.random(n) < observed).tolist()
        return rogan_gladen_interval(flagged, judge, resamples=RESAMPLES, seed=seed)

    return case


def kappa_case(n: int) -> Case:
    def case(rng: np.random.Generator, seed: int) -> Estimate:
        truth = rng.random(n) < 0.3
        sides = [np.where(rng.random(n) < 0.1, ~truth, truth).tolist() for _ in range(2)]
        return kappa_interval(sides[0], sides[1], categories=(False, True), resamples=RESAMPLES, seed=seed)

    return case


def _kappa_truth() -> float:
    # Both raters turn a tenth of the labels; three tenths of the items are true.
    one = 0.3 * 0.9 + 0.7 * 0.1
    agree = 0.9 * 0.9 + 0.1 * 0.1
    chance = one * one + (1 - one) ** 2
    return (agree - chance) / (1 - chance)


def coverage_rows() -> Iterator[Row]:
    """Yield every row of coverage."""
    yield from enumerated_coverage()

    def labels(p: float) -> Callable[[np.random.Generator, int], Floats]:
        return lambda rng, n: (rng.random(n) < p).astype(np.float64)

    def toxic(rng: np.random.Generator, n: int) -> Floats:
        return rng.beta(0.5, 2.5, size=n)

    for interval in ("bca", "percentile"):
        cases = ((100, 0.1, labels(0.1)), (400, 0.05, labels(0.05)))
        for n, p, draw in cases:
            what = f"mean by item, {interval}: n = {n}, rate {p:g}"
            yield simulated_coverage("coverage", what, p, items_case(n, draw, interval))
        what = f"mean by item, {interval}: n = 100, skewed scores"
        yield simulated_coverage("coverage", what, 0.5 / 3.0, items_case(100, toxic, interval))
    for groups in (40, 100):
        what = f"mean by cluster: {groups} clusters, rate 0.3"
        yield simulated_coverage("coverage", what, 0.3, cluster_case(groups, 0.3))
    for groups in (40, 100):
        what = f"paired change by cluster: {groups} clusters, 0.3 to 0.15"
        yield simulated_coverage("coverage", what, -0.15, paired_cluster_case(groups))
    what = "contrast gap by cluster: 60 clusters, 0.7 and 0.2"
    yield simulated_coverage("coverage", what, 0.5, contrast_case(60))
    for shape, kind in (((30, 20), "numbers"), ((50, 40), "labels")):
        what = f"two-way: {shape[0]} x {shape[1]} crossed, {kind}"
        yield simulated_coverage("coverage", what, 0.5, crossed_case(*shape, labels=kind == "labels"))
    what = "paired change by item, plain: n = 200, 12 % gained, 5 % lost"
    yield simulated_coverage("coverage", what, 0.07, pairs_case(200, 0.12, 0.05))
    for groups in (40, 100):
        data = f"{groups} texts of unequal length"
        yield simulated_coverage("coverage", f"ratio: {data}", 2.0, sizes_case(groups, widened=True))
        plain = sizes_case(groups, widened=False)
        yield simulated_coverage("coverage", f"ratio, plain: {data}", 2.0, plain, promised=groups > 40)
    for numbers in ((300, 100, 0.2, 0.85, 0.95), (1000, 200, 0.1, 0.9, 0.95), (1000, 50, 0.1, 0.9, 0.98)):
        what = "rate corrected for the judge: n = {}, {} labels per class, rate {}, sens {}, spec {}".format(*numbers)
        _, labels_per_class, _, _, specificity = numbers
        # One false alarm among 50 labels tells little of the specificity: shown, not promised.
        enough = labels_per_class * (1 - specificity) >= 5
        yield simulated_coverage("coverage", what, numbers[2], judge_case(*numbers), promised=enough)
    yield simulated_coverage("coverage", "kappa: n = 200, two classes", _kappa_truth(), kappa_case(200))
    what = "Newcombe: 100 against 150, 0.1 and 0.2"
    yield simulated_coverage(
        "coverage",
        what,
        0.1,
        lambda rng, seed: unpaired_difference(int(rng.binomial(100, 0.1)), 100, int(rng.binomial(150, 0.2)), 150),
    )
    for groups in (5, 8, 10, 15, 20, 30, 50):
        what = f"mean by cluster: {groups} clusters, rate 0.3"
        yield simulated_coverage("few clusters", what, 0.3, cluster_case(groups, 0.3), promised=groups >= 20)
    for shape in ((8, 8), (15, 12)):
        what = f"two-way: {shape[0]} x {shape[1]} crossed, numbers"
        yield simulated_coverage("few clusters", what, 0.5, crossed_case(*shape, labels=False), promised=False)


def _alarm(what: str, rejects: Callable[[np.random.Generator, int], bool], data: str = "") -> Row:
    share = sum(rejects(rng, seed) for rng, seed in _streams(data or what)) / REPEATS
    # Two Monte Carlo errors of room: a test that uses its level up lands above it half the time.
    held = share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / REPEATS)
    return Row("false alarms", what, _percent(share), held, "5 % or less, up to chance", _error(share))


def false_alarm_rows() -> Iterator[Row]:
    """Yield how often each test of a gate rejects where nothing changed."""
    for n in (50, 100, 300, 1000):
        worst = max(mcnemar_power(n, share / 100, 0.0, two_sided=False) for share in range(1, 101))
        what = f"exact McNemar, one-sided, n = {n}, any discordant share"
        yield Row("false alarms", what, _percent(worst), worst <= 0.05, "5 % or less", "exact")

    def moves(rng: np.random.Generator, groups: int) -> tuple[Floats, Floats, list[int]]:
        # Each cluster's rate moves as a whole, up or down alike: items of a cluster do not change independently.
        _, before, clusters = clustered(rng, groups, 0.3)
        spread, moved = (1 - ICC) / ICC, np.array(clusters)
        own = rng.beta(0.3 * spread, 0.7 * spread, size=groups)[moved]
        return before, (rng.random(len(own)) < own).astype(np.float64), clusters

    def flips(groups: int) -> Callable[[np.random.Generator, int], bool]:
        def rejects(rng: np.random.Generator, seed: int) -> bool:
            before, after, clusters = moves(rng, groups)
            found = cluster_permutation(after - before, clusters, alternative="greater", resamples=999, seed=seed)
            return found < 0.05

        return rejects

    def swaps(groups: int) -> Callable[[np.random.Generator, int], bool]:
        def rejects(rng: np.random.Generator, seed: int) -> bool:
            before, after, clusters = moves(rng, groups)
            sides = _table(before), _table(after)
            return swap_test(*sides, ratio, clusters=clusters, alternative="greater", resamples=999, seed=seed) < 0.05

        return rejects

    for groups in (8, 40):
        yield _alarm(f"sign flips by cluster, one-sided, {groups} clusters", flips(groups), f"{groups} clusters")
        yield _alarm(f"swaps by cluster, one-sided, {groups} clusters", swaps(groups), f"{groups} clusters")
    wrong = "exact McNemar that takes the items of 40 clusters as independent, one-sided"
    yield dataclasses.replace(_alarm(wrong, _by_item(moves, 40), "40 clusters"), held=None, limit="the wrong test here")
    yield _alarm("Holm over six correlated metrics, exact McNemar, n = 300", _family)
    yield _alarm("signed ranks, marks 1 to 5, n = 60", _marks)
    for seeds in (3, 5):
        yield _alarm(f"paired t over {seeds} training seeds", functools.partial(_seeds, count=seeds))
    yield _alarm("Fisher, a judge's sensitivity, 100 and 100", _judge)


def _by_item(moves: Callable[..., tuple[Floats, Floats, list[int]]], groups: int) -> Callable[..., bool]:
    def rejects(rng: np.random.Generator, seed: int) -> bool:
        before, after, _ = moves(rng, groups)
        gained, lost = int((after > before).sum()), int((after < before).sum())
        return mcnemar_exact(gained, lost, alternative="greater") < 0.05

    return rejects


def _family(rng: np.random.Generator, seed: int) -> bool:
    shared, lean = rng.normal(size=(300, 1)), rng.normal(size=(300, 1))
    levels = [0.7 * shared + 0.4 * lean * side + 0.6 * rng.normal(size=(300, 6)) for side in (1, -1)]
    before, after = (level > 1.0 for level in levels)
    gained, lost = (after & ~before).sum(axis=0), (before & ~after).sum(axis=0)
    p_values = [mcnemar_exact(int(b), int(c)) for b, c in zip(gained, lost, strict=True)]
    return min(holm(p_values)) < 0.05


def _marks(rng: np.random.Generator, seed: int) -> bool:
    base = rng.integers(1, 6, size=60)
    sides = [np.clip(base + rng.integers(-1, 2, size=60), 1, 5) for _ in range(2)]
    return signed_ranks(*sides, alternative="greater").p_value < 0.05


def _seeds(rng: np.random.Generator, seed: int, *, count: int) -> bool:
    return seed_test(rng.normal(size=count), rng.normal(size=count)).p_value < 0.05


def _judge(rng: np.random.Generator, seed: int) -> bool:
    first, second = (int(rng.binomial(100, 0.85)) for _ in range(2))
    return fisher_exact(first, 100 - first, second, 100 - second) < 0.05


def power_rows() -> Iterator[Row]:
    """Yield what the minimum detectable change really detects."""
    for n, discordant in ((100, 0.05), (100, 0.3), (300, 0.1), (1000, 0.05), (1000, 0.2)):
        for two_sided in (True, False):
            change = minimum_detectable_change(n, discordant, two_sided=two_sided)
            share = max(change, discordant)
            sided = "two-sided" if two_sided else "one-sided"
            rng = np.random.Generator(np.random.PCG64(derive_seed(SEED, "audit statistics", "power", n, sided)))
            tables_drawn = rng.multinomial(
                n, [(share + change) / 2, (share - change) / 2, 1 - share], size=10 * REPEATS
            )
            test = functools.cache(
                lambda b, c, two_sided=two_sided: (
                    mcnemar_exact(b, c, alternative="two-sided" if two_sided else "greater") < 0.05
                )
            )
            found = sum(test(int(b), int(c)) for b, c, _ in tables_drawn) / len(tables_drawn)
            error = math.sqrt(found * (1 - found) / len(tables_drawn))
            what = f"n = {n}, discordant {discordant:g}, {sided}: {100 * change:.1f} points"
            held = found >= 0.8 - 3 * error
            yield Row("power", what, _percent(found), held, "80 % or more, up to chance", f"{100 * error:.1f}")
    for discordant, change in ((0.1, 0.05), (0.2, 0.1), (0.3, 0.1)):
        n = required_pairs(discordant, change)
        found = mcnemar_power(n, discordant, change)
        what = f"n = {n} by the normal formula, discordant {discordant:g}: {100 * change:.1f} points"
        yield Row("power", what, _percent(found), None, "80 % by that formula", "exact")


def cost_rows() -> Iterator[Row]:
    """Yield CPU seconds and peak memory of the large cases."""
    rng = np.random.Generator(np.random.PCG64(derive_seed(SEED, "audit statistics", "cost")))
    n, many = 10_000, 100_000
    scores, before = rng.random(n), (rng.random(many) < 0.1).astype(np.float64)
    after = np.where(rng.random(many) < 0.02, 1.0 - before, before)
    alone, fives, many_fives = list(range(n)), [i // 5 for i in range(n)], [i // 5 for i in range(many)]
    four = np.stack([scores, np.ones(n), scores[::-1] ** 2, np.ones(n)], axis=1)
    words = [f"w{i}" for i in range(2000)]
    pick = random.Random(SEED)
    texts = [f"please tell me how to {' '.join(pick.choices(words, k=3))} in my house" for _ in range(5000)]
    columns, sides = _table(scores), (_table(before), _table(after))
    crossed = {"clusters": [i % 100 for i in range(n)], "second_clusters": [i // 100 for i in range(n)]}
    cases: tuple[tuple[str, float, Callable[[], object]], ...] = (
        ("mean, 10,000 scores", 2.0, lambda: bootstrap_mean(scores)),
        ("rate, 10,000 clusters that all differ", 2.0, lambda: bootstrap_statistic(columns, ratio, clusters=alone)),
        ("rate, 10,000 scores in 2,000 clusters", 2.0, lambda: bootstrap_statistic(columns, ratio, clusters=fives)),
        ("paired gap, 10,000 clusters", 2.0, lambda: paired_statistic(four, four**2, gap, clusters=alone)),
        ("two-way, 100 x 100", 2.0, lambda: bootstrap_statistic(columns, ratio, **crossed)),
        ("rate, 100,000 labels", 0.5, lambda: bootstrap_statistic(sides[0], ratio)),
        (
            "paired change, 100,000 labels in 20,000 clusters",
            0.5,
            lambda: paired_statistic(*sides, ratio, clusters=many_fives),
        ),
        ("swaps, 100,000 labels in 20,000 clusters", 0.5, lambda: swap_test(*sides, ratio, clusters=many_fives)),
        ("signed ranks, 100,000 pairs", 0.5, lambda: signed_ranks(sides[0][:, 0], sides[1][:, 0])),
        ("minimum detectable change, 10,000 pairs", 0.2, lambda: minimum_detectable_change(n, 0.1)),
        ("near-duplicates of 5,000 requests", 5.0, lambda: near_duplicate_clusters(texts)),
    )
    for what, limit, call in cases:
        start = time.process_time()
        call()
        seconds = time.process_time() - start
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        yield Row("cost", what, f"{seconds:.2f} s, {peak:.0f} MB", seconds < limit, f"below {limit:g} s")


def main(words: Sequence[str] | None = None) -> int:
    """Print the tables; return 1 when a promise is missed or the budget of CPU time exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page of the documentation")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reference" / "statistics.md")
    given = parser.parse_args(words)
    start, rows = time.process_time(), []
    with threads_for(1):
        for part in (coverage_rows, false_alarm_rows, power_rows, cost_rows):
            for row in part():
                rows.append(row)
                print(f"{row.what}: {row.figure}", file=sys.stderr, flush=True)
    seconds = time.process_time() - start
    print(tables(rows))
    missed = [row.what for row in rows if row.held is False]
    if given.write:
        document = {"schema": 1, "seed": SEED, "repeats": REPEATS, "resamples": RESAMPLES, "cpu_seconds": seconds}
        document["rows"] = [dataclasses.asdict(row) for row in rows]
        given.page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        given.page.write_text(page(rows, seed=SEED, cpu_seconds=seconds), encoding="utf-8")
    print(f"missed: {'; '.join(missed) or 'nothing'}; {seconds:.0f} s of CPU (budget {CPU_BUDGET_S:.0f})")
    return int(bool(missed) or seconds > CPU_BUDGET_S)


if __name__ == "__main__":
    sys.exit(main())
