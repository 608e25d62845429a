# SPDX-License-Identifier: Apache-2.0
"""What writing a linear merge costs beside copying as many bytes, as a ratio within one run, and its memory.

Both sides read warm files and make their output durable (fsync). Repeats are interleaved, so that a busy machine slows
both. Each merge runs in a process of its own, whose peak memory is compared with that of a process that only imports
the same modules. Prints one JSON document and exits 1 when a budget is exceeded.

    python -m benchmarks.weights [--layers 1] [--repeats 3]

One layer makes 350 MB; `--layers 22` is a model of 1.1 billion parameters and needs 12 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from keelwright.models.checkpoint import Checkpoint
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.plan import plan_edit
from keelwright.weights.write import materialise

RATIO_BUDGET = 6.0
"""Wall time of the merge over that of the copy: 3.3 on two cores, with room for a busy machine. A quarter of the merge
is the digest of the inputs, which the copy does not take."""
MEMORY_BUDGET = 300_000_000
"""Peak resident bytes beyond what importing the modules takes."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def write_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """Write a random bfloat16 Llama, one shard per four layers."""
    folder.mkdir()
    width, inner, keys = 2048, 5632, 256
    layer = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, width),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
    }
    groups: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (32000, width), "model.norm.weight": (width,), "lm_head.weight": (32000, width)}
    ]
    for first in range(0, layers, 4):
        groups.append(
            {
                f"model.layers.{index}.{name}": shape
                for index in range(first, min(layers, first + 4))
                for name, shape in layer.items()
            }
        )
    random = torch.Generator().manual_seed(seed)
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: (0.02 * torch.randn(shape, generator=random)).to(torch.bfloat16) for name, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


def merge(place: Path, out: Path) -> None:
    """Merge the two checkpoints and print seconds, CPU seconds and peak memory."""
    sources = {role: Checkpoint(place / role, role) for role in ("aligned", "tuned")}
    started = time.perf_counter()
    plan = plan_edit(Linear(LinearConfig(0.4)), sources, out=out)
    planned = time.perf_counter()
    materialise(plan, out, companions_from=place / "tuned")
    usage = resource.getrusage(resource.RUSAGE_SELF)
    row = {
        "seconds": time.perf_counter() - started,
        "plan_seconds": planned - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak_bytes(),
        "bytes": plan.total_bytes,
    }
    print(json.dumps(row))


def peak_bytes() -> int:
    """Return the most resident memory that this process ever had."""
    # Not ru_maxrss: after a fork it starts from the parent's.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def in_child(*arguments: str) -> dict[str, float]:
    """Run this file's inner side in a process of its own and return what it prints."""
    command = [sys.executable, "-m", "benchmarks.weights", *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def copy_seconds(source: Path, out: Path) -> float:
    """Copy every weight file durably, and return the wall time."""
    out.mkdir()
    started = time.perf_counter()
    for file in sorted(source.glob("*.safetensors")):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - started


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inner", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.idle:
        print(json.dumps({"peak_bytes": peak_bytes()}))
        return 0
    if options.inner:
        merge(*options.inner)
        return 0
    idle = in_child("--idle")["peak_bytes"]
    merges, copies = [], []
    with tempfile.TemporaryDirectory(prefix="keelwright-bench-") as text:
        place = Path(text)
        write_checkpoint(place / "aligned", options.layers, 1)
        write_checkpoint(place / "tuned", options.layers, 2)
        for _ in range(options.repeats):
            copies.append(copy_seconds(place / "tuned", place / "copy"))
            shutil.rmtree(place / "copy")
            merges.append(in_child("--inner", str(place), str(place / "out")))
            shutil.rmtree(place / "out")
    wall = statistics.median(row["seconds"] for row in merges)
    peak = max(row["peak_bytes"] for row in merges) - idle
    ratio = wall / statistics.median(copies)
    result = {
        "ratio": round(ratio, 3),
        "ratio_budget": RATIO_BUDGET,
        "merge_seconds": [round(row["seconds"], 3) for row in merges],
        "plan_seconds": [round(row["plan_seconds"], 3) for row in merges],
        "cpu_seconds": [round(row["cpu_seconds"], 3) for row in merges],
        "copy_seconds": [round(one, 3) for one in copies],
        "output_bytes": int(merges[0]["bytes"]),
        "peak_bytes_above_import": int(peak),
        "memory_budget": MEMORY_BUDGET,
        "import_bytes": int(idle),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    print(json.dumps(result, indent=2))
    return int(ratio > RATIO_BUDGET or peak > MEMORY_BUDGET)


if __name__ == "__main__":
    sys.exit(main())
