# SPDX-License-Identifier: Apache-2.0
"""What the engine promises whatever the method: identities to the bit, and bytes that do not depend on how the work is
cut, by whom it is done, or how the inputs lie on disk."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from keelwright.core.catalogue import catalogue
from keelwright.core.protocols import Reach, TensorEntry, WeightEdit
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.dtypes import STORED_NAMES
from keelwright.repair.build import model_limits
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.repair.slerp import Slerp, SlerpConfig
from keelwright.repair.task_arithmetic import TaskArithmetic
from keelwright.weights import workers
from keelwright.weights.edit import model_roles
from keelwright.weights.plan import plan_edit
from keelwright.weights.stream import effective_reach, evaluate
from keelwright.weights.survey import with_survey
from keelwright.weights.write import Effort, materialise

Model = dict[str, Tensor]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EDGES = {
    # Both zeros, the smallest numbers with and without their full precision, one beside its neighbours, large ones.
    dtype: torch.tensor(
        [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 4, 1.0, 1.0 + info.eps, 1.0 - info.eps / 2, info.max / 4],
        dtype=dtype,
    )
    for dtype in DTYPES
    for info in [torch.finfo(dtype)]
}  # fmt: skip
SHAPES = st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32)
brief = settings(max_examples=15, deadline=None)
few = settings(max_examples=4, deadline=None)


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def entries(self) -> Mapping[str, TensorEntry]:
        return {
            name: TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self) -> str:
        return "memory"


def build(method: type, models: int, config: Any = None) -> Any:
    """Return the method's edit with its default settings, for so many tuned models."""
    fields = {field.name for field in dataclasses.fields(method)}
    extra = {"models": models} if "models" in fields else {}
    return method(config or method.config_class(), **extra)


def default_edits() -> Iterator[tuple[str, WeightEdit]]:
    """Give every method that needs nothing but models, with as few tuned ones as it takes, and with three."""
    for line in catalogue().values():
        method = line.load()
        if line.room != "repair" or getattr(method, "ingredients", ()):
            continue
        least, most = model_limits(method)
        wanted = {least} | ({3} if most is None else set())
        for models in sorted(wanted):
            # Of several models 'linear' wants to know their weights.
            config = LinearConfig(weight=1.0) if method is Linear and models > 1 else None
            yield f"{line.name}-{models}", build(method, models, config)


EDITS = dict(default_edits())
every_method = pytest.mark.parametrize("name", EDITS)


def draw(seed: int, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return random values; the first ones are the edges of the dtype."""
    values = (scale * torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))).to(dtype).reshape(-1)
    edges = EDGES[dtype][: values.numel()]
    values[: len(edges)] = edges
    return values.view(tuple(shape))


def family(edit: WeightEdit, seed: int, *, dtype: torch.dtype = torch.float32) -> dict[str, Model]:
    """Return a small model for each role of an edit: all near the first."""
    shapes = {
        "model.layers.0.self_attn.q_proj.weight": (9, 7),
        "model.layers.1.mlp.down_proj.weight": (5, 13),
        "model.layers.1.mlp.experts": (2, 3, 5),
        "model.norm.weight": (11,),
    }
    found: dict[str, Model] = {}
    for number, role in enumerate(edit.roles()):
        found[role] = {}
        for place, (name, shape) in enumerate(shapes.items()):
            parent = torch.randn(shape, generator=torch.Generator().manual_seed(seed + place))
            own = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 100 * (number + 1) + place))
            found[role][name] = (parent + 0.1 * own).to(dtype)
    return found


def bits(values: Tensor) -> bytes:
    return values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def evaluated(edit: WeightEdit, models: Mapping[str, Mapping[str, Tensor]], *, chunk: int = 1 << 18) -> Model:
    """Return the model that an edit makes."""
    sources = {role: Memory(one) for role, one in models.items()}
    entries = sources[edit.roles()[-1]].entries()
    edit = with_survey(edit, sources, entries.values())
    return {
        name: torch.cat([part for _, part in evaluate(edit, sources, entry, chunk_elements=chunk)]).view(entry.shape)
        for name, entry in entries.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["linear", "slerp"])
@brief
@given(seed=SEEDS, shape=SHAPES, chunk=st.integers(1, 40))
def test_coefficient_zero_and_one_give_the_bytes_of_an_input(
    method: str, dtype: torch.dtype, seed: int, shape: tuple[int, ...], chunk: int
) -> None:
    models = {"aligned": {"w": draw(seed, shape, dtype=dtype)}, "tuned": {"w": draw(seed + 1, shape, dtype=dtype)}}
    models["tuned"]["w"] = models["tuned"]["w"].neg()
    for coefficient, role in ((0.0, "aligned"), (1.0, "tuned")):
        edit = Linear(LinearConfig(coefficient)) if method == "linear" else Slerp(SlerpConfig(coefficient))
        assert bits(evaluated(edit, models, chunk=chunk)["w"]) == bits(models[role]["w"])


@every_method
@brief
@given(seed=SEEDS, shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_merging_a_model_with_itself_gives_that_model(
    name: str, seed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    edit = EDITS[name]
    values = draw(seed, shape, dtype=dtype)
    # Norms are summed in float64: numbers whose squares have no room there are no weights.
    values[values.abs() > 1e100] = 3.0
    values[(values != 0) & (values.abs().double() < 1e-150)] = 1e-20
    models = {role: {"model.layers.0.mlp.up_proj.weight": values} for role in edit.roles()}
    made = evaluated(edit, models, chunk=7)["model.layers.0.mlp.up_proj.weight"]
    assert made.dtype is dtype
    # A sum may give a negative zero the other sign; nothing else may change, not in the last place.
    assert torch.equal(made, values)


@brief
@given(seed=SEEDS, shape=SHAPES, dtype=st.sampled_from(DTYPES))
def test_one_whole_task_vector_gives_the_tuned_model_exactly(
    seed: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    models = {"aligned": {"w": draw(seed, shape, dtype=dtype)}, "tuned": {"w": draw(seed + 1, shape, dtype=dtype) * -2}}
    assert bits(evaluated(TaskArithmetic(), models)["w"]) == bits(models["tuned"]["w"])


# The random masks of these are keyed by the place of a model.
KEYED_BY_PLACE = ("dare_linear", "dare_ties", "della", "della_linear")
SYMMETRIC = [
    name
    for name, edit in EDITS.items()
    if getattr(edit, "models", 1) > 1 and name.partition("-")[0] not in KEYED_BY_PLACE
]


@pytest.mark.parametrize("name", SYMMETRIC)
@few
@given(seed=SEEDS)
def test_the_order_of_equally_weighted_models_changes_rounding_at_most(name: str, seed: int) -> None:
    edit = EDITS[name]
    models = family(edit, seed)
    tuned = model_roles(edit.models)  # type: ignore[attr-defined]
    first = evaluated(edit, models)
    for order in itertools.permutations(tuned):
        other = evaluated(edit, {**models, **{role: models[source] for role, source in zip(tuned, order, strict=True)}})
        for key, values in first.items():
            assert torch.allclose(other[key], values, rtol=1e-5, atol=1e-6), key


@every_method
@few
@given(seed=SEEDS, chunks=st.lists(st.integers(1, 80), min_size=2, max_size=2), dtype=st.sampled_from(DTYPES[:2]))
def test_the_bits_do_not_depend_on_the_size_of_the_chunks(
    name: str, seed: int, chunks: list[int], dtype: torch.dtype
) -> None:
    edit = EDITS[name]
    models = family(edit, seed, dtype=dtype)
    whole = evaluated(edit, models)
    for chunk in chunks:
        made = evaluated(edit, models, chunk=chunk)
        assert all(bits(made[key]) == bits(whole[key]) for key in whole)


def store(folder: Path, tensors: Mapping[str, Tensor], *, files: int) -> Checkpoint:
    """Write a checkpoint dealt out over so many files, and open it."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    files = min(files, len(tensors))
    index = {}
    for number in range(files):
        file = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % files == number}
        save_file(part, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return Checkpoint(folder)


def written(
    edit: WeightEdit, sources: Mapping[str, Checkpoint], out: Path, *, limit: int, companions: Path, **effort: Any
) -> dict[str, bytes]:
    """Write an edit and return the bytes of each tensor, and those of each file."""
    plan = plan_edit(edit, sources, max_shard_bytes=limit)
    materialise(plan, out, companions_from=companions, effort=Effort(**effort))
    found = {f"file {path.name}": path.read_bytes() for path in sorted(out.glob("*.safetensors"))}
    for path in sorted(out.glob("*.safetensors")):
        found.update({name: bits(tensor) for name, tensor in load_file(path).items()})
    shutil.rmtree(out)
    return found


def without_files(found: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name: raw for name, raw in found.items() if not name.startswith("file ")}


def one_of_each_reach() -> list[str]:
    """Return, for each way in which tensors are read, the first method that reads one so."""
    entry = TensorEntry("model.layers.0.self_attn.q_proj.weight", "F32", (9, 7))
    found: dict[tuple[Reach, int], str] = {}
    for name, edit in EDITS.items():
        found.setdefault((effective_reach(edit, entry), min(2, edit.passes(entry.name))), name)
    return list(found.values())


@pytest.mark.parametrize("name", one_of_each_reach())
@few
@given(seed=SEEDS, files=st.integers(2, 4), limit=st.integers(1, 700), task=st.integers(1, 400))
def test_the_bytes_do_not_depend_on_workers_nor_on_how_inputs_and_outputs_are_cut(
    name: str, seed: int, files: int, limit: int, task: int
) -> None:
    edit = EDITS[name]
    models = family(edit, seed, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary, mock.patch.object(workers, "TASK_BYTES", task):
        place = Path(temporary)
        cut = {role: store(place / "cut" / role, one, files=files) for role, one in models.items()}
        plain = {role: store(place / "plain" / role, one, files=1) for role, one in models.items()}
        layout = place / "plain" / edit.roles()[-1]
        write = functools.partial(written, edit, companions=layout)
        whole = write(plain, place / "out", limit=10**9, workers=1)
        assert without_files(whole) == {key: bits(one) for key, one in evaluated(edit, models).items()}
        # Another cut of an input is another input to the record in the header; the data stay.
        assert without_files(write(cut, place / "out", limit=10**9, workers=1)) == without_files(whole)
        shards = write(plain, place / "out", limit=limit, workers=1)
        assert without_files(shards) == without_files(whole)
        for count, chunk in ((2, 16), (3, 5)):
            assert write(plain, place / "out", limit=limit, workers=count, chunk_elements=chunk) == shards
