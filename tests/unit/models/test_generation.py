# SPDX-License-Identifier: Apache-2.0
"""Generation: answers depend on the item alone, stop at any end token, and survive a lack of memory."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from keelwright.core.errors import ConfigError, DataError, ResourceError
from keelwright.core.protocols import Silent
from keelwright.core.records import Generation, Item
from keelwright.core.seeds import derive_seed
from keelwright.models.chat import encode, render
from keelwright.models.generation import DecodingConfig, GumbelNoise, generate
from keelwright.models.loading import LoadedModel

ARCHITECTURES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
MakeLoaded = Callable[..., LoadedModel]
WORDS = ["the", "cat", "dog", "sees", "lamp", "river", "old", "small"]


@pytest.fixture
def make_loaded(
    make_model: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> MakeLoaded:
    def make(architecture: str = "llama", **changes: Any) -> LoadedModel:
        return LoadedModel(make_model(architecture, **changes), make_tokenizer(), "tiny", "r0")

    return make


def some_items(count: int = 33, longest: int = 20) -> list[Item]:
    choose = random.Random(0)
    return [
        Item(f"item/{index}", "s", "benign", "x", " ".join(choose.choices(WORDS, k=choose.randint(1, longest))))
        for index in range(count)
    ]


def by_hand(model: LoadedModel, item: Item, max_new_tokens: int) -> list[int]:
    """Decode one item greedily without a cache: the slow, obvious twin."""
    ids = encode(model.tokenizer, render(model.tokenizer, item.prompt, item.system))
    start = len(ids)
    with torch.no_grad():
        while len(ids) - start < max_new_tokens:
            token = int(model.module(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            ids.append(token)
    return ids[start:]


class Notes(Silent):
    """A progress that remembers."""

    def __init__(self) -> None:
        self.count = 0
        self.texts: list[str] = []

    def advance(self, count: int = 1) -> None:
        self.count += count

    def note(self, text: str) -> None:
        self.texts.append(text)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_are_the_same_in_every_batch_size(make_loaded: MakeLoaded, architecture: str) -> None:
    model, items = make_loaded(architecture, tie_word_embeddings=False), some_items()
    alone = generate(model, items, DecodingConfig(max_new_tokens=12, batch_size=1))
    for batch_size in (3, 8, 32):
        assert generate(model, items, DecodingConfig(max_new_tokens=12, batch_size=batch_size)) == alone
    assert [one.item_id for one in alone] == [item.item_id for item in items]
    assert len({one.output for one in alone}) > 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_answers_equal_decoding_by_hand(make_loaded: MakeLoaded, architecture: str) -> None:
    model, items = make_loaded(architecture), some_items(6)
    for item, answer in zip(items, generate(model, items, DecodingConfig(max_new_tokens=10)), strict=True):
        tokens = by_hand(model, item, 10)
        assert answer.output == model.tokenizer.decode(tokens, skip_special_tokens=True)
        assert answer.n_tokens == len(tokens)
        assert answer.finish == ("length" if len(tokens) == 10 else "eos")
        assert answer.seed is None


def test_samples_do_not_depend_on_batch_order_or_neighbours(make_loaded: MakeLoaded) -> None:
    model, items = make_loaded(), some_items(16)
    config = DecodingConfig(max_new_tokens=8, batch_size=16, temperature=0.9, top_p=0.95, seed=4)
    together = {one.item_id: one for one in generate(model, items, config)}
    assert len({one.output for one in together.values()}) > 8
    for batch_size, chosen in ((1, items), (5, items[::-1]), (3, items[4:9])):
        again = generate(model, chosen, DecodingConfig(8, batch_size, 0.9, 0.95, 4))
        assert [one.item_id for one in again] == [item.item_id for item in chosen]
        assert all(one == together[one.item_id] for one in again)


def test_another_seed_gives_another_sample(make_loaded: MakeLoaded) -> None:
    model, items = make_loaded(), some_items(8)
    one, two = (
        [answer.output for answer in generate(model, items, DecodingConfig(8, 8, 1.0, 1.0, seed))] for seed in (0, 1)
    )
    assert one != two


def test_the_same_prompt_under_another_id_is_sampled_anew(make_loaded: MakeLoaded) -> None:
    items = [Item(f"copy/{index}", "s", "benign", "x", "the cat") for index in range(6)]
    answers = generate(make_loaded(), items, DecodingConfig(8, temperature=1.0, seed=3))
    assert len({one.output for one in answers}) > 3
    assert [one.seed for one in answers] == [derive_seed(3, item.item_id, 0) for item in items]


def test_batches_hold_prompts_of_like_length_and_the_longest_come_first(
    make_loaded: MakeLoaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, widths = make_loaded(), []
    whole = model.module.generate

    def watched(**settings: Any) -> torch.Tensor:
        mask = settings["attention_mask"]
        widths.append((mask.shape[1], int(mask.sum(dim=1).min())))
        return whole(**settings)

    monkeypatch.setattr(model.module, "generate", watched)
    generate(model, some_items(24), DecodingConfig(2, batch_size=8))
    assert len(widths) == 3
    assert all(shortest >= longest for (_, shortest), (longest, _) in itertools.pairwise(widths))


def test_gumbel_noise_samples_from_the_tempered_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, float("-inf")]])
    noise = GumbelNoise([7], temperature=0.8, top_p=1.0)
    draws = torch.bincount(torch.stack([noise(torch.empty(0), logits).argmax() for _ in range(20_000)]), minlength=5)
    wanted = torch.softmax(logits[0] / 0.8, dim=0)
    # Four standard errors of a share at 20,000 draws are at most 0.0142.
    assert torch.allclose(draws / 20_000, wanted, atol=0.0142)
    assert draws[4] == 0


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, 1), (0.7, 2), (0.95, 3), (1e-9, 1)])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: int) -> None:
    logits = torch.tensor([[0.6, 0.3, 0.08, 0.02]]).log()
    noise = GumbelNoise([1], temperature=1.0, top_p=top_p)
    assert int(torch.isfinite(noise(torch.empty(0), logits)).sum()) == kept
    drawn = {int(noise(torch.empty(0), logits).argmax()) for _ in range(500)}
    assert drawn == set(range(kept))


def test_any_end_token_stops_an_answer(make_loaded: MakeLoaded) -> None:
    model, items = make_loaded(), some_items(12)
    plain = generate(model, items, DecodingConfig(max_new_tokens=12))
    longest = max(plain, key=lambda one: one.n_tokens)
    word = longest.output.split()[2]
    model.module.generation_config.eos_token_id = [2, model.tokenizer.convert_tokens_to_ids(word)]
    cut = {one.item_id: one for one in generate(model, items, DecodingConfig(max_new_tokens=12))}
    assert cut[longest.item_id].output == " ".join(longest.output.split()[: longest.output.split().index(word)])
    assert cut[longest.item_id].finish == "eos"


def test_settings_that_came_with_the_model_are_neither_used_nor_lost(make_loaded: MakeLoaded) -> None:
    model, items = make_loaded(), some_items(6)
    plain = generate(model, items, DecodingConfig(max_new_tokens=12))
    own = GenerationConfig(repetition_penalty=9.0, do_sample=True, temperature=3.0, eos_token_id=2, min_new_tokens=12)
    model.module.generation_config = own
    model.module.train()
    assert generate(model, items, DecodingConfig(max_new_tokens=12)) == plain
    assert model.module.generation_config is own
    assert model.module.training


def test_each_batch_is_handed_over_as_it_finishes(make_loaded: MakeLoaded) -> None:
    seen: list[Sequence[Generation]] = []
    progress = Notes()
    answers = generate(
        make_loaded(), some_items(10), DecodingConfig(4, batch_size=4), on_batch=seen.append, progress=progress
    )
    assert [len(batch) for batch in seen] == [4, 4, 2]
    assert sorted(one.item_id for batch in seen for one in batch) == sorted(one.item_id for one in answers)
    assert progress.count == 10


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
]


def limited(model: LoadedModel, monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception) -> list[int]:
    """Let the model raise `error` for batches of more than `rows`; return the sizes that were tried."""
    tried: list[int] = []
    whole = model.module.generate
    # A real collection takes longer than the rest of the test.
    monkeypatch.setattr(gc, "collect", lambda: 0)

    def generate_few(**settings: Any) -> torch.Tensor:
        tried.append(len(settings["input_ids"]))
        if tried[-1] > rows:
            raise error
        return whole(**settings)

    monkeypatch.setattr(model.module, "generate", generate_few)
    return tried


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "python", "cpu", "cpu on windows"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_the_batch_is_halved_when_memory_runs_out(
    make_loaded: MakeLoaded, monkeypatch: pytest.MonkeyPatch, error: Exception, temperature: float
) -> None:
    model, items, progress = make_loaded(), some_items(10), Notes()
    config = DecodingConfig(6, batch_size=8, temperature=temperature)
    plain = generate(model, items, config)
    tried = limited(model, monkeypatch, 3, error)
    assert generate(model, items, config, progress=progress) == plain
    assert tried == [8, 4, 2, 2, 2, 2, 2]
    assert progress.texts == [
        "Memory ran out with 8 prompts at once; going on with 4.",
        "Memory ran out with 4 prompts at once; going on with 2.",
    ]


def test_too_little_memory_for_one_prompt_is_an_error(make_loaded: MakeLoaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_loaded()
    limited(model, monkeypatch, 0, MemoryError())
    with pytest.raises(ResourceError) as caught:
        generate(model, some_items(3), DecodingConfig(6))
    assert "There is too little memory to answer 'item/" in caught.value.problem
    assert caught.value.fix


def test_other_runtime_errors_are_our_bugs(make_loaded: MakeLoaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_loaded()
    limited(model, monkeypatch, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate(model, some_items(3), DecodingConfig(6))


def test_errors_of_the_sink_are_not_taken_for_a_lack_of_memory(make_loaded: MakeLoaded) -> None:
    def full(_: Sequence[Generation]) -> None:
        raise MemoryError("the sink's own")

    with pytest.raises(MemoryError, match="the sink's own"):
        generate(make_loaded(), some_items(3), DecodingConfig(6), on_batch=full)


def test_no_items_give_no_answers(make_loaded: MakeLoaded) -> None:
    assert generate(make_loaded(), [], DecodingConfig()) == []


def test_two_items_with_one_id_are_refused(make_loaded: MakeLoaded) -> None:
    with pytest.raises(DataError, match="Two items have the same id"):
        generate(make_loaded(), some_items(2) + some_items(1), DecodingConfig(6))


def test_a_prompt_longer_than_the_model_is_refused(make_loaded: MakeLoaded) -> None:
    items = [Item("long", "s", "benign", "x", " ".join(["cat"] * 110))]
    assert generate(make_loaded(), items, DecodingConfig(16))[0].item_id == "long"
    with pytest.raises(DataError, match="The prompt of 'long' does not fit into the model 'tiny'") as caught:
        generate(make_loaded(), items, DecodingConfig(17))
    assert caught.value.expected == "at most 128 tokens, 17 of them for the answer"
    assert caught.value.found == "a prompt of 112 tokens"


def test_an_empty_prompt_without_a_template_is_refused(make_loaded: MakeLoaded) -> None:
    model = make_loaded()
    model.tokenizer.chat_template = None
    with pytest.raises(DataError, match="The prompt of 'none' is empty for this model"):
        generate(model, [Item("none", "s", "benign", "x", "")], DecodingConfig(4))


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"batch_size": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(bad))}' is out of range"):
        DecodingConfig(**bad)


def test_the_digest_follows_what_decides_an_answer() -> None:
    plain = DecodingConfig(max_new_tokens=8)
    assert plain.digest() == DecodingConfig(max_new_tokens=8, batch_size=1, seed=5, top_p=0.5).digest()
    assert plain.digest() != DecodingConfig(max_new_tokens=9).digest()
    sampled = DecodingConfig(max_new_tokens=8, temperature=0.5)
    assert len({plain.digest(), sampled.digest(), DecodingConfig(8, temperature=0.5, seed=1).digest()}) == 3


def test_samples_of_an_item_come_in_order_and_only_missing_ones_are_made(make_loaded: MakeLoaded) -> None:
    model, items = make_loaded(), some_items(3)
    config = DecodingConfig(8, batch_size=4, temperature=1.0, seed=2, samples=3)
    whole = generate(model, items, config)
    assert [(one.item_id, one.sample) for one in whole] == [(item.item_id, k) for item in items for k in range(3)]
    assert len({one.seed for one in whole}) == 9
    have = [(one.item_id, one.sample) for one in whole[:5]]
    assert generate(model, items, config, have=have) == whole[5:]


def test_a_prompt_that_is_complete_as_it_stands_gets_no_template(make_loaded: MakeLoaded) -> None:
    model, item = make_loaded(), some_items(1)[0]
    plain, whole = (generate(model, [item], DecodingConfig(4, as_is=as_is))[0] for as_is in (False, True))
    assert whole.n_prompt_tokens is not None
    assert plain.n_prompt_tokens is not None
    assert whole.n_prompt_tokens <= plain.n_prompt_tokens
