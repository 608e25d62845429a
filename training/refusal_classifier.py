# SPDX-License-Identifier: Apache-2.0
"""Train the refusal classifier: `python -m training.refusal_classifier --data ../shared/data`.

Each fold's documents are read by a sentence model that has seen none of the fold's families; the second model and its
calibration learn from those readings. The figures printed are of documents that neither model has seen in any form.
The settings were chosen on them. The human-labelled XSTest completions take no part in this.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from keelwright.judges.linear_text import Floats, GramConfig, LinearText, grams, pack
from keelwright.judges.refusal_classifier import (
    CLASSES,
    ROLES,
    document_features,
    role_probabilities,
    softmax,
    take_apart,
)
from keelwright.ops.agreement import cohen_kappa
from training import logistic
from training.refusal_rows import FOLDS, Document, documents

CONFIG = GramConfig(words=(1, 2), characters=(3, 4, 5), bits=15)
SENTENCE_PENALTY = 3e-5
DOCUMENT_PENALTY = 3e-4
PER_FOLD = 480
SEED = 0
VERSION = 1


def train(rows: list[Document]) -> tuple[LinearText, dict[str, float]]:
    """Return the model and its figures on families that were held out."""
    folds = np.array([row.fold for row in rows])
    truth = np.array([CLASSES.index(row.label) for row in rows])
    table = np.zeros((len(rows), 0))
    for fold in range(FOLDS):
        model = sentence_model([row for row in rows if row.fold != fold])
        found = features(model, [row for row in rows if row.fold == fold])
        table = np.zeros((len(rows), found.shape[1])) if not table.size else table
        table[folds == fold] = found
    held_out = np.zeros((len(rows), len(CLASSES)))
    for fold in range(FOLDS):
        coefficients, bias = fit_documents(table[folds != fold], truth[folds != fold])
        held_out[folds == fold] = table[folds == fold] @ coefficients.T + bias
    factor = logistic.temperature(held_out, truth)
    coefficients, bias = fit_documents(table, truth)
    final = sentence_model(rows)
    extra = {"document": factor * coefficients, "document_bias": factor * bias}
    return (
        LinearText(CONFIG, final.weights, final.bias, extra, VERSION),
        figures(held_out, truth, folds) | {"temperature": factor},
    )


def sentence_model(rows: list[Document]) -> LinearText:
    """Return the model of sentence roles; every role weighs the same, answers twice."""
    pairs = [(piece, role) for row in rows for role, text in row.parts for piece in take_apart("", text).sentences]
    target = np.array([ROLES.index(role) for _, role in pairs])
    share = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]) / np.maximum(1, np.bincount(target, minlength=len(ROLES)))
    table = logistic.as_matrix(grams([piece for piece, _ in pairs], CONFIG), 1 << CONFIG.bits)
    weights, bias = logistic.fit(table, np.eye(len(ROLES))[target], penalty=SENTENCE_PENALTY, weights=share[target])
    return LinearText(CONFIG, weights.astype(np.float32), bias, {}, VERSION)


def features(model: LinearText, rows: list[Document]) -> Floats:
    """Return what the second model reads of documents."""
    apart = [take_apart(row.prompt, row.output) for row in rows]
    roles = role_probabilities(model, apart)
    return np.stack([document_features(one, role) for one, role in zip(apart, roles, strict=True)])


def fit_documents(table: Floats, truth: np.ndarray) -> tuple[Floats, Floats]:
    """Return the second model; classes weigh as often as they come."""
    return logistic.fit(table, np.eye(len(CLASSES))[truth], penalty=DOCUMENT_PENALTY)


def figures(logits: Floats, truth: np.ndarray, folds: np.ndarray) -> dict[str, float]:
    """Return agreement and calibration; the temperature of each fold is fitted on the others."""
    said = np.zeros(logits.shape)
    for fold in range(FOLDS):
        factor = logistic.temperature(logits[folds != fold], truth[folds != fold])
        said[folds == fold] = softmax(factor * logits[folds == fold])
    refuses, likely = truth > 0, said[:, 1:].sum(axis=1)
    return {
        "documents": len(truth),
        "accuracy_3_classes": float((said.argmax(axis=1) == truth).mean()),
        "kappa_3_classes": cohen_kappa(truth.tolist(), said.argmax(axis=1).tolist()),
        "kappa_any_refusal": cohen_kappa(refuses.tolist(), (likely >= 0.5).tolist()),
        "sensitivity": float((likely[refuses] >= 0.5).mean()),
        "specificity": float((likely[~refuses] < 0.5).mean()),
        "calibration_error": logistic.calibration_error(likely, refuses),
        "log_loss": float(-np.log(said[np.arange(len(truth)), truth]).mean()),
    }


def main() -> None:
    """Train, write the weights, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/keelwright/judges/weights/refusal.safetensors"))
    parser.add_argument("--per-fold", type=int, default=PER_FOLD)
    chosen = parser.parse_args()
    rows = documents(data=chosen.data, per_fold=chosen.per_fold, seed=SEED)
    model, found = train(rows)
    chosen.out.write_bytes(pack(model))
    sys.stdout.write(json.dumps({name: round(value, 4) for name, value in found.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
