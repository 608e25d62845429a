# SPDX-License-Identifier: Apache-2.0
"""Train the toxicity scorer: `python -m training.toxicity_classifier --data ../shared/data`.

Trained on the tweets of Davidson et al. (MIT) with the share of raters who called them hateful or offensive, on the
templates of Dixon et al. (Apache-2.0), in which every identity term stands in as many insults as compliments, on
short insults and their harmless counterparts written for the project, and on open text under MIT, Apache-2.0 and
CC-BY terms that nobody would call toxic. Nothing of these texts is written: the
output holds weights of hash columns. HateCheck, the Wikipedia comments of Dixon et al. and the Perspective scores
of DecodingTrust take no part; settings were chosen on a fifth of the tweets and on held-out identity terms.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from keelwright.core.seeds import derive_seed
from keelwright.judges.linear_text import GramConfig, LinearText, grams, pack
from keelwright.judges.toxicity import prepare, toxicity
from training import logistic
from training.refusal_rows import filler, instruction_pairs, read_rows

CONFIG = GramConfig(words=(1, 2), characters=(3, 4, 5), bits=18)
PENALTY = 3e-5
VERSION = 1
SHARES = {"tweets": 0.5, "templates": 0.1, "remarks": 0.2, "open": 0.2}
"""How much each source weighs; toxic rows weigh as much as the others, and hateful tweets as much as offensive ones."""
REMARKS = 120
"""Texts that are made of each hand-written remark."""
TEMPLATES_USED = 12_000


@dataclass(frozen=True, slots=True)
class Row:
    """One text to train on."""

    text: str
    toxic: float
    """Share of the raters who called it hateful or offensive, or 0 or 1."""
    source: str
    held_out: bool
    hate: bool = False
    """A tweet that most raters called hateful."""


def rows(data: Path) -> list[Row]:
    """Return all rows; the held-out ones are never of a tweet, an identity term or a text that the others have."""
    return [*_tweets(data), *_templates(data), *_remarks(data), *_open(data)]


def train(kept: list[Row]) -> LinearText:
    """Return the model: logistic regression on soft labels."""
    toxic = np.array([row.toxic for row in kept])
    weights = np.zeros(len(kept))
    hate = np.array([row.hate for row in kept])
    for source, share in SHARES.items():
        members = np.array([row.source == source for row in kept])
        for part, portion in ((toxic < 0.5, 0.5), ((toxic >= 0.5) & ~hate, 0.25), (hate, 0.25)):
            weights[members & part] = share * portion / max(1, int((members & part).sum()))
    table = logistic.as_matrix(grams([prepare(row.text) for row in kept], CONFIG), 1 << CONFIG.bits)
    targets = np.stack([toxic, 1 - toxic], axis=1)
    # Of two classes only the difference counts: half of the columns would say the same.
    coefficients, bias = logistic.fit(table, targets, penalty=PENALTY, weights=weights)
    return LinearText(
        CONFIG, (coefficients[:1] - coefficients[1:]).astype(np.float32), bias[:1] - bias[1:], {}, VERSION
    )


def calibrated(model: LinearText, held_out: list[Row]) -> LinearText:
    """Return the model with the factor on its logits that fits held-out tweets, both sides weighing the same."""
    tweets = [row for row in held_out if row.source == "tweets"]
    logits = model.logits([prepare(row.text) for row in tweets])[:, 0]
    toxic = np.array([row.toxic >= 0.5 for row in tweets])
    draw = np.random.default_rng(0)
    few = min(int(toxic.sum()), int((~toxic).sum()))
    same = np.concatenate([draw.choice(np.flatnonzero(side), few, replace=False) for side in (toxic, ~toxic)])
    factor = logistic.temperature(np.stack([-logits[same] / 2, logits[same] / 2], axis=1), toxic[same].astype(int))
    return LinearText(model.config, (factor * model.weights).astype(np.float32), factor * model.bias, {}, model.version)


def figures(model: LinearText, held_out: list[Row]) -> dict[str, float]:
    """Return the figures on held-out rows."""
    said = toxicity([row.text for row in held_out], model=model)
    toxic = np.array([row.toxic >= 0.5 for row in held_out])
    found: dict[str, float] = {}
    for source in SHARES:
        members = np.array([row.source == source for row in held_out])
        if not members.any():
            continue
        found[f"{source}_rows"] = int(members.sum())
        found[f"{source}_specificity"] = float((said[members & ~toxic] < 0.5).mean())
        if source != "open":
            found[f"{source}_sensitivity"] = float((said[members & toxic] >= 0.5).mean())
            found[f"{source}_auc"] = auc(said[members], toxic[members])
    return found


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return the chance that a true case scores higher than another; ties count one half."""
    values, place = np.unique(scores, return_inverse=True)
    below = np.cumsum(np.bincount(place, ~truth, len(values)))
    ties = np.bincount(place, ~truth, len(values))
    return float((below[place[truth]] - ties[place[truth]] / 2).mean() / (~truth).sum())


def _tweets(data: Path) -> Iterator[Row]:
    with (data / "davidson-hate" / "labeled_data.csv").open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            share = 1 - int(row["neither"]) / int(row["count"])
            yield Row(row["tweet"], share, "tweets", _held_out("tweet", number), row["class"] == "0")


def _templates(data: Path) -> Iterator[Row]:
    with (data / "toxicity-bias-madlibs" / "bias_madlibs_77k.csv").open(encoding="utf-8", newline="") as stream:
        for number, row in enumerate(csv.DictReader(stream)):
            held_out = _held_out("term", _identity(row["Text"]))
            # Names fill most templates over and over: one in so many says it all.
            if row["Template"] != "name_adj" or derive_seed(0, "template", number) % 72_000 < TEMPLATES_USED:
                yield Row(row["Text"], float(row["Label"] == "BAD"), "templates", held_out)


def _remarks(data: Path) -> Iterator[Row]:
    """Yield short remarks written for the project; the identity terms in them are those of the templates.

    None is held out: forty templates are too few to stand for each other's words.
    """
    with (data / "toxicity-bias-madlibs" / "bias_madlibs_77k.csv").open(encoding="utf-8", newline="") as stream:
        terms = sorted({_identity(row["Text"]) for row in csv.DictReader(stream) if row["Template"] == "am_hate_adj"})
    for line in Path(__file__).with_name("toxicity_rows.jsonl").read_text(encoding="utf-8").splitlines():
        remark = json.loads(line)
        for number in range(REMARKS):
            draw = random.Random(derive_seed(0, remark["family"], number))
            term = draw.choice(terms)
            them = draw.choice([f"{term} people", f"{term}s", f"the {term}s", term])
            text = filler(draw, {"one": term, "them": them})(remark["text"])
            yield Row(text, float(remark["toxic"]), "remarks", False)


def _open(data: Path) -> Iterator[Row]:
    for number, (prompt, answer) in enumerate(instruction_pairs(data)):
        for text in (prompt, answer):
            yield Row(text, 0.0, "open", _held_out("open", number))
    for row in read_rows("topics"):
        for text in row.get("answer", ()):
            yield Row(text, 0.0, "open", _held_out("topic", row["family"]))


def _identity(text: str) -> str:
    """Return the term that a template is about: the last word, or what stands between `Being` and `is`."""
    lower = text.lower()
    return lower.removeprefix("being ").split(" is ")[0] if lower.startswith("being ") else lower.split()[-1]


def _held_out(*names: str | int) -> bool:
    return derive_seed(0, "toxicity", *names) % 5 == 0


def main() -> None:
    """Train, write the weights, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/keelwright/judges/weights/toxicity.safetensors"))
    chosen = parser.parse_args()
    known = rows(chosen.data)
    held_out = [row for row in known if row.held_out]
    model = calibrated(train([row for row in known if not row.held_out]), held_out)
    chosen.out.write_bytes(pack(model))
    found = {name: round(one, 4) for name, one in figures(model, held_out).items()}
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
