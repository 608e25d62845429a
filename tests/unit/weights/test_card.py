# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from keelwright.weights.card import Provenance, licence_of, model_card

SOURCES = {role: {"model": f"org/{role}", "digest": "sha256:0"} for role in ("aligned", "tuned")}


def front(card: str) -> dict[str, object]:
    return dict(yaml.safe_load(card.split("---")[1]))


def with_card(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "README.md").write_text(text)
    return folder


def test_without_results_the_card_says_that_safety_was_not_evaluated() -> None:
    card = model_card(Provenance(method="linear"), SOURCES)
    assert "safety not evaluated" in card
    assert front(card)["base_model"] == ["org/aligned", "org/tuned"]
    assert front(card)["library_name"] == "transformers"


def test_method_citation_status_and_coefficients_are_stated() -> None:
    provenance = Provenance(
        method="resta", title="RESTA", citation="arXiv 1", status="reconstruction", coefficients={"coefficient": 0.5}
    )
    card = model_card(provenance, SOURCES, ("a note",), library="peft")
    for text in ("RESTA", "arXiv 1", "reconstruction", "coefficient 0.5", "- a note"):
        assert text in card
    assert front(card)["library_name"] == "peft"


def test_results_are_a_table_with_intervals_counts_and_gaps() -> None:
    rate = {"value": 0.125, "low": 0.05, "high": 0.2, "n": 80}
    results = {"tuned": {"harm_rate": rate, "utility": None}, "repaired": {"harm_rate": rate}, "aligned": None}
    card = model_card(Provenance(method="linear", results=results), SOURCES)
    assert "safety not evaluated" not in card
    assert "| metric | tuned | repaired |" in card
    assert "| harm_rate | 0.125 [0.05, 0.2], n=80 | 0.125 [0.05, 0.2], n=80 |" in card
    assert "| utility | not measured | not measured |" in card


def test_a_licence_that_all_cards_share_is_taken_over(tmp_path: Path) -> None:
    folders = {role: with_card(tmp_path / role, "---\nlicense: mit\n---\nText") for role in SOURCES}
    card = model_card(Provenance(method="linear", folders=folders), SOURCES)
    assert front(card)["license"] == "mit"
    assert "| tuned | org/tuned | `sha256:0` | mit |" in card


def test_licences_that_differ_or_lack_are_listed_and_not_claimed(tmp_path: Path) -> None:
    folders = {
        "aligned": with_card(tmp_path / "a", "---\nlicense: other\nlicense_name: llama3\n---\n"),
        "tuned": with_card(tmp_path / "t", "no front matter"),
    }
    card = model_card(Provenance(method="linear", folders=folders), SOURCES)
    assert "license" not in front(card)
    assert "`sha256:0` | llama3 |" in card
    assert "`sha256:0` | not found |" in card


BROKEN = ["---\n[broken\n---\n", "---\njust text\n---\n", "", "---\nlicense: mit\n", "x\n---\na\n---"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_card_that_cannot_be_read_gives_no_licence(tmp_path: Path, text: str) -> None:
    assert licence_of(with_card(tmp_path / "m", text)) is None


def test_a_folder_without_a_card_gives_no_licence(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
