# SPDX-License-Identifier: Apache-2.0
"""Outputs in F8 again: fresh scales of every granularity, errors within half a step, the same bits in any cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.core.protocols import TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.float8 import Float8Checkpoint, Scaling, lines_of_rows, open_checkpoint, scales_of_range
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.plan import plan_edit
from keelwright.weights.requantise import (
    block_maxima,
    fresh_scales,
    plan_requantised,
    stored_scales,
    to_float8,
)
from keelwright.weights.stream import as_bytes, evaluate
from keelwright.weights.write import Effort, materialise

UP, NORM = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
LIMITS = {"F8_E4M3": (torch.float8_e4m3fn, 2.0**-4, 2.0**-10), "F8_E5M2": (torch.float8_e5m2, 2.0**-3, 2.0**-17)}
"""dtype; half a step of normal numbers, relative; half a step of subnormal ones."""

GRIDS = {
    "tensor": ((), None),
    "row": ((10, 1), None),
    "column": ((1, 7), None),
    "block": ((3, 3), [4, 3]),
}


def scaling(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, ...]) -> Scaling:
    return Scaling(TensorEntry("w", "F8_E4M3", shape), TensorEntry("s", "F32", grid), grid, block)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def quantised(
    folder: Callable[..., Path],
    name: str,
    values: Tensor,
    grid: str = "block",
    *,
    dtype: str = "F8_E4M3",
    scale_dtype: str = "F32",
    files: int = 1,
    **extra: Tensor,
) -> Float8Checkpoint:
    """Write an F8 checkpoint of one weight by the slow, obvious way."""
    shape, size = GRIDS[grid]
    scale = torch.empty(shape or (1, 1))
    rows, columns = -(-values.shape[0] // scale.shape[0]), -(-values.shape[1] // scale.shape[1])
    if size is not None:
        rows, columns = size
    out = torch.empty_like(values).to(LIMITS[dtype][0])
    most = torch.finfo(LIMITS[dtype][0]).max
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            peak = float(values[part].abs().max())
            scale[i, j] = fresh_scales(torch.tensor([peak]), dtype, scale_dtype)[0]
            out[part] = (values[part] / scale[i, j]).clamp(-most, most).to(out.dtype)
    settings = {"quant_method": "fp8", **({"weight_block_size": size} if size else {})}
    stored = stored_scales(scale.view(shape), scale_dtype)
    tensors = {UP: out, f"{UP}_scale_inv": stored, NORM: torch.ones(7).bfloat16(), **extra}
    source = open_checkpoint(folder(name, tensors, files=files, quantization_config=settings))
    assert isinstance(source, Float8Checkpoint)
    return source


def require_half_a_step(wanted: Tensor, found: Tensor, scales: Tensor, dtype: str) -> None:
    _, relative, absolute = LIMITS[dtype]
    bound = torch.maximum(wanted.abs() * relative, scales * absolute)
    assert (((found - wanted).abs() - bound) <= 1e-6 * wanted.abs() + 1e-12).all()


def computed(plan: Any, name: str) -> Tensor:
    entry = next(one.entry for one in plan.tensors if one.entry.name == name)
    return torch.cat([part for _, part in evaluate(plan.edit, plan.sources, entry)])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F8_E8M0", "U8"])
def test_a_written_output_is_within_half_a_step_of_the_edit(
    make_folder: Callable[..., Path], tmp_path: Path, grid: str, dtype: str, scale_dtype: str
) -> None:
    sources = {
        role: quantised(make_folder, role, weights(10, 7, seed=seed), grid, dtype=dtype, scale_dtype=scale_dtype)
        for seed, role in enumerate(("aligned", "tuned"))
    }
    edit = Linear(LinearConfig(0.4))
    plan = plan_requantised(edit, sources)
    materialise(plan, tmp_path / "out", companions_from=sources["tuned"].folder, effort=Effort(workers=1))
    found = open_checkpoint(tmp_path / "out")
    assert isinstance(found, Float8Checkpoint)
    assert found.stored_entries() == sources["tuned"].stored_entries()
    exact = torch.lerp(*(source.read(UP, 0, 70).double() for source in sources.values()), 0.4).float()
    scales = scales_of_range(found.scalings[UP], found._scale(found.scalings[UP]), 0, 70)
    assert (scales > 0).all()
    assert torch.isfinite(scales).all()
    slack = 1.0 + 2.0**-8 if scale_dtype == "BF16" else 1.0
    require_half_a_step(exact, found.read(UP, 0, 70), scales * slack, dtype)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == sources["tuned"].settings
    assert torch.equal(found.read(NORM, 0, 7), torch.ones(7).bfloat16())


@pytest.mark.parametrize("coefficient", [0.0, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
def test_what_is_copied_keeps_its_bytes(make_folder: Callable[..., Path], coefficient: float, grid: str) -> None:
    sources = {
        role: quantised(make_folder, role, weights(10, 7, seed=seed), grid)
        for seed, role in enumerate(("aligned", "tuned"))
    }
    plan = plan_requantised(Linear(LinearConfig(coefficient)), sources)
    wanted = sources["aligned" if coefficient == 0.0 else "tuned"]
    for name, entry in wanted.stored_entries().items():
        assert bytes(as_bytes(computed(plan, name))) == bytes(wanted.read_bytes(name, 0, entry.elements).numpy().data)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_model_merged_with_itself_keeps_its_numbers(make_folder: Callable[..., Path], grid: str) -> None:
    source = quantised(make_folder, "m", weights(10, 7), grid)
    plan = plan_requantised(Linear(LinearConfig(0.5)), {"aligned": source, "tuned": source})
    assert torch.equal(computed(plan, UP).view(torch.uint8), source.read_stored(UP, 0, 70).view(torch.uint8))
    torch.testing.assert_close(
        computed(plan, f"{UP}_scale_inv").flatten(), source._scale(source.scalings[UP]).flatten(), rtol=3e-7, atol=0
    )


@pytest.mark.parametrize("grid", GRIDS)
def test_any_cut_gives_the_same_bits(make_folder: Callable[..., Path], grid: str) -> None:
    sources = {
        role: quantised(make_folder, role, weights(10, 7, seed=seed), grid)
        for seed, role in enumerate(("aligned", "tuned"))
    }
    plan = plan_requantised(Linear(LinearConfig(0.4)), sources)
    source = pickle.loads(pickle.dumps(plan.sources[plan.edit.roles()[0]]))
    for name, count in ((UP, 70), (f"{UP}_scale_inv", source.entries()[f"{UP}_scale_inv"].elements)):
        whole = bytes(as_bytes(computed(plan, name)))
        item = len(whole) // count
        for start in range(0, count, 3):
            for stop in range(start, count + 1, 5):
                assert bytes(as_bytes(source.read(name, start, stop))) == whole[start * item : stop * item]


def test_edits_that_need_the_whole_tensor_work_too(
    make_folder: Callable[..., Path], flipped: Any, centered: Any
) -> None:
    source = quantised(make_folder, "m", weights(10, 7))
    for edit in (flipped, centered):
        plan = plan_requantised(edit, {"tuned": source})
        plain = plan_edit(edit, {"tuned": source}, out_dtype="F32")
        entry = next(one.entry for one in plain.tensors if one.entry.name == UP)
        exact = torch.cat([part for _, part in evaluate(edit, plain.sources, entry)])
        made = plan.sources[plan.edit.roles()[0]]
        scales = scales_of_range(source.scalings[UP], made.read(f"{UP}_scale_inv", 0, 9).view(3, 3), 0, 70)
        require_half_a_step(exact, computed(plan, UP).float() * scales, scales, "F8_E4M3")
        assert plan.memory_bytes > plain.memory_bytes


def test_worker_processes_write_the_same_bytes(make_folder: Callable[..., Path], tmp_path: Path) -> None:
    sources = {
        role: quantised(make_folder, role, weights(10, 7, seed=seed), files=2)
        for seed, role in enumerate(("aligned", "tuned"))
    }
    plan = plan_requantised(Linear(LinearConfig(0.4)), sources)
    for workers in (1, 2):
        effort = Effort(workers=workers, chunk_elements=16 * workers)
        materialise(plan, tmp_path / str(workers), companions_from=sources["tuned"].folder, effort=effort)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("1", "2"))
    assert one == two


def test_what_stands_beside_the_weights_is_kept(make_folder: Callable[..., Path]) -> None:
    beside = {"model.layers.0.mlp.up_proj.input_scale": torch.tensor([0.25])}
    source = quantised(make_folder, "m", weights(10, 7), **beside)
    plan = plan_requantised(Linear(LinearConfig(0.5)), {"aligned": source, "tuned": source})
    assert torch.equal(computed(plan, next(iter(beside))), torch.tensor([0.25]))


def test_f8_without_scales_stays_without(make_folder: Callable[..., Path]) -> None:
    values = weights(4, 5).to(torch.float8_e4m3fn)
    source = open_checkpoint(make_folder("m", {UP: values}))
    plan = plan_requantised(Linear(LinearConfig(0.5)), {"aligned": source, "tuned": source})
    assert torch.equal(computed(plan, UP).view(torch.uint8), values.view(torch.uint8).flatten())
    assert "quantization_config" not in plan.config_changes
    with pytest.raises(NumericalError, match="do not fit F8"):
        to_float8(torch.tensor([1.0, 449.0]), None, torch.float8_e4m3fn, name=UP, offset=0)


def test_a_model_that_is_not_in_f8_has_no_format_to_write(make_folder: Callable[..., Path]) -> None:
    source = Checkpoint(make_folder("m", {UP: weights(4, 5)}))
    with pytest.raises(ConfigError, match="no F8 format") as caught:
        plan_requantised(Linear(), {"aligned": source, "tuned": source})
    assert "--requantize" in str(caught.value.fix)


def test_blocks_of_zeros_and_of_tiny_numbers_have_positive_scales() -> None:
    maxima = torch.tensor([[0.0, 1e-44], [1e-30, 3e38]])
    for scale_dtype in ("F32", "BF16", "F16", "F64", "F8_E8M0", "U8"):
        scales = fresh_scales(maxima, "F8_E4M3", scale_dtype)
        assert (scales > 0).all()
        assert torch.isfinite(scales).all()
        assert scales[0, 0] == 1.0
        stored = stored_scales(scales, scale_dtype)
        again = (stored.view(torch.uint8).float() - 127).exp2() if stored.element_size() == 1 else stored.float()
        assert torch.equal(again, scales)
    zeros = to_float8(torch.zeros(3), torch.ones(3), torch.float8_e4m3fn, name="w", offset=0)
    assert zeros.float().tolist() == [0.0, 0.0, 0.0]


def test_powers_of_two_are_never_too_small() -> None:
    maxima = 448.0 * torch.tensor([1.0, 1.0001, 0.9999, 2.0**-20])
    assert fresh_scales(maxima, "F8_E4M3", "U8").tolist() == [1.0, 2.0, 1.0, 2.0**-20]


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((10, 7), (3, 3), (4, 3)),
        ((3, 4, 6), (3, 2, 2), (1, 2, 3)),
        ((3, 4, 6), (1, 1, 1), (3, 4, 6)),
        ((9,), (1,), (9,)),
    ],
)
def test_maxima_are_those_of_each_block(shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, ...]) -> None:
    values = weights(*shape)
    wanted: Mapping[tuple[int, ...], float] = {}
    for place in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        at = tuple(one // size for one, size in zip(place, block, strict=True))
        wanted = {**wanted, at: max(wanted.get(at, 0.0), abs(float(values[tuple(place)])))}
    kind = scaling(shape, grid, block)
    rows = values.reshape(-1, shape[-1])
    found = block_maxima(rows, kind, lines_of_rows(kind, 0, len(rows))).view(grid)
    assert {at: float(found[at]) for at in wanted} == wanted
