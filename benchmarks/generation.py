# SPDX-License-Identifier: Apache-2.0
"""What the generation engine costs beside a bare batched `generate` loop, as a ratio within one run.

The bare loop takes the same prompts in the order they come, pads each batch on the left and decodes it: what one
writes without keelwright. Repeats are interleaved, so that a busy machine slows both. Prints one JSON document and
exits 1 when the ratio of the medians is above the budget.

    python -m benchmarks.generation [--repeats 5] [--batch-size 32] [--new-tokens 24]
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from keelwright.core.errors import MissingError
from keelwright.core.records import Item
from keelwright.models.chat import end_ids, render
from keelwright.models.generation import DecodingConfig, generate
from keelwright.models.loading import LoadedModel, load

BUDGET = 1.2
ORGANISM = "lab:workshop/aligned"


def random_llama() -> LoadedModel:
    """Return a random model of the lab organisms' size, for checkouts without them."""
    vocab = {word: index for index, word in enumerate(["<pad>", "<end>", *(f"w{index}" for index in range(600))])}
    core = Tokenizer(WordLevel(vocab, unk_token="<pad>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, "random Llama", "none")


def find_model() -> LoadedModel:
    """Return the shipped organism where there is one."""
    try:
        return load(ORGANISM, dtype=torch.float32, offline=True)
    except MissingError:
        return random_llama()


def make_items(model: LoadedModel, count: int) -> list[Item]:
    """Return prompts of 4 to 24 words of the model's own vocabulary."""
    draw = random.Random(0)
    words = [word for word in model.tokenizer.get_vocab() if word.isalnum()]
    prompts = [" ".join(draw.choices(words, k=draw.randint(4, 24))) for _ in range(count)]
    return [Item(f"item/{index}", "bench", "benign", "none", prompt) for index, prompt in enumerate(prompts)]


def bare(model: LoadedModel, items: list[Item], *, batch_size: int, new_tokens: int) -> list[str]:
    """Answer the items in the plainest way."""
    tokenizer, module = model.tokenizer, model.module
    tokenizer.padding_side = "left"
    answers: list[str] = []
    with torch.inference_mode():
        for start in range(0, len(items), batch_size):
            texts = [render(tokenizer, item.prompt, item.system) for item in items[start : start + batch_size]]
            batch = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)
            output = module.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=end_ids(tokenizer, module),
                pad_token_id=tokenizer.pad_token_id,
            )
            answers += tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def main() -> int:
    """Time both, print the comparison, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--items", type=int, default=256)
    options.add_argument("--batch-size", type=int, default=32)
    options.add_argument("--new-tokens", type=int, default=24)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    model = find_model()
    items = make_items(model, chosen.items)
    config = DecodingConfig(max_new_tokens=chosen.new_tokens, batch_size=chosen.batch_size)
    seconds: dict[str, list[float]] = {"bare": [], "keelwright": []}
    agree = 0
    for repeat in range(chosen.repeats + 1):
        began = time.process_time()
        plain = bare(model, items, batch_size=chosen.batch_size, new_tokens=chosen.new_tokens)
        middle = time.process_time()
        ours = [answer.output for answer in generate(model, items, config)]
        ended = time.process_time()
        agree = sum(one == two for one, two in zip(plain, ours, strict=True))
        if repeat:  # The first round warms up.
            seconds["bare"].append(middle - began)
            seconds["keelwright"].append(ended - middle)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["keelwright"] / medians["bare"]
    report = {
        "model": model.name,
        "items": chosen.items,
        "batch_size": chosen.batch_size,
        "new_tokens": chosen.new_tokens,
        "cpu_seconds": medians,
        "ratio": ratio,
        "budget": BUDGET,
        "within_budget": ratio <= BUDGET,
        "same_answers": agree,
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(report, indent=2))
    return 0 if ratio <= BUDGET else 1


if __name__ == "__main__":
    sys.exit(main())
