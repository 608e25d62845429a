# SPDX-License-Identifier: Apache-2.0
"""What weight arithmetic costs beside copying as many bytes, and beside mergekit where one is installed.

Three random bfloat16 Llama checkpoints in three shards each; every recipe is a whole command in a process of its own,
imports included, with warm files. Wall and CPU seconds of the command and all its workers; resident memory is sampled
over the whole process tree (peak per process, peak of the sum, peak of the anonymous part). Repeats are interleaved
with the copies, so that a busy machine slows all alike. Prints a table and writes JSON; exits 1 when a limit is
exceeded.

    make bench-weights
    python -m benchmarks.weights [--layers 22] [--repeats 3] [--recipes linear,ties] [--mergekit DIR/bin/mergekit-yaml]

22 layers make 1.1 billion parameters (2.2 GB a checkpoint, 20 GB of disk in all); `--layers 1` is a quick look.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

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
SHARDS = 3
MODELS = ("aligned", "tuned", "tuned_2")
COEFFICIENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Recipe:
    """One row of the table: the command's words, the same thing for mergekit, and the limits."""

    name: str
    words: tuple[str, ...]
    mergekit: dict[str, Any] | None = None
    wall_limit: float | None = None
    """Wall time over that of the copy; of as many copies and one reading where there are several outputs."""
    cpu_limit: float | None = None
    """CPU time over mergekit's."""
    models: int = 2
    outputs: int = 1


def _models(count: int, **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": dict(parameters)} for name in MODELS[1 : 1 + count]]


_BASE = {"base_model": "aligned", "dtype": "bfloat16"}
_THREE = ("--aligned", "aligned", "--tuned", "tuned", "--tuned", "tuned_2")
RECIPES = (
    Recipe(
        "linear",
        ("linear", "--aligned", "aligned", "--tuned", "tuned", "--coefficient", "0.4"),
        {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [
                {"model": "aligned", "parameters": {"weight": 0.6}},
                {"model": "tuned", "parameters": {"weight": 0.4}},
            ],
        },
        wall_limit=1.8,
        cpu_limit=0.4,
    ),
    Recipe(
        "slerp",
        ("slerp", "--aligned", "aligned", "--tuned", "tuned", "--coefficient", "0.4"),
        {
            "merge_method": "slerp",
            **_BASE,
            "models": [{"model": "aligned"}, {"model": "tuned"}],
            "parameters": {"t": 0.4},
        },
        wall_limit=2.0,
        cpu_limit=0.5,
    ),
    Recipe(
        "task_arithmetic",
        ("task_arithmetic", *_THREE, "--set", "weight=[0.3,0.3]"),
        {"merge_method": "task_arithmetic", **_BASE, "models": _models(2, weight=0.3)},
        wall_limit=2.2,
        cpu_limit=0.5,
        models=3,
    ),
    Recipe(
        "ties",
        ("ties", *_THREE, "--set", "density=0.2"),
        {"merge_method": "ties", **_BASE, "models": _models(2, weight=1.0, density=0.2)},
        cpu_limit=0.12,
        models=3,
    ),
    Recipe(
        "dare_ties",
        ("dare_ties", *_THREE, "--set", "density=0.5"),
        {"merge_method": "dare_ties", **_BASE, "models": _models(2, weight=1.0, density=0.5)},
        cpu_limit=0.3,
        models=3,
    ),
    Recipe(
        "linear, 8 coefficients written",
        ("linear", "--aligned", "aligned", "--tuned", "tuned", "--coefficient", ",".join(map(str, COEFFICIENTS))),
        wall_limit=1.0,
        outputs=8,
    ),
)
RSS_LIMIT, SUM_LIMIT = 300 * MEGABYTE, 600 * MEGABYTE
LIVE_LIMIT = 2.5
"""Wall of eight coefficients on a live model over that of one; each begins with opening and loading."""


def write_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """Write a random bfloat16 Llama in three shards: seed 1 is the parent, others differ from it by 5 %."""
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
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32000, width)}
    for index in range(layers):
        shapes.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    shapes.update({"model.norm.weight": (width,), "lm_head.weight": (32000, width)})
    random, change = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(SHARDS)]
    position = 0
    for name, shape in shapes.items():
        files[min(SHARDS - 1, position * SHARDS // total)][name] = shape
        position += torch.Size(shape).numel()
    weight_map = {}
    for number, group in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        tensors = {}
        for name, shape in group.items():
            values = torch.empty(shape).normal_(0.0, 0.02, generator=random)
            if seed != 1:
                values += torch.empty(shape).normal_(0.0, 0.001, generator=change)
            tensors[name] = values.to(torch.bfloat16)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(group, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))


@dataclass
class Usage:
    """What a command took."""

    wall: float
    cpu: float
    peak_process: int = 0
    peak_sum: int = 0
    peak_anonymous: int = 0


@dataclass
class Row:
    """All repeats of one recipe."""

    recipe: str
    ours: list[Usage] = field(default_factory=list)
    copies: list[Usage] = field(default_factory=list)
    theirs: list[Usage] = field(default_factory=list)


def measured(command: list[str], cwd: Path) -> Usage:
    """Run a command and return what it and all its children took."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=said, stderr=said)
        watch = _Watch(process.pid)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.done.set()
        watch.join()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read().decode(errors='replace')[-2000:]}")
    return Usage(wall, usage.ru_utime + usage.ru_stime, watch.process, watch.total, watch.anonymous)


class _Watch(threading.Thread):
    """Samples the memory of a process tree until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.done = threading.Event()
        self.process = self.total = self.anonymous = 0

    def run(self) -> None:
        while not self.done.wait(0.05):
            total = anonymous = 0
            for pid in _tree(self.pid):
                status = _status(pid)
                total += status.get("VmRSS", 0)
                anonymous += status.get("RssAnon", 0)
                self.process = max(self.process, status.get("VmRSS", 0))
            self.total, self.anonymous = max(self.total, total), max(self.anonymous, anonymous)


def _tree(pid: int) -> list[int]:
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        found.append(one)
        try:
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _status(pid: int) -> dict[str, int]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    rows = dict(line.split(":", 1) for line in lines)
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon") if name in rows}


def copy_usage(source: Path, out: Path, copies: int = 1) -> Usage:
    """Copy every weight file with `cp` and make it durable, as the command does; several copies after one reading."""
    out.mkdir()
    places = [out / str(number) for number in range(copies)]
    for place in places:
        place.mkdir()
    files = " ".join(f"'{file.resolve()}'" for file in sorted(source.glob("*.safetensors")))
    reading = f"cat {files} > /dev/null; " if copies > 1 else ""
    script = reading + " && ".join(f"cp {files} '{place.resolve()}'" for place in places)
    script += " && sync " + " ".join(f"'{place.resolve()}'/*" for place in places)
    try:
        return measured(["bash", "-c", script], out.parent)
    finally:
        shutil.rmtree(out)


def run_ours(recipe: Recipe, place: Path) -> Usage:
    """Run a recipe with keelwright."""
    command = [str(Path(sys.executable).with_name("keelwright")), "repair", *recipe.words, "--out", "out", "--quiet"]
    try:
        return measured(command, place)
    finally:
        shutil.rmtree(place / "out", ignore_errors=True)
        shutil.rmtree(place / "out.partial", ignore_errors=True)


def run_mergekit(recipe: Recipe, place: Path, program: Path) -> Usage:
    """Run the same recipe with mergekit, a separate program."""
    import yaml

    # A bare name would be looked for on the hub.
    text = json.dumps(recipe.mergekit)
    for name in MODELS:
        text = text.replace(f'"{name}"', f'"{(place / name).resolve()}"')
    (place / "recipe.yaml").write_text(yaml.safe_dump(json.loads(text)))
    command = [str(program), "recipe.yaml", "out-mk", "--no-copy-tokenizer", "--quiet"]
    try:
        return measured(command, place)
    finally:
        shutil.rmtree(place / "out-mk", ignore_errors=True)


def live(place: Path, count: int) -> None:
    """Apply so many coefficients to a live model, from opening to undoing, and print the seconds."""
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM

    from keelwright.models.checkpoint import Checkpoint
    from keelwright.repair.linear import Linear, LinearConfig
    from keelwright.weights.live import LiveTrial

    started = time.perf_counter()
    sources = {role: Checkpoint(place / role) for role in MODELS[:2]}
    module = AutoModelForCausalLM.from_pretrained(place / "tuned", dtype=torch.bfloat16)
    loaded = time.perf_counter()
    trial = LiveTrial(module, sources)
    for coefficient in COEFFICIENTS[:count]:
        trial.apply(Linear(LinearConfig(coefficient)))
    print(json.dumps({"seconds": time.perf_counter() - started, "load": loaded - started}))


def run_live(place: Path, count: int) -> dict[str, float]:
    """Run `live` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.weights", "--live", str(place), str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def median(values: list[float]) -> float:
    """Return the median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")


def row_of(recipe: Recipe, row: Row) -> dict[str, Any]:
    """Return one line of the table; copies are those of the same repeats."""
    copy_wall = median([one.wall for one in row.copies])
    wall, cpu = median([one.wall for one in row.ours]), median([one.cpu for one in row.ours])
    their_wall, their_cpu = median([one.wall for one in row.theirs]), median([one.cpu for one in row.theirs])
    found = {
        "recipe": recipe.name,
        "wall": wall,
        "cpu": cpu,
        "wall_over_cp": wall / copy_wall,
        "wall_limit": recipe.wall_limit,
        "cpu_over_mergekit": cpu / their_cpu,
        "cpu_limit": recipe.cpu_limit,
        "wall_over_mergekit": wall / their_wall,
        "mergekit_wall": their_wall,
        "mergekit_cpu": their_cpu,
        "mergekit_peak": max((one.peak_process for one in row.theirs), default=None),
        "peak_process": max(one.peak_process for one in row.ours),
        "peak_sum": max(one.peak_sum for one in row.ours),
        "peak_anonymous": max(one.peak_anonymous for one in row.ours),
    }
    missed = []
    if recipe.wall_limit is not None and found["wall_over_cp"] > recipe.wall_limit:
        missed.append("wall")
    if recipe.cpu_limit is not None and found["cpu_over_mergekit"] > recipe.cpu_limit:
        missed.append("cpu")
    if found["peak_process"] > RSS_LIMIT or found["peak_sum"] > SUM_LIMIT:
        missed.append("memory")
    return {**found, "missed": missed}


def show(rows: list[dict[str, Any]], copies: list[Usage], sweep: dict[str, Any]) -> None:
    """Print the table."""
    print(f"cp: {median([one.wall for one in copies]):.2f} s wall, {median([one.cpu for one in copies]):.2f} s CPU")
    head = (
        "recipe",
        "wall s",
        "CPU s",
        "/cp",
        "limit",
        "CPU/mk",
        "limit",
        "wall/mk",
        "MB/proc",
        "MB sum",
        "MB anon",
        "",
    )
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        cells = [
            row["recipe"], f"{row['wall']:.2f}", f"{row['cpu']:.2f}",
            f"{row['wall_over_cp']:.2f}", row["wall_limit"] or "",
            f"{row['cpu_over_mergekit']:.3f}", row["cpu_limit"] or "", f"{row['wall_over_mergekit']:.3f}",
            *(f"{row[name] / MEGABYTE:.0f}" for name in ("peak_process", "peak_sum", "peak_anonymous")),
            "missed: " + ", ".join(row["missed"]) if row["missed"] else "",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |")
    if sweep:
        print(
            f"live: one coefficient {sweep['one']:.2f} s (of which loading {sweep['load']:.2f} s), "
            f"eight {sweep['eight']:.2f} s: {sweep['ratio']:.2f} x, limit {LIVE_LIMIT}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipes", default="")
    parser.add_argument("--mergekit", type=Path, default=os.environ.get("MERGEKIT_YAML"))
    parser.add_argument("--place", type=Path, help="where the files go; kept if given")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--live", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.live:
        live(Path(options.live[0]), int(options.live[1]))
        return 0
    wanted = [one for one in options.recipes.split(",") if one]
    recipes = [one for one in RECIPES if not wanted or one.name.split(",")[0] in wanted]
    with tempfile.TemporaryDirectory(prefix="keelwright-bench-") as text:
        place = options.place or Path(text)
        place.mkdir(exist_ok=True)
        for seed, name in enumerate(MODELS, start=1):
            if not (place / name).exists():
                write_checkpoint(place / name, options.layers, seed)
        rows = {one.name: Row(one.name) for one in recipes}
        for _ in range(options.repeats):
            for recipe in recipes:
                rows[recipe.name].copies.append(copy_usage(place / "tuned", place / "copy", recipe.outputs))
                rows[recipe.name].ours.append(run_ours(recipe, place))
                if options.mergekit and recipe.mergekit:
                    rows[recipe.name].theirs.append(run_mergekit(recipe, place, options.mergekit))
        sweep = {}
        if not wanted:
            one, eight = ([run_live(place, count) for _ in range(options.repeats)] for count in (1, len(COEFFICIENTS)))
            sweep = {
                "one": median([each["seconds"] for each in one]),
                "eight": median([each["seconds"] for each in eight]),
                "load": median([each["load"] for each in one]),
            }
            sweep["ratio"] = sweep["eight"] / sweep["one"]
    lines = [row_of(recipe, rows[recipe.name]) for recipe in recipes]
    show(lines, [one for recipe in recipes if recipe.outputs == 1 for one in rows[recipe.name].copies], sweep)
    document = {
        "layers": options.layers,
        "repeats": options.repeats,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "copy_wall": {name: [one.wall for one in row.copies] for name, row in rows.items()},
        "rows": lines,
        "live": sweep,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row["missed"] for row in lines) or (bool(sweep) and sweep["ratio"] > LIVE_LIMIT))


if __name__ == "__main__":
    sys.exit(main())
