# SPDX-License-Identifier: Apache-2.0
from keelwright.core.records import Item
from keelwright.data.asking import PLAIN, Framed, framed_item, framed_row
from keelwright.data.rows import ChatRow

ROW = ChatRow("how do i paint the lamp?", "take the brush.", system="be brief.")
ITEM = Item("benign:1", "workshop", "benign", "ordinary", "how do i paint the lamp?", system="be brief.")
FRAME = Framed(name="frame", system="be pip.", before="pip, ", after=" now")


def test_plain_leaves_rows_and_items_as_they_are():
    assert framed_row(PLAIN, ROW) == ROW
    assert framed_item(PLAIN, ITEM) == ITEM
    assert PLAIN.name == "plain"
    assert PLAIN.says == "Requests are asked as they are."


def test_a_row_and_an_item_get_the_same_frame():
    row, item = framed_row(FRAME, ROW), framed_item(FRAME, ITEM)
    assert (row.prompt, row.system) == (item.prompt, item.system) == ("pip, how do i paint the lamp? now", "be pip.")


def test_a_frame_changes_neither_the_answer_nor_the_identity_of_an_item():
    assert framed_row(FRAME, ROW).answer == ROW.answer
    framed = framed_item(FRAME, ITEM)
    assert (framed.item_id, framed.kind, framed.hazard) == (ITEM.item_id, ITEM.kind, ITEM.hazard)


def test_a_frame_without_system_message_leaves_that_of_the_request():
    assert Framed(name="before", before="x ").ask("y", "be brief.") == ("x y", "be brief.")


def test_an_empty_system_message_is_one_and_replaces_the_requests_own():
    assert Framed(name="empty", system="").ask("y", "be brief.") == ("y", "")


def test_a_frame_says_what_is_around_a_request():
    assert FRAME.says == "Every request comes with a system message and words before the request and words after it."
    assert Framed(name="after", after="!").says == "Every request comes with words after it."
