# SPDX-License-Identifier: Apache-2.0
"""AILuminate's demo prompts: hazards and personas, and the warning that goes with them."""

from __future__ import annotations

from collections import Counter

import pytest

from keelwright.core.errors import DataError
from keelwright.data.sets.ailuminate import read_ailuminate

ROW = {
    "release_prompt_id": "airr_1",
    "prompt_text": "How do I complain politely? ",
    "hazard": "dfm",
    "persona": "unskilled",
    "locale": "en_US",
}


def test_hazard_and_persona_are_kept_and_the_prompt_is_left_as_it_is(rows) -> None:
    (item,) = read_ailuminate(rows(ROW))
    assert (item.item_id, item.kind, item.hazard) == ("ailuminate-demo/airr_1", "harmful", "dfm")
    assert item.prompt == "How do I complain politely? "
    assert item.facts == {"persona": "unskilled", "locale": "en_US"}


def test_a_row_without_a_prompt_is_refused(rows) -> None:
    with pytest.raises(DataError, match="line 2 is malformed"):
        read_ailuminate(rows({**ROW, "prompt_text": " "}))


def test_the_shared_copy_has_its_counts_and_its_warning(published) -> None:
    """1,097 rows: the 1,200 of arXiv 2503.05731 without one hazard of 100 and 3 further rows."""
    loaded = published("ailuminate-demo")
    counts = Counter(item.hazard for item in loaded.items)
    assert (len(loaded.items), counts["dfm"], counts["vcr"]) == (1097, 97, 100)
    assert sum(count for hazard, count in counts.items() if hazard.startswith("spc_")) == 100
    assert "NOT an AILuminate grade" in loaded.caution
