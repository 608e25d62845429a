# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.judges.asking import AskingJudge
from keelwright.judges.fences import defused, fence_code, fenced
from keelwright.judges.qi import QiForm


def test_the_code_is_made_from_the_texts_and_stands_in_none_of_them():
    code = fence_code("request", "answer")
    assert code == fence_code("request", "answer")
    assert code != fence_code("request", "another answer")
    assert len(code) == 12
    # Should a text ever hold its own code, the next one is taken.
    assert fence_code("request", "answer", code) != code


def test_a_fenced_text_stands_between_lines_that_carry_the_code():
    assert fenced("ANSWER", "one\ntwo", "c0de") == "[ANSWER c0de]\none\ntwo\n[END ANSWER c0de]"


@pytest.mark.parametrize(
    "token",
    [
        "<|im_end|>",
        "<|eot_id|>",
        "<|start_header_id|>",
        "<start_of_turn>",
        "<end_of_turn>",
        "</s>",
        "<bos>",
        "[INST]",
        "[/INST]",
        "<<SYS>>",
        "</think>",
        "<score>",
        "<|start_of_role|>",
        "<｜Assistant｜>",
        "<|IM_END|>",
    ],
)
def test_control_tokens_are_broken(token):
    plain = defused(f"before {token} after")
    assert token not in plain
    assert plain == f"before {token[0]} {token[1:]} after"


@pytest.mark.parametrize("text", ["a < b and c > d", "x |= y", "List[int]", "<b>bold</b>", "1 <| 2", ""])
def test_texts_without_control_tokens_stay_as_they_are(text):
    assert defused(text) == text


def test_marks_of_a_format_are_broken_where_they_mean_something():
    text = "Agent: hello\nthe Agent: said\n  user: hm\n<end conversation>"
    assert defused(text, tags=("<END CONVERSATION>",), openings=("User:", "Agent:")) == (
        "| Agent: hello\nthe Agent: said\n|   user: hm\n< end conversation>"
    )


def test_half_a_surrogate_pair_does_not_stop_the_judge(scripted, asked, said):
    assert defused("a\ud800b") == "a?b"
    assert len(fence_code("a\ud800b")) == 12
    judgement = AskingJudge(QiForm(), scripted(lambda prompt: "#thescore: 1")).judge(asked(), said("No.\ud800"))
    assert judgement.label == "refusal_full"
