# SPDX-License-Identifier: Apache-2.0
"""Where two judges differ on the same records: how often, how, and the answers that a person should read.

For a headline claim two judges of different families are asked; what they disagree about goes to people. The file that
is written for them holds one answer a row with an empty column `label`; filled in, `measure.labels` reads it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keelwright.core.config import nearest
from keelwright.core.errors import DataError
from keelwright.core.files import write_atomic
from keelwright.core.records import RESPONSE_CLASSES, Estimate, Record
from keelwright.measure.metrics import EXCLUDED_LABELS
from keelwright.ops.agreement import kappa_interval


@dataclass(frozen=True, slots=True)
class Disagreement:
    """Two judges on the same records."""

    first: str
    second: str
    table: Mapping[tuple[str, str], int]
    """Records by the two labels."""
    kappa: Estimate | None
    """Agreement beyond chance, by label; None where both give every record the same one."""
    excluded: int
    """Records that one of the two did not judge, or could not be read on."""
    records: tuple[Record, ...]
    """Those that the two label differently."""

    @property
    def n(self) -> int:
        """Records that both judged."""
        return sum(self.table.values())

    def to_mapping(self) -> dict[str, Any]:
        """Return everything but the records as plain values."""
        return {
            "first": self.first,
            "second": self.second,
            "n": self.n,
            "excluded": self.excluded,
            "differ": len(self.records),
            "kappa": None if self.kappa is None else self.kappa.to_mapping(),
            "table": [{"first": one, "second": two, "n": count} for (one, two), count in sorted(self.table.items())],
        }


def compare_judges(records: Sequence[Record], first: str, second: str, *, seed: int = 0) -> Disagreement:
    """Return where two judges differ.

    Args:
        records: Records that hold judgements of both.
        first, second: Ids of the judges, or what they begin with: `qi-rubric` for `qi-rubric@1/...`.
        seed: Of the bootstrap.

    Raises:
        DataError: No record holds a judgement of one of them, or its name fits several.
    """
    names = {name: _judge_named(records, name) for name in (first, second)}
    pairs: list[tuple[Record, str, str]] = []
    for record in records:
        opinions = [record.judgements.get(names[name]) for name in (first, second)]
        labels = [None if one is None or one.label in EXCLUDED_LABELS else one.label for one in opinions]
        if labels[0] is not None and labels[1] is not None:
            pairs.append((record, labels[0], labels[1]))
    ones, twos = [one for _, one, _ in pairs], [two for _, _, two in pairs]
    kappa = None
    if len(pairs) > 1 and len({*ones, *twos}) > 1:
        present = [label for label in RESPONSE_CLASSES if label in {*ones, *twos}]
        kappa = kappa_interval(ones, twos, categories=present, seed=seed)
    return Disagreement(
        first=names[first],
        second=names[second],
        table=Counter(zip(ones, twos, strict=True)),
        kappa=kappa,
        excluded=len(records) - len(pairs),
        records=tuple(record for record, one, two in pairs if one != two),
    )


def write_disagreement(disagreement: Disagreement, path: Path, *, blind: bool = False) -> None:
    """Write the records that the two judges label differently, for people to label.

    Args:
        disagreement: What `compare_judges` found.
        path: A JSON-lines file.
        blind: Leave out what the judges said, so that it does not sway whoever labels.

    Raises:
        StorageError: It cannot be written.
    """
    lines = []
    for record in disagreement.records:
        row: dict[str, Any] = {
            "item_id": record.item_id,
            "condition": record.model_id,
            "sample": record.sample,
            "kind": record.kind,
            "prompt": record.prompt,
            "answer": record.output,
            "label": "",
        }
        if not blind:
            opinions = (record.judgements[disagreement.first], record.judgements[disagreement.second])
            row |= {"first": opinions[0].label, "second": opinions[1].label}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


def _judge_named(records: Sequence[Record], name: str) -> str:
    known = {judge for record in records for judge in record.judgements}
    fits = [name] if name in known else sorted(judge for judge in known if judge.startswith(name))
    if len(fits) != 1:
        raise DataError(
            f"The records hold {'no' if not fits else 'several'} judgements of '{name}'.",
            expected="the id of one judge of these records",
            found=", ".join(fits or sorted(known)) or "no judgements",
            fix=nearest(name, known) if known else "judge the records first",
        )
    return fits[0]
