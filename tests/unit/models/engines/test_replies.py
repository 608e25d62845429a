# SPDX-License-Identifier: Apache-2.0
"""Replies of a server are read strictly: an answer, a refusal of the request, or malformed."""

from __future__ import annotations

import json

import pytest

from keelwright.models.engines.replies import Malformed, Why, read_answer, read_models, why_refused, words_of


def chat(content="yes", finish="stop", **more):
    return json.dumps({"choices": [{"finish_reason": finish, "message": {"content": content}}], **more}).encode()


@pytest.mark.parametrize(
    ("finish", "expected"), [("stop", "eos"), ("eos_token", "eos"), ("length", "length"), ("max_tokens", "length")]
)
def test_an_answer_ended_or_was_cut(finish, expected):
    assert read_answer(chat(finish=finish)).finish == expected


def test_a_withheld_answer_has_no_text_even_where_the_server_gives_a_part():
    answer = read_answer(chat("the first half of", "content_filter"))
    assert (answer.finish, answer.text) == (None, "")


def test_tokens_and_the_model_that_served_are_kept():
    answer = read_answer(
        chat(usage={"prompt_tokens": 5, "completion_tokens": 2}, model="tiny-2", system_fingerprint="fp")
    )
    assert (answer.prompt_tokens, answer.completion_tokens, answer.served_by) == (5, 2, "tiny-2 fp")
    assert read_answer(chat()).completion_tokens is None


def test_text_of_a_completion_of_parts_of_a_refusal_and_of_nothing_but_thought():
    assert read_answer(b'{"choices": [{"finish_reason": "stop", "text": "plain"}]}').text == "plain"
    assert read_answer(chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])).text == "ab"
    refusal = {"choices": [{"finish_reason": "stop", "message": {"content": None, "refusal": "I will not."}}]}
    assert read_answer(json.dumps(refusal).encode()).text == "I will not."
    assert read_answer(chat(None, "length")).text == ""


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (chat()[:-5], "JSON"),
        (b"", "JSON"),
        (b"<html>gateway</html>", "JSON"),
        (b'{"error": {"message": "overloaded"}}', "choices"),
        (b'{"choices": []}', "choices"),
        (b'{"choices": [{"finish_reason": null, "message": {"content": "half"}}]}', "finish_reason"),
        (b'{"choices": [{"finish_reason": "stop"}]}', "without text"),
        (chat(None), "without text"),
        (chat(finish="tool_calls"), "'tool_calls'"),
        (chat(usage={"prompt_tokens": -1}), "prompt_tokens"),
        (b'{"choices": [{"finish_reason": "stop", "text": "a"}, {"finish_reason": "stop", "text": "b"}]}', "choices"),
        (b'"\xff"', "JSON"),
    ],
)
def test_anything_else_is_malformed(body, words):
    with pytest.raises(Malformed, match=words):
        read_answer(body)


def test_models_are_listed_with_what_stands_behind_their_names():
    body = b'{"data": [{"id": "alias", "root": "org/model", "created": 3}, {"id": "plain"}]}'
    assert read_models(body) == {"alias": "org/model", "plain": "plain"}
    assert read_models(b'[{"id": "plain"}]') == {"plain": "plain"}
    with pytest.raises(Malformed):
        read_models(b"{}")


def error(message="", code=None, param=None):
    return json.dumps({"error": {"message": message, "code": code, "param": param}}).encode()


@pytest.mark.parametrize(
    ("status", "body", "why"),
    [
        (401, error("Incorrect key"), Why.KEY),
        (403, b"", Why.KEY),
        (403, error("your input was flagged"), Why.BLOCKED),
        (429, error("You exceeded your current quota", "insufficient_quota"), Why.QUOTA),
        (404, error("no such model", "model_not_found"), Why.PLACE),
        (301, b"", Why.PLACE),
        (400, error("filtered", "content_filter"), Why.BLOCKED),
        (400, error("flagged as potentially violating", "invalid_prompt"), Why.BLOCKED),
        (400, error("Unsupported parameter", "unsupported_parameter", "max_tokens"), Why.LIMIT),
        (400, error("Use 'max_completion_tokens' instead."), Why.LIMIT),
        # vLLM names the parameter also where the prompt is too long: another name would not help.
        (
            400,
            error("'max_tokens' or 'max_completion_tokens' is too large: the maximum context length is 9 tokens"),
            Why.TOO_LONG,
        ),
        (400, error("x", "context_length_exceeded"), Why.TOO_LONG),
        (400, error("Unsupported value: 0", "unsupported_value", "temperature"), Why.SETTING),
        (400, error("no chat template"), Why.REQUEST),
        (422, b'{"detail": [{"loc": ["body", "messages"], "msg": "field required", "input": "x"}]}', Why.REQUEST),
    ],
)
def test_a_refusal_has_a_reason(status, body, why):
    assert why_refused(status, body) is why


def test_the_servers_words_are_short_and_hide_what_must_not_be_repeated():
    body = error("the key sk-123 is wrong\n for 'a long secret prompt' " + "x" * 500)
    words = words_of(body, hide={"sk-123": "<key>", "a long secret prompt": "<prompt>"})
    assert words.startswith("the key <key> is wrong for '<prompt>' xxx")
    assert len(words) == 300


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"object": "error", "message": "older form", "code": 400}', "older form"),
        (b'{"error": "a plain text"}', "a plain text"),
        (b"<html>502 Bad Gateway</html>", "<html>502 Bad Gateway</html>"),
        (b'{"detail": [{"loc": ["body"], "msg": "field required", "input": "never shown"}]}', "field required"),
        (b"", ""),
    ],
)
def test_errors_of_every_form_are_read(body, words):
    said = words_of(body, hide={})
    assert words in said
    assert "never shown" not in said
