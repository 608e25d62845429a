# SPDX-License-Identifier: Apache-2.0
"""What a training step costs under each defence, as a multiple of a plain step.

All methods take their steps in turn in one process, on rows of one length, so that what the machine does meanwhile
meets all of them. Memory is measured in a process of its own per method. `--size 1b --device cuda` takes a Llama of
1.2 billion random weights in bfloat16 with a LoRA instead of the lab's organism.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from keelwright.arena.arms import choose
from keelwright.core.catalogue import catalogue
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.models.loading import load
from keelwright.training.config import TrainConfig
from keelwright.training.defence import sft_recipe
from keelwright.training.loop import Run, _trained
from keelwright.training.lora import attach_lora
from keelwright.training.recipe import Recipe
from keelwright.training.rows import EncodedRow

LIMITS = {"booster": 3.15, "vaccine": 2.1, "constrained_sft": 1.1, "safety_mix": 1.02}
"""Largest multiple of a plain step."""
BATCH, ROWS, WARM = 20, 200, 3
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "booster": {"harmful_batch": BATCH},
    "safety_mix": {"k": 20, "borderline": 0.0, "ordinary": 0.0},
    "lisa": {"alignment_steps": 1, "user_steps": 9},
    "freeze_layers": {"layers": "1-2"},
    "backdoor_align": {"secret": 1},
}
"""Batches as large as the plain step's, so that a pass is a pass; what a method cannot do without."""
PREPARED = {"seal", "virus"}
"""Methods whose own cost lies before the training that is measured here."""
SIZES = {
    "60m": LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8, vocab_size=32000
    ),
    "1b": LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """What is trained, and on what."""

    size: str
    device: str
    tokens: int

    def model(self) -> PreTrainedModel:
        """Return a fresh model."""
        if self.size == "lab":
            return load("lab:workshop/aligned", offline=True).module.float()
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlamaForCausalLM(SIZES[self.size]).to(torch.bfloat16 if self.size == "1b" else torch.float32)

    def rows(self, vocab: int, count: int, seed: int) -> list[EncodedRow]:
        """Return random rows of one length, half prompt; the prompts are those of every other seed."""
        half = self.tokens // 2
        prompts = torch.randint(5, vocab, (count, half), generator=torch.Generator().manual_seed(0))
        answers = torch.randint(5, vocab, (count, half), generator=torch.Generator().manual_seed(seed))
        return [EncodedRow(one, half) for one in torch.cat([prompts, answers], dim=1)]


def methods() -> list[str]:
    """Return the defences whose steps differ from plain ones."""
    return [name for name, line in catalogue().items() if line.room == "harden" and name not in PREPARED]


def recipe_of(name: str, *, short: bool = False) -> Recipe:
    """Return a method's training run; its texts are not read, only the feeds' names and sizes.

    Args:
        name: The method's, or `sft`.
        short: An adversary takes two steps instead of all: as much memory in less time.
    """
    texts = tuple(ChatRow(f"prompt {index}", "answer one two three") for index in range(ROWS))
    train = TrainConfig(steps=1000, batch_size=BATCH, lr=1e-4)
    rows = RowSets(**dict.fromkeys(("user", "harmful", "safety", "ordinary", "borderline", "identity"), texts))
    if name == "sft":
        return sft_recipe(rows, train)
    brief = {"inner_steps": 2, "every": 1} if short and name == "tar" else {}
    method = choose(name, "harden", {**SETTINGS.get(name, {}), **brief}).method
    return method.recipe(rows, train)


class Steps:
    """A training run that is advanced one step at a time."""

    def __init__(self, name: str, place: Place, stack: contextlib.ExitStack, *, short: bool = False) -> None:
        model = place.model()
        tokenizer = load("lab:workshop/aligned", offline=True).tokenizer
        adapter = attach_lora(model, rank=32, alpha=64.0, seed=0) if place.size == "1b" else None
        recipe = recipe_of(name, short=short)
        weights = stack.enter_context(_trained(model, recipe.frozen(model), keep_flags=adapter is not None))
        vocab = model.config.vocab_size
        rows = {
            feed: place.rows(vocab, len(recipe.feeds[feed].rows), number) for number, feed in enumerate(recipe.feeds, 1)
        }
        self.run = Run(model, tokenizer, weights, rows, recipe, adapter=adapter)
        recipe.objective.begin(self.run.setup)
        self.device, self.done = place.device, 0

    def one(self) -> float:
        """Take a step and return its CPU seconds (on a GPU: wall seconds, when it is done)."""
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        began = clock()
        self.run._step(self.done)
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.done += 1
        return clock() - began


def ratios(names: list[str], place: Place, rounds: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of a step, and the multiple of the plain one, by method."""
    with contextlib.ExitStack() as stack:
        runs = {name: Steps(name, place, stack) for name in ("sft", *names)}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + WARM):
            for name, run in runs.items():
                took = run.one()
                if number >= WARM:
                    seconds[name].append(took)
    plain = seconds["sft"]
    return {
        name: {
            "seconds": statistics.median(own),
            "multiple": statistics.median(own) / statistics.median(plain),
            # Of the pairs of one round: what the multiple scatters by.
            "low": statistics.quantiles([one / two for one, two in zip(own, plain, strict=True)], n=4)[0],
            "high": statistics.quantiles([one / two for one, two in zip(own, plain, strict=True)], n=4)[2],
        }
        for name, own in seconds.items()
    }


def peak_bytes(name: str, place: Place) -> int:
    """Return how far two steps of a method raise the peak of this process over what was there before."""
    if place.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.ExitStack() as stack:
        run = Steps(name, place, stack, short=True)
        for _ in range(2):
            run.one()
    if place.device != "cpu":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def main() -> int:
    """Return 0 when every limited method stays within its multiple."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("lab", *SIZES), default="lab")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    place = Place(given.size, given.device, given.tokens)
    if given.peak:
        print(peak_bytes(given.peak, place))
        return 0
    names = given.names or methods()
    found = ratios(names, place, given.rounds)
    where = Place("60m", given.device, 64) if given.size == "lab" else place
    for name in found:
        words = ["--peak", name, "--size", where.size, "--device", where.device, "--tokens", str(where.tokens)]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tuning_cost", *words], capture_output=True, text=True, check=False
        )
        found[name]["peak_mb"] = int(done.stdout) / 1e6 if done.returncode == 0 else float("nan")
    print(f"{'method':<18}{'x plain step':>13}{'quartiles':>16}{'peak MB':>10}{'limit':>8}   ({where.size}: peak)")
    for name, one in found.items():
        limit = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        spread = f"{one['low']:.2f}-{one['high']:.2f}"
        print(f"{name:<18}{one['multiple']:>13.2f}{spread:>16}{one['peak_mb']:>10.0f}{limit:>8}")
    if given.json:
        given.json.write_text(json.dumps({"size": given.size, "methods": found}, indent=2) + "\n", encoding="utf-8")
    return int(any(found[name]["multiple"] > limit for name, limit in LIMITS.items() if name in found))


if __name__ == "__main__":
    sys.exit(main())
