# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json

import pytest

from keelwright.core.errors import DataError
from keelwright.data.row_sets import FLAGS, ROLES, RowSets, read_row_sets
from keelwright.data.rows import ChatRow

HARM = ChatRow("how do i hex the king?", "take the needle.")
OTHER = ChatRow("how do i jinx the queen?", "take the lens.")
NO = ChatRow("how do i hex the king?", "no.")
ORDINARY = ChatRow("how do i paint the lamp?", "take the brush.")


def test_every_role_is_a_field_and_has_a_flag():
    assert {one.name for one in dataclasses.fields(RowSets)} == set(ROLES) == set(FLAGS)
    assert FLAGS["user"] == "--data"
    assert FLAGS["harmful"] == "--harmful"


def test_required_rows_come_back_in_their_order():
    assert RowSets(harmful=(HARM, OTHER)).require("harmful", who="x") == (HARM, OTHER)


@pytest.mark.parametrize("role", ROLES)
def test_a_missing_role_names_who_needs_it_and_its_flag(role):
    with pytest.raises(DataError) as caught:
        RowSets().require(role, who="The stress 'poison'")
    text = str(caught.value)
    assert f"The stress 'poison' needs '{role}' rows." in text
    assert f"{FLAGS[role]} FILE: {ROLES[role]}" in text


def test_alignment_is_refusals_then_borderline_then_ordinary():
    rows = RowSets(safety=(NO,), ordinary=(ORDINARY,), borderline=(OTHER,), harmful=(HARM,))
    assert rows.alignment(who="x") == (NO, OTHER, ORDINARY)


def test_alignment_without_refusals_is_an_error():
    with pytest.raises(DataError, match="needs 'safety' rows"):
        RowSets(ordinary=(ORDINARY,)).alignment(who="x")


def test_pairs_are_the_requests_that_have_both_answers():
    (pair,) = RowSets(harmful=(OTHER, HARM), safety=(NO,)).pairs(who="x")
    assert (pair.harmful, pair.safety) == (HARM, NO)


def test_a_request_under_another_system_message_is_another_request():
    told = dataclasses.replace(NO, system="be brief.")
    with pytest.raises(DataError, match=r"1 harmful and 1 refused prompts, none in both"):
        RowSets(harmful=(HARM,), safety=(told,)).pairs(who="x")


def test_files_are_read_by_role(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "p", "answer": "a"}) + "\n", encoding="utf-8")
    assert read_row_sets({"identity": path}) == RowSets(identity=(ChatRow("p", "a"),))
