# SPDX-License-Identifier: Apache-2.0
"""Near-duplicates against the comparison of all pairs, and what counts as the same text."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from keelwright.core.errors import ConfigError
from keelwright.ops.clusters import jaccard, near_duplicate_clusters, near_texts, normalised, same_texts, tokens_of


def _texts(seed: int, n: int, words: int) -> list[str]:
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(words)]
    return [" ".join(rng.choices(vocabulary, k=rng.randint(0, 9))) for _ in range(n)]


def _all_pairs(texts: list[str], threshold: float) -> list[int]:
    tokens, label = [tokens_of(text) for text in texts], list(range(len(texts)))
    for a, b in itertools.combinations(range(len(texts)), 2):
        near = jaccard(tokens[a], tokens[b]) >= threshold or normalised(texts[a]) == normalised(texts[b])
        if near:
            label = [label[a] if one == label[b] else one for one in label]
    seen: dict[int, int] = {}
    return [seen.setdefault(one, len(seen)) for one in label]


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6, 2 / 3, 0.75, 1.0])
@pytest.mark.parametrize("words", [12, 40])
def test_clusters_are_those_of_all_pairs(words: int, threshold: float) -> None:
    for seed in range(2):
        # 180 texts of 12 words meet often enough for the counted path, 40 words for the other.
        texts = _texts(seed, 180, words)
        assert near_duplicate_clusters(texts, threshold=threshold) == _all_pairs(texts, threshold)


@pytest.mark.parametrize("words", [12, 40])
def test_near_pairs_of_two_sets_are_those_of_all_pairs(words: int) -> None:
    first, second = _texts(1, 60, words), _texts(2, 150, words)
    found = near_texts(first, second, threshold=0.6)
    expected = {}
    for (a, one), (b, other) in itertools.product(enumerate(first), enumerate(second)):
        likeness = jaccard(tokens_of(one), tokens_of(other))
        if likeness >= 0.6 or normalised(one) == normalised(other):
            expected[a, b] = max(likeness, float(normalised(one) == normalised(other)))
    assert {(pair.first, pair.second): pair.similarity for pair in found} == pytest.approx(expected)
    assert [(pair.first, pair.second) for pair in found] == sorted(expected)


def test_a_chain_of_neighbours_is_one_cluster() -> None:
    chain = ["a b c d e", "b c d e f", "c d e f g", "x y z"]
    assert jaccard(tokens_of(chain[0]), tokens_of(chain[2])) < 0.6
    assert near_duplicate_clusters(chain) == [0, 0, 0, 1]


def test_clusters_do_not_depend_on_order() -> None:
    texts = _texts(3, 120, 15)
    order = list(range(120))
    random.Random(0).shuffle(order)
    one, other = near_duplicate_clusters(texts), near_duplicate_clusters([texts[i] for i in order])
    together = {(a, b) for a, b in itertools.combinations(range(120), 2) if one[a] == one[b]}
    assert together == {
        (min(order[a], order[b]), max(order[a], order[b]))
        for a, b in itertools.combinations(range(120), 2)
        if other[a] == other[b]
    }


def test_case_space_and_curly_apostrophes_do_not_tell_texts_apart() -> None:
    assert normalised("  Don\u2019t\n STOP ") == "don't stop"
    pairs = same_texts(["Don\u2019t stop", "go"], ["go!", "don't  STOP", "Go"])
    assert [(pair.first, pair.second) for pair in pairs] == [(0, 1), (1, 2)]


def test_texts_without_words_are_near_only_to_the_same() -> None:
    assert near_duplicate_clusters(["?", "!", "?", "", ""]) == [0, 1, 0, 2, 2]
    assert [(pair.first, pair.second) for pair in near_texts(["?", ""], ["!", "?"])] == [(0, 1)]


def test_ideographs_are_tokens_of_their_own() -> None:
    assert tokens_of("今日は晴れ cat") == {"今", "日", "は", "晴", "れ", "cat"}


def test_a_threshold_outside_its_range_is_refused() -> None:
    for wrong in (0.0, 1.1):
        with pytest.raises(ConfigError, match="'threshold' is out of range"):
            near_duplicate_clusters(["a"], threshold=wrong)
        with pytest.raises(ConfigError, match="'threshold' is out of range"):
            near_texts(["a"], ["a"], threshold=wrong)


def test_five_thousand_texts_take_seconds() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(2000)]
    texts = [f"please tell me how to {' '.join(rng.choices(vocabulary, k=3))} in my house" for _ in range(5000)]
    start = time.process_time()
    assert max(near_duplicate_clusters(texts)) < 5000
    # All pairs in Python take a minute; the bound only tells the index from them.
    assert time.process_time() - start < 15.0
