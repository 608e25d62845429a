# SPDX-License-Identifier: Apache-2.0
"""Near-duplicate texts: clusters within a set, and what two sets share.

Two texts are near-duplicates when the Jaccard similarity of their sets of tokens reaches a threshold; a cluster is what
such pairs connect. All answers are exact: no pair that reaches the threshold is missed.

Equation: `J(A, B) = |A n B| / |A u B|`. `J >= t` needs the two to share a token among the
`|A| - ceil(t |A|) + 1` rarest of A and as many of B, so that only texts that meet in an index of rare tokens are
compared.

Tokens are the words of the normalised text; ideographs and kana, which are written without spaces, are one token each.

Limits: tokens without their order or number. A text without a word is the near-duplicate of the same text only.

Source:
    Jaccard 1912; Bayardo, Ma and Srikant 2007 (search by rare tokens).
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from keelwright.core.config import require_in_range

JACCARD = 0.6
"""From this similarity on two texts are near-duplicates."""

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_SLACK = 1e-9
_FEW_MET = 64
"""Up to so many meetings, pairs are compared one by one."""


@dataclass(frozen=True, slots=True)
class SharedPair:
    """Two texts of two sets that are the same, or nearly."""

    first: int
    """Place in the first set."""
    second: int
    """Place in the second set."""
    similarity: float
    """Jaccard similarity of their tokens, 1 for the same text."""


def normalised(text: str) -> str:
    """Return the text in one Unicode form, caseless, with straight apostrophes and single spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("\u2019", "'").replace("\u2018", "'")
    return " ".join(plain.split())


def tokens_of(text: str) -> frozenset[str]:
    """Return the set of tokens that near-duplicates are told by."""
    return frozenset(_TOKEN.findall(normalised(text)))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Return the share of all tokens that both have; 0 where neither has any."""
    together = len(first | second)
    return len(first & second) / together if together else 0.0


def near_duplicate_clusters(texts: Sequence[str], *, threshold: float = JACCARD) -> list[int]:
    """Return each text's cluster of near-duplicates.

    Args:
        texts: The texts of one set.
        threshold: Jaccard similarity of tokens from which on two texts belong together, above 0.

    Returns:
        Cluster numbers from 0, in order of first appearance.

    Raises:
        ConfigError: The threshold is not in (0, 1].
    """
    require_in_range("threshold", threshold, low=0.0, high=1.0, low_open=True)
    keys = _keys(texts)
    places: dict[frozenset[str] | str, int] = {}
    for key in keys:
        places.setdefault(key, len(places))
    sets = [key for key in places if isinstance(key, frozenset)]
    numbers = np.array([number for key, number in places.items() if isinstance(key, frozenset)], dtype=np.intp)
    labels = np.arange(len(places))
    for one, others, _ in _close(sets, sets, threshold):
        for label in np.unique(labels[numbers[others]]):
            labels[labels == label] = labels[numbers[one]]
    seen: dict[int, int] = {}
    return [seen.setdefault(int(labels[places[key]]), len(seen)) for key in keys]


def same_texts(first: Sequence[str], second: Sequence[str]) -> list[SharedPair]:
    """Return the pairs of texts of two sets that are equal once normalised, by place in the first set."""
    places = defaultdict(list)
    for place, text in enumerate(second):
        places[normalised(text)].append(place)
    return [
        SharedPair(place, other, 1.0) for place, text in enumerate(first) for other in places.get(normalised(text), ())
    ]


def near_texts(first: Sequence[str], second: Sequence[str], *, threshold: float = JACCARD) -> list[SharedPair]:
    """Return the pairs of texts of two sets whose tokens reach the threshold, equal texts included.

    Args:
        first, second: The texts of either set.
        threshold: Jaccard similarity of tokens, above 0.

    Returns:
        The pairs by place in the first set, then in the second.

    Raises:
        ConfigError: The threshold is not in (0, 1].
    """
    require_in_range("threshold", threshold, low=0.0, high=1.0, low_open=True)
    of_first, of_second = _places(first), _places(second)
    shared = [
        SharedPair(a, b, 1.0)
        for key, places in of_first.items()
        if isinstance(key, str)
        for a in places
        for b in of_second.get(key, ())
    ]
    left = [key for key in of_first if isinstance(key, frozenset)]
    right = [key for key in of_second if isinstance(key, frozenset)]
    for one, others, similarities in _close(left, right, threshold):
        for other, similarity in zip(others, similarities, strict=True):
            pairs = [(a, b) for a in of_first[left[one]] for b in of_second[right[other]]]
            shared += [SharedPair(a, b, float(similarity)) for a, b in pairs]
    return sorted(shared, key=lambda pair: (pair.first, pair.second))


def _keys(texts: Sequence[str]) -> list[frozenset[str] | str]:
    """Return each text's set of tokens, or the normalised text itself where it has none."""
    return [tokens_of(text) or normalised(text) for text in texts]


def _places(texts: Sequence[str]) -> dict[frozenset[str] | str, list[int]]:
    found: dict[frozenset[str] | str, list[int]] = defaultdict(list)
    for place, key in enumerate(_keys(texts)):
        found[key].append(place)
    return found


def _close(
    left: Sequence[frozenset[str]], right: Sequence[frozenset[str]], threshold: float
) -> Iterator[tuple[int, NDArray[np.intp], NDArray[np.float64]]]:
    """Yield each set of `left` that has near-duplicates in `right`, their places, and the similarities.

    Where both are one list, only places before the set's own are given, so that each pair comes once.
    """
    alone = left is right
    spread = Counter(token for key in (left if alone else [*left, *right]) for token in key)
    rare = {token: rank for rank, token in enumerate(sorted(spread, key=lambda token: (spread[token], token)))}
    sizes = np.array([len(key) for key in right], dtype=np.float64)
    holders = _holders(enumerate(right))
    meeting = _holders((place, _prefix(key, rare, threshold)) for place, key in enumerate(right))
    for one, key in enumerate(left):
        met = [meeting[token] for token in _prefix(key, rare, threshold) if token in meeting]
        # A set of the one list meets itself under each of its tokens.
        if sum(map(len, met)) <= (len(met) if alone else 0):
            continue
        if sum(map(len, met)) <= _FEW_MET:
            places = np.unique(np.concatenate(met))
            common = np.array([len(key & right[place]) for place in places], dtype=np.float64)
        else:
            # Counting how often each place occurs among the holders of all tokens costs no set operation per pair.
            counts = np.bincount(np.concatenate([holders[token] for token in key if token in holders]))
            places = np.flatnonzero(counts)
            common = counts[places].astype(np.float64)
        similarities = common / (len(key) + sizes[places] - common)
        kept = similarities >= threshold - _SLACK
        if alone:
            kept &= places < one
        if kept.any():
            yield one, places[kept], similarities[kept]


def _holders(tokens: Iterable[tuple[int, Iterable[str]]]) -> dict[str, NDArray[np.intp]]:
    """Return, per token, the places that hold it, in ascending order."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, held in tokens:
        for token in held:
            found[token].append(place)
    return {token: np.array(places, dtype=np.intp) for token, places in found.items()}


def _prefix(key: frozenset[str], rare: dict[str, int], threshold: float) -> list[str]:
    """Return the rarest tokens, of which a near-duplicate must hold one."""
    kept = len(key) - math.ceil(threshold * len(key) - _SLACK) + 1
    return sorted(key, key=rare.__getitem__)[:kept]
