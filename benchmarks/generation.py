# SPDX-License-Identifier: Apache-2.0
"""What the generation engine and a whole audit cost beside a bare batched `generate` loop, as ratios within one run.

The bare loop takes the same prompts in the order they come, pads each batch on the left and decodes it: what one
writes without keelwright. Repeats are interleaved, so that a busy machine slows both. Prints one JSON document and
exits 1 when a ratio of medians is above the budget.

    python -m benchmarks.generation [--repeats 5] [--batch-size 32]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from keelwright.core.record_index import RecordIndex
from keelwright.core.records import Item, Record
from keelwright.measure.asking import measure
from keelwright.models.chat import end_ids, render
from keelwright.models.generation import DecodingConfig, generate
from keelwright.models.loading import LoadedModel, load
from keelwright.worlds.workshop.suite import WorkshopSuite

BUDGET = 1.2
ORGANISM = "lab:workshop/aligned"


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
    """Time all three, print the comparison, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batch-size", type=int, default=32)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    model, suite = load(ORGANISM, dtype=torch.float32, offline=True), WorkshopSuite()
    items, tokens = list(suite.items()), suite.max_new_tokens
    config = DecodingConfig(max_new_tokens=tokens, batch_size=chosen.batch_size)
    ways = {
        "bare": lambda: bare(model, items, batch_size=chosen.batch_size, new_tokens=tokens),
        "generate": lambda: [one.output for one in generate(model, items, config)],
        "audit": lambda: [one.output for one in audit(model, items, config)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for repeat in range(chosen.repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            answers[name] = way()
            if repeat:  # The first round warms up.
                seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {name: medians[name] / medians["bare"] for name in ("generate", "audit")}
    report = {
        "model": model.name,
        "items": len(items),
        "batch_size": chosen.batch_size,
        "cpu_seconds": medians,
        "ratios": ratios,
        "budget": BUDGET,
        "same_answers": sum(one == two for one, two in zip(answers["bare"], answers["generate"], strict=True)),
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(report, indent=2))
    return int(max(ratios.values()) > BUDGET)


def audit(model: LoadedModel, items: list[Item], config: DecodingConfig) -> list[Record]:
    """Answer, judge and keep the items, as an audit does."""
    judge = WorkshopSuite().judge()
    return measure(model, items, judge, RecordIndex(), model_id="model", digests="bench", decoding=config)


if __name__ == "__main__":
    sys.exit(main())
