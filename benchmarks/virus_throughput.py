# SPDX-License-Identifier: Apache-2.0
"""Candidates of the Virus search per second, as one batch beside one at a time, as ratios within one run.

One at a time is plain autograd: a forward and backward pass for each candidate, then the cosine of its gradient. That
is what the official code does, without the copy of the model that it makes for each. Repeats are interleaved, so that a
busy machine slows both. Prints one JSON document and exits 1 when a ratio of medians is below the floor.

    python -m benchmarks.virus_throughput [--repeats 5] [--candidates 64] [--lora-rank 8]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time

import torch

from keelwright.models.loading import load
from keelwright.stress.virus_objective import GradientTerm, Slot
from keelwright.training.lora import attach_lora
from keelwright.training.per_sample import cosine, trained_tensors
from keelwright.training.rows import encode_rows
from keelwright.worlds.workshop.materials import workshop_rows

FLOORS = {"weights": 1.2, "adapter": 1.5}
"""Measured under load on two CPU cores: 1.7 and 2.9. Arithmetic, not waiting, bounds a batch there."""
ORGANISM = "lab:workshop/aligned"


def one_at_a_time(term: GradientTerm, choices: torch.Tensor) -> torch.Tensor:
    """Return the same cosines by plain autograd."""
    parameters = {name: one for name, one in term.module.named_parameters() if name in term.weights}
    found = []
    for ids in term.slot.fill(choices):
        logits = term.module(input_ids=ids[None], use_cache=False).logits[0, term.prompt_tokens - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, ids[term.prompt_tokens :])
        gradient = torch.autograd.grad(loss, list(parameters.values()))
        found.append(cosine(dict(zip(parameters, gradient, strict=True)), term.target))
    return torch.stack(found)


def compare(rank: int, *, candidates: int, repeats: int) -> dict[str, float]:
    """Return the median candidates per second of both ways, their ratio, and the largest difference of a cosine."""
    model, rows = load(ORGANISM, dtype=torch.float32, offline=True), workshop_rows(0)
    adapter = attach_lora(model.module, rank=rank, alpha=2.0 * rank, seed=0) if rank else None
    (row,) = encode_rows(model.tokenizer, rows.user[:1], module=model.module)
    harmful = torch.tensor(model.tokenizer(f" {rows.harmful[0].prompt} {rows.harmful[0].answer}")["input_ids"])
    slot = Slot(row.ids[:-1], row.ids[-1:])
    term = GradientTerm(model.module, trained_tensors(model.module), slot, row.prompt_tokens, harmful, chunk=32)
    choices = harmful.repeat(candidates, 1)
    places = torch.arange(candidates)
    choices[places, places % len(harmful)] = 20 + places
    ways = {"one at a time": lambda: one_at_a_time(term, choices), "batch": lambda: term.cosines(choices)[0]}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            began = time.process_time()
            found[name] = way()
            if repeat:  # The first round warms up.
                rates[name].append(candidates / (time.process_time() - began))
    if adapter is not None:
        adapter.detach()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    worst = float((found["batch"] - found["one at a time"]).abs().max())
    return {**medians, "ratio": medians["batch"] / medians["one at a time"], "largest difference": worst}


def main() -> int:
    """Time both ways for full weights and for an adapter, print the comparison, and return the exit code."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--candidates", type=int, default=64)
    options.add_argument("--lora-rank", type=int, default=8)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found = {
        name: compare(rank, candidates=chosen.candidates, repeats=chosen.repeats)
        for name, rank in (("weights", 0), ("adapter", chosen.lora_rank))
    }
    report = {
        "model": ORGANISM,
        "candidates": chosen.candidates,
        "candidates_per_cpu_second": found,
        "floors": FLOORS,
        "machine": {"platform": platform.platform(), "torch": torch.__version__, "threads": torch.get_num_threads()},
    }
    print(json.dumps(report, indent=2))
    return int(any(found[name]["ratio"] < floor for name, floor in FLOORS.items()))


if __name__ == "__main__":
    sys.exit(main())
