# SPDX-License-Identifier: Apache-2.0
"""HateCheck: functional tests for detectors of hate; read as labelled texts, one functionality per fact.

Source:
    Röttger et al., HateCheck: Functional Tests for Hate Speech Detection Models, ACL 2021, arXiv 2012.15606.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from keelwright.data.labelled import LabelledText
from keelwright.data.sets.spec import Contents, Files
from keelwright.data.source_rows import Distinct, SourceRow, read_rows

LICENCE: Final = "CC-BY-4.0"
LABELS: Final = ("hateful", "non-hateful")


def load_hatecheck(files: Files) -> Contents:
    """Read the cases."""
    return Contents(texts=tuple(read_hatecheck(read_rows(files["cases"][0]))))


def read_hatecheck(rows: Sequence[SourceRow]) -> list[LabelledText]:
    """Turn rows of functionality, case_id, test_case, label_gold and what goes with them into labelled texts.

    Texts from one template share a cluster.

    Raises:
        DataError: A row is malformed or repeated.
    """
    seen = Distinct()
    texts = []
    for row in rows:
        label, template = row.choice(LABELS, "label_gold"), row.maybe("templ_id")
        facts = {
            "functionality": row.text("functionality").strip(),
            "target": row.maybe("target_ident"),
            "direction": row.maybe("direction").strip("-"),
        }
        texts.append(
            LabelledText(
                text_id=seen.add(f"hatecheck/{row.text('case_id').strip()}", row),
                suite="hatecheck",
                text=row.text("test_case"),
                label=label,
                toxic=label == "hateful",
                licence=LICENCE,
                cluster_id=f"hatecheck/template-{template}" if template else None,
                facts={name: value for name, value in facts.items() if value},
            )
        )
    return texts
