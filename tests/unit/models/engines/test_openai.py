# SPDX-License-Identifier: Apache-2.0
"""The HTTP engine against a real server on this machine: what it sends, and what it makes of answers."""

from __future__ import annotations

import dataclasses
import sys
import time

import pytest

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError, MissingError, OfflineError
from keelwright.models.engines.openai import OpenAIConfig, OpenAIEngine

GREEDY = DecodingConfig(max_new_tokens=9)
SAMPLED = DecodingConfig(max_new_tokens=9, temperature=0.7, top_p=0.9, seed=3, samples=3)


def test_every_item_is_answered_in_order_and_told_of_once(serve, ask, make_items, notes):
    server, items, batches = serve(), make_items(30), []
    answers = ask(server).answer(items, GREEDY, on_batch=batches.append, progress=notes)
    assert [one.output for one in answers] == [f"user={item.prompt}|None" for item in items]
    assert [one.item_id for one in answers] == [item.item_id for item in items]
    assert {(one.finish, one.n_tokens, one.n_prompt_tokens, one.seed) for one in answers} == {("eos", 3, 7, None)}
    assert sorted(one.item_id for batch in batches for one in batch) == sorted(item.item_id for item in items)
    assert notes.advanced == 30


def test_a_greedy_chat_asks_for_temperature_zero_and_the_limit_and_nothing_else(serve, ask, make_items):
    server = serve()
    ask(server).answer(make_items(1, system="be brief"), GREEDY)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "a question of its own, 0"}]
    assert server.paths == ["/v1/chat/completions"]
    assert server.asked == [{"model": "tiny", "messages": messages, "temperature": 0.0, "max_tokens": 9}]


def test_samples_are_requests_of_their_own_with_their_own_seeds(serve, ask, make_items):
    server, items = serve(), make_items(4)
    answers = ask(server).answer(items, SAMPLED)
    expected = [(item.item_id, sample) for item in items for sample in range(3)]
    assert [(one.item_id, one.sample) for one in answers] == expected
    assert [one.seed for one in answers] == [SAMPLED.seed_of(*pair) for pair in expected]
    assert all(one.output.endswith(f"|{one.seed}") for one in answers)
    assert {(body["temperature"], body["top_p"]) for body in server.asked} == {(0.7, 0.9)}
    assert all("n" not in body for body in server.asked)


def test_a_prompt_that_is_complete_goes_as_it_is(serve, ask, make_items):
    server = serve()
    decoding = dataclasses.replace(GREEDY, as_is=True)
    (answer,) = ask(server, extra_body={"add_special_tokens": False}).answer(make_items(1), decoding)
    assert answer.output == "a question of its own, 0|None"
    assert server.paths == ["/v1/completions"]
    assert server.asked[0] == {
        "model": "tiny", "prompt": "a question of its own, 0", "temperature": 0.0, "max_tokens": 9,
        "add_special_tokens": False,
    }  # fmt: skip


def test_what_is_there_already_is_not_asked_again(serve, ask, make_items):
    server, items = serve(), make_items(3)
    have = {("item/0", 0), ("item/0", 2), ("item/2", 1)}
    answers = ask(server).answer(items, SAMPLED, have=have)
    assert [(one.item_id, one.sample) for one in answers] == [
        ("item/0", 1), ("item/1", 0), ("item/1", 1), ("item/1", 2), ("item/2", 0), ("item/2", 2),
    ]  # fmt: skip
    assert len(server.asked) == 6


def test_with_everything_there_nothing_is_asked(serve, ask, make_items):
    server = serve()
    engine = ask(server)
    assert engine.answer(make_items(1), GREEDY, have={("item/0", 0)}) == []
    assert engine.usage.requests == 0


def test_the_order_of_arrival_decides_nothing(serve, ask, make_items):
    def late_first(body):
        number = int(body["messages"][-1]["content"].split()[-1])
        time.sleep(0.02 * (8 - number))
        return {"text": str(number)}

    arrived = []
    answers = ask(serve(late_first)).answer(make_items(8), GREEDY, on_batch=arrived.extend)
    assert [one.output for one in answers] == [str(number) for number in range(8)]
    assert [one.output for one in arrived] != [one.output for one in answers]


def test_answers_may_be_judged_by_a_model_behind_a_server_while_others_are_on_their_way(serve, ask, make_items):
    server, items, verdicts = serve(delay_s=0.005), make_items(12), []
    judge = ask(serve(lambda body: {"text": "safe"}))

    def keep(generations):
        questions = [dataclasses.replace(items[0], item_id=one.item_id, prompt=one.output) for one in generations]
        verdicts.extend(judge.answer(questions, GREEDY))

    ask(server).answer(items, GREEDY, on_batch=keep)
    assert sorted(one.item_id for one in verdicts) == sorted(item.item_id for item in items)
    assert {one.output for one in verdicts} == {"safe"}


@pytest.mark.parametrize("bound", [1, 5])
def test_no_more_requests_are_on_their_way_than_allowed(serve, ask, make_items, bound):
    server = serve(delay_s=0.02)
    ask(server, concurrency=bound).answer(make_items(20), GREEDY)
    assert server.most_at_once == bound


def test_requests_keep_their_distance_where_a_rate_is_set(serve, ask, make_items):
    server = serve()
    ask(server, requests_per_minute=1200).answer(make_items(12), GREEDY)
    # 12 requests at 50 ms each: 11 gaps between the first and the last.
    assert server.times[-1] - server.times[0] >= 11 * 0.05 * 0.9


def test_tokens_keep_their_rate_too(serve, ask, make_items):
    usage = {"usage": {"prompt_tokens": 60, "completion_tokens": 40}}
    server = serve(lambda _: {"text": "x", **usage})
    ask(server, tokens_per_minute=60_000, concurrency=1).answer(make_items(8), GREEDY)
    # 100 tokens take a tenth of a second.
    assert server.times[-1] - server.times[0] >= 7 * 0.1 * 0.9


def test_an_answer_that_was_cut_is_marked(serve, ask, make_items):
    (answer,) = ask(serve(lambda _: {"text": "on and", "finish_reason": "length"})).answer(make_items(1), GREEDY)
    assert (answer.output, answer.finish) == ("on and", "length")


def test_a_withheld_answer_and_a_prompt_turned_down_are_no_outputs_and_are_counted(
    serve, ask, make_items, servers, notes
):
    def respond(body):
        filtered = body["messages"][-1]["content"].endswith("1")
        return {"text": "Step 1: <withheld>", "finish_reason": "content_filter" if filtered else "stop"}

    server = serve(respond)
    refused = servers.Fault("status", 400, b'{"error": {"code": "content_filter", "message": "flagged"}}')
    server.fault_of = lambda body: refused if body["messages"][-1]["content"].endswith("2") else None
    engine = ask(server)
    answers = engine.answer(make_items(4), GREEDY, progress=notes)
    assert [one.finish for one in answers] == ["eos", "error", "error", "eos"]
    assert [one.output for one in answers[1:3]] == ["", ""]
    assert engine.usage.failures == {"blocked": 2}
    assert any(line.startswith("2 without an answer: blocked") for line in notes.lines)


def test_the_other_name_of_the_limit_is_tried_once_and_kept(serve, ask, make_items, servers):
    server = serve()
    words = b"""{"error": {"message": "Unsupported parameter: use 'max_completion_tokens'.", "param": "max_tokens"}}"""
    server.fault_of = lambda body: servers.Fault("status", 400, words) if "max_tokens" in body else None
    engine = ask(server, concurrency=1)
    assert {one.finish for one in engine.answer(make_items(3), GREEDY)} == {"eos"}
    assert [sorted(set(body) & {"max_tokens", "max_completion_tokens"}) for body in server.asked] == [
        ["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"], ["max_completion_tokens"],
    ]  # fmt: skip


def test_prompts_as_they_are_keep_the_name_of_the_limit_that_completions_know(serve, ask, make_items, servers):
    server = serve()
    words = b"""{"error": {"message": "Unsupported parameter: use 'max_completion_tokens'.", "param": "max_tokens"}}"""
    server.fault_of = lambda body: (
        servers.Fault("status", 400, words) if {"messages", "max_tokens"} <= set(body) else None
    )
    engine = ask(server)
    engine.answer(make_items(1), GREEDY)
    engine.answer(make_items(1), dataclasses.replace(GREEDY, as_is=True))
    assert server.asked[-1]["max_tokens"] == 9


def test_usage_counts_tokens_requests_and_cost(serve, ask, make_items):
    engine = ask(serve(), price_in=1.0, price_out=10.0)
    engine.answer(make_items(4), GREEDY)
    usage = engine.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.uncounted) == (28, 12, 0)
    assert usage.requests == 5  # the list of models first
    assert usage.cost == pytest.approx((28 * 1.0 + 12 * 10.0) / 1e6)
    assert usage.to_mapping()["served_by"] == ["tiny"]
    assert ask(serve()).usage.cost is None


def test_answers_that_the_server_did_not_count_are_counted_as_such(serve, ask, make_items):
    engine = ask(serve(lambda _: {"text": "x", "usage": None}))
    (answer,) = engine.answer(make_items(1), GREEDY)
    assert (answer.n_tokens, answer.n_prompt_tokens) == (0, None)
    assert engine.usage.uncounted == 1


def test_the_revision_is_what_the_server_says_it_runs(serve, ask):
    server = serve()
    server.models = [{"id": "tiny", "root": "org/tiny-0.5b"}]
    assert ask(server).revision == "tiny (org/tiny-0.5b)"
    assert ask(serve()).revision == "tiny"


def test_a_wrong_model_is_refused_before_any_item_is_sent(serve, ask, make_items):
    server = serve(models=["tiny-chat", "large"])
    with pytest.raises(ConfigError, match="has no model 'tiny-cat'") as caught:
        ask(server, "tiny-cat").answer(make_items(), GREEDY)
    assert caught.value.expected == "one of large, tiny-chat"
    assert caught.value.fix == "did you mean 'tiny-chat'?"
    assert server.asked == []


def test_a_server_that_lists_no_models_is_asked_all_the_same_and_says_so(serve, ask, make_items, servers, notes):
    server = serve()
    server.models_fault = servers.Fault("status", 404)
    assert len(ask(server).answer(make_items(2), GREEDY, progress=notes)) == 2
    assert any("does not list its models" in line for line in notes.lines)


def test_two_items_with_one_id_are_refused(serve, ask, make_items):
    with pytest.raises(DataError, match="same id"):
        ask(serve()).answer([*make_items(2), *make_items(1)], GREEDY)


def test_further_fields_of_a_request_are_part_of_the_templates_digest(serve, ask):
    server = serve()
    plain, more = ask(server), ask(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert plain.template_digest == "server"
    assert more.template_digest.startswith("server ")


# Where prompts may go.


@pytest.mark.parametrize("address", ["https://api.example.com/v1", "http://10.0.0.7:8000", "https://localhost.example"])
def test_offline_refuses_every_server_elsewhere_before_anything(address):
    with pytest.raises(OfflineError, match="the network is not allowed"):
        OpenAIEngine("tiny", OpenAIConfig(base_url=address), offline=True)


@pytest.mark.parametrize(
    "address", ["http://localhost:1/v1", "http://127.0.0.1:1", "http://[::1]:1", "http://127.8.8.8"]
)
def test_a_server_on_this_machine_is_no_network(address):
    engine = OpenAIEngine("tiny", OpenAIConfig(base_url=address), offline=True)
    assert engine.network is None
    assert "this machine" in engine.plan()["server"]


def test_the_network_is_the_host_that_prompts_go_to():
    engine = OpenAIEngine("tiny", OpenAIConfig(base_url="https://api.example.com/openai/v1/"))
    assert engine.network == "api.example.com"
    assert "prompts leave this machine" in engine.plan()["server"]
    assert "https://api.example.com/openai/v1 " in engine.plan()["server"]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY", "http_proxy"])
def test_a_server_on_this_machine_is_never_asked_through_a_proxy(serve, ask, make_items, monkeypatch, name):
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(ask(serve()).answer(make_items(1), GREEDY)) == 1


@pytest.mark.parametrize(
    "address",
    ["localhost:8000", "ftp://host/v1", "http://", "http://host:notaport/v1", "https://host/v1?key=1", "http://[::1"],
)
def test_an_address_that_cannot_be_used_is_refused(address):
    with pytest.raises(ConfigError, match="address of the server cannot be used"):
        OpenAIConfig(base_url=address)


def test_a_password_in_the_address_is_refused_and_not_repeated():
    with pytest.raises(ConfigError) as caught:
        OpenAIConfig(base_url="https://me:hunter2@host/v1")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"timeout_s": 0.0}, "timeout_s"),
        ({"requests_per_minute": 0.0}, "requests_per_minute"),
        ({"price_out": -1.0}, "price_out"),
        ({"extra_body": {"temperature": 1}}, "extra_body"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        OpenAIConfig(**settings)


def test_without_the_http_library_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingError) as caught:
        OpenAIEngine("tiny", OpenAIConfig(base_url="http://localhost:1"))
    assert caught.value.fix == "pip install 'keelwright[serve]'"


# Keys.

KEY = "sk-never-shown-0123456789"


@pytest.fixture
def with_key(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("SERVER_KEY", KEY)
    return server, OpenAIEngine(
        "tiny", OpenAIConfig(base_url=server.url, api_key_env="SERVER_KEY", retries=0, backoff_s=0.01)
    )


def test_the_key_comes_from_the_environment_and_goes_into_the_header_alone(with_key, make_items):
    server, engine = with_key
    engine.answer(make_items(1), GREEDY)
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(server.asked)
    assert KEY not in repr(engine) + repr(engine.config) + str(engine.plan()) + str(vars(engine)) + repr(engine._line())
    assert "the key of SERVER_KEY" in engine.plan()["server"]


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_stops_at_once_in_the_servers_words_without_the_key(
    with_key, make_items, servers, caplog, status
):
    server, engine = with_key
    caplog.set_level("DEBUG")
    body = b'{"error": {"message": "Incorrect API key provided: %s"}}' % KEY.encode()
    server.fault_of = lambda _: servers.Fault("status", status, body)
    with pytest.raises(MissingError, match="does not let us in") as caught:
        engine.answer(make_items(50), GREEDY)
    assert caught.value.found == f"HTTP {status}: Incorrect API key provided: <key> (SERVER_KEY is set)"
    assert len(server.asked) <= engine.config.concurrency
    assert KEY not in caplog.text


def test_a_missing_key_is_named(serve, ask, make_items, servers):
    server = serve()
    server.models_fault = servers.Fault("status", 401)
    with pytest.raises(MissingError) as caught:
        ask(server).answer(make_items(1), GREEDY)
    assert "OPENAI_API_KEY is not set" in caught.value.found
    assert server.asked == []


def test_no_variable_no_key(serve, ask, make_items, monkeypatch):
    server = serve()
    engine = ask(server, api_key_env="")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    engine.answer(make_items(1), GREEDY)
    assert "authorization" not in server.headers[0]


def test_a_key_never_travels_unencrypted_to_another_machine(monkeypatch):
    monkeypatch.setenv("SERVER_KEY", KEY)
    with pytest.raises(ConfigError, match="unencrypted") as caught:
        OpenAIEngine("tiny", OpenAIConfig(base_url="http://10.0.0.7:8000", api_key_env="SERVER_KEY"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "sk-ключ"])
def test_a_key_that_cannot_be_a_header_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("SERVER_KEY", key)
    with pytest.raises(ConfigError, match="cannot be sent") as caught:
        OpenAIEngine("tiny", OpenAIConfig(base_url="http://localhost:1", api_key_env="SERVER_KEY"))
    assert key not in str(caught.value)
