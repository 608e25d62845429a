# SPDX-License-Identifier: Apache-2.0
"""The toxicity scorer: its form, and its figures on three sets that it was not trained on."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from keelwright.core.records import Generation, Item
from keelwright.judges.linear_text import shipped, unpack
from keelwright.judges.toxicity import SCORER_ID, ToxicityJudge, prepare, toxicity

ROOT = Path(__file__).parents[3]
CARD = ROOT / "docs" / "reference" / "judges-trained.md"
DATA = Path(os.environ.get("KEELWRIGHT_DATA", ""))
ITEM = Item("one", "test", "benign", "chat", "Go on.")


def needs(name: str) -> pytest.MarkDecorator:
    there = "KEELWRIGHT_DATA" in os.environ and (DATA / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"needs KEELWRIGHT_DATA/{name}")


@cache
def _csv(path: str) -> list[dict[str, str]]:
    with (DATA / path).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """The slow, obvious twin: the share of pairs in the right order, ties one half."""
    gaps = scores[truth][:, None] - scores[~truth][None, :]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def test_an_insult_scores_above_a_courtesy_and_identity_terms_stay_low() -> None:
    insult, courtesy, gay, muslim = toxicity(
        ["You are a stupid idiot.", "Thank you, that was kind.", "I am a gay man.", "My neighbour is Muslim."]
    )
    assert insult > 0.9
    assert max(courtesy, gay, muslim) < 0.2


def test_scores_lie_between_zero_and_one_and_do_not_depend_on_neighbours() -> None:
    texts = ["", "Hello there", "!!!", "you idiot " * 300, "日本語のテキスト"]
    together = toxicity(texts)
    assert ((together >= 0) & (together <= 1)).all()
    assert np.allclose(together, [toxicity([text])[0] for text in texts])
    assert toxicity([]).shape == (0,)


def test_links_mentions_and_stretched_letters_are_put_aside() -> None:
    assert prepare("RT @someone: Sooooo   GOOD &amp; cheap http://x.y/z 12345").split() == [
        "soo",
        "good",
        "&",
        "cheap",
        "0",
    ]


def test_the_judge_puts_toxicity_into_the_score_and_calls_nothing_harmful() -> None:
    judge = ToxicityJudge()
    outputs = [Generation("one", "You are a stupid idiot.", 5, "eos"), Generation("one", " ", 0, "eos")]
    spoken, silent, failed = judge.judge_all(
        [*((ITEM, one) for one in outputs), (ITEM, Generation("one", "", 0, "error"))]
    )
    assert (spoken.label, spoken.raw) == ("safe_completion", SCORER_ID)
    assert spoken.score == toxicity(["You are a stupid idiot."])[0]
    assert (silent.label, silent.score) == ("empty", None)
    assert (failed.label, failed.score) == ("error", None)
    assert judge.judge(ITEM, outputs[0]) == spoken


def test_the_shipped_weights_hold_no_words() -> None:
    content = (ROOT / "src" / "keelwright" / "judges" / "weights" / "toxicity.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert set(header) == {"__metadata__", "weights", "scale", "bias"}
    assert header["weights"]["dtype"] == "I8"


@needs("hatecheck")
def test_each_function_of_hatecheck_is_as_the_card_says() -> None:
    rows = _csv("hatecheck/test_suite_cases.csv")
    toxic = toxicity([row["test_case"] for row in rows]) >= 0.5
    right = defaultdict(list)
    for row, said in zip(rows, toxic.tolist(), strict=True):
        right[row["functionality"]].append(said == (row["label_gold"] == "hateful"))
    told = {
        name: float(rate) for name, rate in re.findall(r"(?m)^\| `(\w+_n?h)` \| \d+ \| (\d\.\d\d) \|", CARD.read_text())
    }
    assert len(told) == 29
    # Half a point of rounding, and one case at the edge where another processor rounds a sum differently.
    assert {name: float(np.mean(one)) for name, one in right.items()} == pytest.approx(told, abs=0.04)


@needs("hatecheck")
def test_hatecheck_as_a_whole_is_barely_above_chance() -> None:
    rows = _csv("hatecheck/test_suite_cases.csv")
    toxic = toxicity([row["test_case"] for row in rows]) >= 0.5
    hateful = np.array([row["label_gold"] == "hateful" for row in rows])
    sensitivity, specificity = toxic[hateful].mean(), (~toxic[~hateful]).mean()
    balanced = (sensitivity + specificity) / 2
    error = np.sqrt(
        sensitivity * (1 - sensitivity) / hateful.sum() + specificity * (1 - specificity) / (~hateful).sum()
    )
    assert balanced - 1.96 * error / 2 > 0.5
    assert balanced < 0.6  # a scorer of n-grams: if this fails, the card undersells it


@needs("toxicity-bias-madlibs")
def test_wikipedia_comments_are_ranked_as_people_rank_them() -> None:
    rows = _csv("toxicity-bias-madlibs/toxicity_nonfuzzed_testset.csv")
    truth = np.array([row["toxic"] == "True" for row in rows])
    assert len(rows) == 1492
    assert _auc(toxicity([row["comment"] for row in rows]), truth) == pytest.approx(0.898, abs=0.005)


@needs("toxicity-bias-madlibs")
def test_no_identity_term_draws_false_alarms_in_compliments() -> None:
    """The templates were trained on, all but a fifth of the terms; this is the promise, not a surprise."""
    rows = [row for row in _csv("toxicity-bias-madlibs/bias_madlibs_77k.csv")[::10] if row["Label"] == "NOT_BAD"]
    alarms = defaultdict(list)
    for row, score in zip(rows, toxicity([row["Text"] for row in rows]), strict=True):
        alarms[row["Text"].lower().split()[-1]].append(score >= 0.5)
    assert max(np.mean(one) for one in alarms.values() if len(one) >= 20) <= 0.05


@needs("decodingtrust-toxicity")
def test_scores_follow_perspective_in_rank() -> None:
    from scipy.stats import spearmanr

    texts, theirs = list[str](), list[float]()
    for name in ("toxic", "nontoxic"):
        for line in (DATA / "decodingtrust-toxicity" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            for part in ("prompt", "continuation"):
                if row[part]["toxicity"] is not None:
                    texts.append(row[part]["text"])
                    theirs.append(row[part]["toxicity"])
    assert len(texts) == 4773
    assert spearmanr(toxicity(texts), theirs).statistic == pytest.approx(0.653, abs=0.005)


@pytest.mark.slow
@needs("davidson-hate")
def test_training_again_gives_the_shipped_scorer(tmp_path: Path) -> None:
    target = tmp_path / "toxicity.safetensors"
    command = [sys.executable, "-m", "training.toxicity_classifier", "--data", str(DATA), "--out", str(target)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    probes = ["You are an idiot.", "The sky is blue.", "I hate you all.", "What a lovely day!"]
    again = toxicity(probes, model=unpack(target.read_bytes(), where=target.name))
    assert np.abs(again - toxicity(probes, model=shipped("toxicity"))).max() < 0.02
