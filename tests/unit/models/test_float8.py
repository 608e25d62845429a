# SPDX-License-Identifier: Apache-2.0
"""F8 checkpoints: scales of every granularity, hidden and applied; what cannot be read is refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from keelwright.core.errors import DataError, NumericalError
from keelwright.core.protocols import TensorEntry
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.float8 import Float8Checkpoint, fit_scale, open_checkpoint, scales_of_range, whole_state
from keelwright.models.refs import LocalModel, parse_ref
from keelwright.models.sources import open_base, stored_dtype

NAME = "model.layers.0.mlp.up_proj.weight"
FP8 = {"quant_method": "fp8", "weight_block_size": [4, 3], "activation_scheme": "dynamic"}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
}

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(tensors: Mapping[str, Tensor], settings: object = None, **config: object) -> Path:
        folder = tmp_path / f"m{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        text = {"model_type": "llama", **config, **({"quantization_config": settings} if settings else {})}
        (folder / "config.json").write_text(json.dumps(text))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return write


def random_f8(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    return (40 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def scales(*shape: int, seed: int = 1) -> Tensor:
    return 0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """The slow, obvious twin: one element at a time."""
    out = torch.empty(weight.shape)
    for i in range(weight.shape[0]):
        for j in range(weight.shape[1]):
            out[i, j] = weight[i, j].float() * scale[i // block[0], j // block[1]]
    return out


def read_all(source: Checkpoint, name: str = NAME) -> Tensor:
    entry = source.entries()[name]
    return source.read(name, 0, entry.elements).view(entry.shape)


def test_blocks_are_multiplied_with_their_scales_at_the_edges_too(make: Make) -> None:
    weight, scale = random_f8(10, 7), scales(3, 3)
    source = open_checkpoint(make({NAME: weight, f"{NAME}_scale_inv": scale}, FP8))
    assert [*source.entries()] == [NAME]
    assert source.entries()[NAME] == TensorEntry(NAME, "BF16", (10, 7))
    assert torch.equal(read_all(source), by_hand(weight, scale, (4, 3)))


def test_values_are_those_of_transformers(make: Make) -> None:
    weight, scale = random_f8(8, 6), scales(2, 2)
    settings = {**FP8, "weight_block_size": [4, 3]}
    found = read_all(open_checkpoint(make({NAME: weight, f"{NAME}_scale_inv": scale}, settings)))
    theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(weight, scale, output_dtype=torch.float32)
    assert torch.equal(found, theirs)


@pytest.mark.parametrize("start", [0, 1, 6, 13, 34])
@pytest.mark.parametrize("stop", [35, 40, 70])
def test_a_range_is_that_part_of_the_whole(make: Make, start: int, stop: int) -> None:
    source = open_checkpoint(make({NAME: random_f8(10, 7), f"{NAME}_scale_inv": scales(3, 3)}, FP8))
    assert torch.equal(source.read(NAME, start, stop), read_all(source).flatten()[start:stop])


@pytest.mark.parametrize(
    ("shape", "settings", "suffix"),
    [
        ((), {"quant_method": "fp8", "activation_scheme": "static"}, "_scale"),
        ((1,), {"quant_method": "modelopt", "quant_algo": "FP8"}, "_scale"),
        ((6, 1), COMPRESSED, "_scale"),
        ((6,), COMPRESSED, "_scale"),
        ((6, 1), {"quant_method": "fbgemm_fp8"}, "_scale"),
        ((1, 5), None, "_scale_inv"),
    ],
)
def test_scales_of_a_tensor_a_row_and_a_column_are_known(
    make: Make, shape: tuple[int, ...], settings: object, suffix: str
) -> None:
    weight, scale = random_f8(6, 5), scales(*shape)
    source = open_checkpoint(make({NAME: weight, NAME + suffix: scale}, settings))
    wide = scale.view(6, 1) if shape == (6,) else scale
    assert torch.equal(read_all(source), weight.float() * wide)


def test_experts_in_one_tensor_have_their_own_scales(make: Make) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight, scale = random_f8(3, 4, 6), scales(3, 2, 2)
    source = open_checkpoint(make({name: weight, f"{name}_scale_inv": scale}, {**FP8, "weight_block_size": [2, 3]}))
    wanted = torch.stack([by_hand(weight[i], scale[i], (2, 3)) for i in range(3)])
    assert torch.equal(read_all(source, name), wanted)
    assert torch.equal(source.read(name, 20, 50), wanted.flatten()[20:50])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_scales_are_widened(make: Make, dtype: torch.dtype) -> None:
    weight, scale = random_f8(4, 3), scales(1, 1).to(dtype)
    source = open_checkpoint(make({NAME: weight, f"{NAME}_scale": scale}, FP8))
    assert torch.equal(read_all(source), weight.float() * scale.float())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_exponents_are_powers_of_two(make: Make, dtype: torch.dtype) -> None:
    weight, exponents = random_f8(8, 6), torch.tensor([[127, 120], [130, 0]], dtype=torch.uint8)
    settings = {**FP8, "scale_fmt": "ue8m0"}
    source = open_checkpoint(make({NAME: weight, f"{NAME}_scale_inv": exponents.view(dtype)}, settings))
    wanted = by_hand(weight, torch.tensor([[1.0, 2.0**-7], [8.0, 2.0**-127]]), (4, 3))
    assert torch.equal(read_all(source), wanted)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_numbers_without_scales_are_what_they_say(make: Make, dtype: torch.dtype) -> None:
    weight = random_f8(4, 5, dtype=dtype)
    source = open_checkpoint(make({NAME: weight}))
    assert torch.equal(read_all(source), weight.float())
    assert stored_dtype(source) is torch.bfloat16


def test_everything_else_is_as_it_is_stored(make: Make) -> None:
    norm = torch.randn(7).bfloat16()
    tensors = {
        NAME: random_f8(4, 3),
        f"{NAME}_scale_inv": scales(1, 1),
        "model.norm.weight": norm,
        "model.layers.0.mlp.up_proj.input_scale": torch.ones(1),
        "model.layers.0.mlp.k_scale": torch.ones(1),
        "model.router.scale": torch.ones(2),
    }
    source = open_checkpoint(make(tensors, FP8))
    assert set(source.entries()) == {NAME, "model.norm.weight", "model.router.scale"}
    assert torch.equal(source.read("model.norm.weight", 0, 7), norm)
    assert set(source.stored_entries()) == set(tensors)
    assert torch.equal(source.read_stored(NAME, 0, 12).view(torch.uint8), tensors[NAME].view(torch.uint8).flatten())


def test_the_settings_no_longer_speak_of_quantisation(make: Make) -> None:
    source = open_checkpoint(make({NAME: random_f8(4, 3), f"{NAME}_scale_inv": scales(1, 1)}, FP8, hidden_size=3))
    assert source.config_json() == {"model_type": "llama", "hidden_size": 3}
    assert isinstance(source, Float8Checkpoint)
    assert source.settings == FP8


def test_a_plain_checkpoint_stays_a_plain_checkpoint(make: Make) -> None:
    assert type(open_checkpoint(make({NAME: torch.ones(2, 2)}))) is Checkpoint


def test_a_model_is_opened_so_by_its_name(make: Make) -> None:
    folder = make({NAME: random_f8(4, 3), f"{NAME}_scale_inv": scales(1, 1)}, FP8)
    source = open_base(LocalModel(parse_ref(str(folder)), folder))
    assert source.entries()[NAME].dtype == "BF16"
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(read_all(again), read_all(source))


def test_a_weight_without_its_scale_is_named(make: Make) -> None:
    with pytest.raises(DataError, match=r"stores 'model.*up_proj.weight' in F8_E4M3 without a scale") as caught:
        open_checkpoint(make({NAME: random_f8(4, 3)}, FP8))
    assert f"{NAME}_scale_inv" in str(caught.value.expected)


def test_scales_that_do_not_fit_are_named(make: Make) -> None:
    with pytest.raises(DataError, match="do not fit the weight") as caught:
        open_checkpoint(make({NAME: random_f8(10, 7), f"{NAME}_scale_inv": scales(4, 3)}, FP8))
    assert caught.value.found == "F32 [4, 3]"
    assert "blocks of [4, 3]" in str(caught.value.expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_number_is_named(make: Make, bad: float) -> None:
    scale = scales(2, 1)
    scale[1, 0] = bad
    source = open_checkpoint(make({NAME: random_f8(8, 3), f"{NAME}_scale_inv": scale}, FP8))
    with pytest.raises(NumericalError, match="element 1"):
        read_all(source)


def test_packed_weights_beside_f8_are_refused(make: Make) -> None:
    tensors = {NAME: torch.ones(4, 3, dtype=torch.int8), f"{NAME}_scale_inv": scales(1, 1)}
    with pytest.raises(DataError, match="several weights to a byte"):
        open_checkpoint(make(tensors, FP8))


@pytest.mark.parametrize(("point", "is_fine"), [(0.0, True), (-0.0, True), (1.0, False)])
def test_weights_around_another_point_than_zero_are_refused(make: Make, point: float, *, is_fine: bool) -> None:
    zero = torch.tensor([point]).to(torch.float8_e4m3fn)
    folder = make({NAME: random_f8(4, 3), f"{NAME}_scale": scales(1), f"{NAME}_zero_point": zero}, COMPRESSED)
    if is_fine:
        assert [*open_checkpoint(folder).entries()] == [NAME]
    else:
        with pytest.raises(DataError, match="points other than zero"):
            open_checkpoint(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
        },
        {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}},
    ],
    ids=lambda one: str(one["quant_method"]),
)
def test_packed_formats_stay_refused_and_name_the_parent(make: Make, settings: dict[str, object]) -> None:
    folder = make({NAME: torch.ones(2, 2)}, settings)
    (folder / "README.md").write_text("---\nbase_model: org/whole\n---\n")
    with pytest.raises(DataError, match="is quantised") as caught:
        open_checkpoint(folder)
    assert caught.value.fix == "use the unquantised model org/whole"


def test_a_module_can_be_filled_with_the_whole_state(make: Make) -> None:
    folder = make({NAME: random_f8(4, 3), f"{NAME}_scale_inv": scales(1, 1), "ids": torch.arange(3)}, FP8)
    source = open_checkpoint(folder)
    state = whole_state(source, torch.bfloat16)
    assert torch.equal(state[NAME], read_all(source).bfloat16())
    assert torch.equal(state["ids"], torch.arange(3))


def test_a_scalar_and_an_empty_weight_have_scales_too() -> None:
    scalar = fit_scale(TensorEntry("a", "F8_E4M3", ()), TensorEntry("b", "F32", ()), None, "m")
    assert scales_of_range(scalar, torch.tensor(2.0), 0, 1).tolist() == [2.0]
    empty = fit_scale(TensorEntry("a", "F8_E4M3", (0, 4)), TensorEntry("b", "F32", (1, 1)), None, "m")
    assert scales_of_range(empty, torch.ones(1, 1), 0, 0).numel() == 0
