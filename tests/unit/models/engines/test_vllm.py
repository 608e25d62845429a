# SPDX-License-Identifier: Apache-2.0
"""The vLLM engine hands over what vLLM documents. vLLM itself cannot run here: a stand-in module takes its place.

The stand-in has the signatures of vLLM's sources (`vllm/entrypoints/llm.py`, `vllm/sampling_params.py`,
`vllm/outputs.py`) and answers with the tokens of the prompt, last first.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest

from keelwright.core.decoding import DecodingConfig
from keelwright.core.errors import ConfigError, DataError, MissingError
from keelwright.core.records import Item
from keelwright.models.chat import encode, render
from keelwright.models.engines.vllm import VllmConfig, VllmEngine

END = 2


@dataclass
class SamplingParams:
    """The fields of vLLM's class that the engine may set, with vLLM's defaults."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = 16
    skip_special_tokens: bool = True


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("vllm")
    calls = []

    class LLM:
        def __init__(
            self, model, *, tokenizer=None, trust_remote_code=False, tensor_parallel_size=1, dtype="auto", seed=None,
            gpu_memory_utilization=0.9, enforce_eager=False, max_model_len=None,
        ):  # fmt: skip
            module.made = dict(locals())

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
            assert len(prompts) == len(sampling_params)
            calls.append((prompts, sampling_params, use_tqdm))
            return [
                self._answer(one["prompt_token_ids"], how) for one, how in zip(prompts, sampling_params, strict=True)
            ]

        def _answer(self, ids, how):
            backwards = list(reversed(ids))
            whole = len(backwards) < how.max_tokens
            tokens = [*backwards, END] if whole else backwards[: how.max_tokens]
            reason = module.reason or ("stop" if whole else "length")
            text = " ".join(map(str, backwards))
            one = SimpleNamespace(index=0, text=text, token_ids=tokens, finish_reason=reason, stop_reason=None)
            return SimpleNamespace(outputs=[one], prompt_token_ids=ids, finished=True)

    module.LLM, module.SamplingParams, module.calls, module.reason = LLM, SamplingParams, calls, None
    monkeypatch.setitem(sys.modules, "vllm", module)
    return module


def items(count=5):
    return [Item(f"i{n}", "s", "benign", "x", " ".join(["cat"] * (n + 1)), "old lamp") for n in range(count)]


def test_prompts_go_as_the_token_ids_that_the_engine_in_this_process_reads(stand_in, make_folder, make_tokenizer):
    engine = VllmEngine(str(make_folder()))
    answers = engine.answer(items(), DecodingConfig(max_new_tokens=50))
    tokenizer = make_tokenizer()
    expected = [encode(tokenizer, render(tokenizer, item.prompt, item.system)) for item in items()]
    ((prompts, _, use_tqdm),) = stand_in.calls
    assert [one["prompt_token_ids"] for one in prompts] == expected
    assert use_tqdm is False
    assert [one.output for one in answers] == [" ".join(map(str, reversed(ids))) for ids in expected]
    assert [one.n_prompt_tokens for one in answers] == [len(ids) for ids in expected]


def test_every_decoding_setting_is_given_so_that_the_models_own_decide_nothing(stand_in, make_folder):
    engine = VllmEngine(str(make_folder()))
    decoding = DecodingConfig(max_new_tokens=50, temperature=0.6, top_p=0.8, samples=2, seed=4)
    answers = engine.answer(items(2), decoding)
    ((_, sampling, _),) = stand_in.calls
    seeds = [decoding.seed_of(name, sample) for name in ("i0", "i1") for sample in (0, 1)]
    assert sampling == [
        SamplingParams(temperature=0.6, top_p=0.8, seed=seed, stop_token_ids=[END], max_tokens=50) for seed in seeds
    ]
    assert [(one.item_id, one.sample, one.seed) for one in answers] == [
        ("i0", 0, seeds[0]), ("i0", 1, seeds[1]), ("i1", 0, seeds[2]), ("i1", 1, seeds[3]),
    ]  # fmt: skip


def test_greedy_is_temperature_zero_without_a_seed(stand_in, make_folder):
    VllmEngine(str(make_folder())).answer(items(1), DecodingConfig(max_new_tokens=50))
    assert stand_in.calls[0][1] == [SamplingParams(temperature=0.0, stop_token_ids=[END], max_tokens=50)]


def test_an_end_token_is_not_counted_and_a_cut_answer_is_marked(stand_in, make_folder):
    engine = VllmEngine(str(make_folder()))
    (whole,) = engine.answer(items(1), DecodingConfig(max_new_tokens=50))
    assert (whole.finish, whole.n_tokens) == ("eos", whole.n_prompt_tokens)
    (cut,) = engine.answer(items(1), DecodingConfig(max_new_tokens=2))
    assert (cut.finish, cut.n_tokens) == ("length", 2)


def test_an_aborted_answer_is_an_error_without_text(stand_in, make_folder):
    stand_in.reason = "abort"
    (answer,) = VllmEngine(str(make_folder())).answer(items(1), DecodingConfig(max_new_tokens=50))
    assert (answer.finish, answer.output) == ("error", "")


def test_answers_come_in_batches_and_only_those_that_are_missing(stand_in, make_folder):
    engine, told = VllmEngine(str(make_folder()), VllmConfig(at_a_time=2)), []
    engine.answer(items(5), DecodingConfig(max_new_tokens=50), have={("i1", 0)}, on_batch=told.append)
    assert [[one.item_id for one in batch] for batch in told] == [["i0", "i2"], ["i3", "i4"]]


def test_a_prompt_as_it_is_gets_no_template(stand_in, make_folder):
    engine = VllmEngine(str(make_folder()))
    engine.answer([Item("a", "s", "benign", "x", "cat <user> dog")], DecodingConfig(max_new_tokens=9, as_is=True))
    assert stand_in.calls[0][0] == [{"prompt_token_ids": [9, 4, 10]}]


def test_vllm_gets_the_folder_and_runs_no_code_of_the_model(stand_in, make_folder):
    folder = make_folder()
    engine = VllmEngine(str(folder), VllmConfig(dtype="float32", tensor_parallel_size=2, max_model_len=64))
    made = stand_in.made
    assert (made["model"], made["tokenizer"]) == (str(folder), str(folder))
    assert (made["trust_remote_code"], made["dtype"], made["tensor_parallel_size"]) == (False, "float32", 2)
    assert made["max_model_len"] == 64
    assert engine.network is None
    assert engine.name == str(folder)
    assert len(engine.revision) >= 16


def test_a_prompt_that_does_not_fit_is_refused_before_anything_is_asked(stand_in, make_folder):
    engine = VllmEngine(str(make_folder()), VllmConfig(max_model_len=20))
    with pytest.raises(DataError, match="'i4' does not fit"):
        engine.answer(items(5), DecodingConfig(max_new_tokens=11))
    assert stand_in.calls == []


def test_adapters_are_refused_with_the_way_out(stand_in, make_folder):
    folder = make_folder()
    with pytest.raises(ConfigError, match="does not add the adapters") as caught:
        VllmEngine(f"{folder}+{folder}")
    assert "--coefficient 1" in caught.value.fix


def test_without_vllm_the_way_over_http_is_named(make_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingError) as caught:
        VllmEngine(str(make_folder()))
    assert "vllm serve MODEL --generation-config vllm" in caught.value.fix


@pytest.mark.parametrize("settings", [{"dtype": "int8"}, {"gpu_memory_utilization": 0.0}, {"max_model_len": 0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        VllmConfig(**settings)
