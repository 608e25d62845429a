# SPDX-License-Identifier: Apache-2.0
"""Every kind of adapter equals what PEFT itself merges, to 1e-6 in float32, whatever range is read."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GptOssConfig, PreTrainedModel, Qwen2Config

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.models.adapter_changes import ExpertFactors
from keelwright.models.adapters import AdaptedCheckpoint, LoraFactors, factors_from_state, read_adapter
from keelwright.models.checkpoint import Checkpoint
from keelwright.models.refs import parse_ref
from keelwright.models.sources import open_source

MakeFolder = Callable[..., Path]
Lora = Callable[..., LoraConfig]

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 7, "task_type": "CAUSAL_LM"}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, **settings})


def kinds() -> dict[str, PeftConfig]:
    return {
        "dora": lora(target_modules=LINEAR, use_dora=True),
        "dora rank-stabilised": lora(target_modules=LINEAR, use_dora=True, use_rslora=True, rank_pattern={"q_proj": 2}),
        "dora of an embedding": lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
        "bias all": lora(target_modules=["q_proj"], bias="all"),
        "mica": lora(target_modules=["q_proj"], init_lora_weights="mica"),
        "velora": lora(target_modules=LINEAR, velora_config=peft.tuners.lora.config.VeloraConfig(num_groups=2)),
        "block-diagonal": lora(
            target_modules=["q_proj", "o_proj", "v_proj"],
            use_bdlora=peft.tuners.lora.config.BdLoraConfig(
                target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2, match_strict=False
            ),
        ),
        "trained tokens": lora(target_modules=["q_proj"], trainable_token_indices=[3, 7, 30]),
        "trained tokens by name": lora(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 31]}),
        "trained tokens alone": peft.TrainableTokensConfig(token_indices=[2, 9], target_modules=["embed_tokens"]),
        "parameters": lora(target_modules=[], target_parameters=["self_attn.q_proj.weight", "mlp.down_proj.weight"]),
        "adalora": peft.AdaLoraConfig(init_r=6, target_r=3, lora_alpha=9, total_step=10, target_modules=LINEAR),
        "vera": peft.VeraConfig(r=8, target_modules=LINEAR, save_projection=True),
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=LINEAR, rank_pattern={"q_proj": 2}),
        "lokr": peft.LoKrConfig(r=2, alpha=5, target_modules=LINEAR),
        "lokr, both parts decomposed": peft.LoKrConfig(
            r=1, alpha=3, target_modules=LINEAR, decompose_both=True, decompose_factor=4, alpha_pattern={"q_proj": 1}
        ),
        "lokr, no part decomposed": peft.LoKrConfig(r=32, alpha=5, target_modules=LINEAR),
        "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "trained norms": peft.LNTuningConfig(target_modules=["input_layernorm", "model.norm"]),
        "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=LINEAR),
        "oft, blocks shared": peft.OFTConfig(r=0, oft_block_size=8, target_modules=LINEAR, block_share=True),
        "oft, exact": peft.OFTConfig(r=4, oft_block_size=0, target_modules=LINEAR, use_cayley_neumann=False),
        "oft, three terms": peft.OFTConfig(r=4, oft_block_size=0, target_modules=LINEAR, num_cayley_neumann_terms=3),
    }


def trained(model: PreTrainedModel, folder: Path, config: PeftConfig, *, seed: int = 1) -> Path:
    """Save a random adapter that is far from its start."""
    wrapped = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad or "lora_B" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    wrapped.save_pretrained(folder)
    return folder


def merged(base: Path, *folders: Path) -> dict[str, torch.Tensor]:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0], adapter_name="a0")
    for index, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, adapter_name=f"a{index}")
    return model.merge_and_unload(adapter_names=[f"a{index}" for index in range(len(folders))]).state_dict()


def whole(source: AdaptedCheckpoint | Checkpoint, name: str) -> torch.Tensor:
    entry = source.entries()[name]
    return source.read(name, 0, entry.elements).view(entry.shape)


def adapted(base: Path, *folders: Path) -> AdaptedCheckpoint:
    return AdaptedCheckpoint(Checkpoint(base), adapters=[read_adapter(folder) for folder in folders])


def require_equal(base: Path, *folders: Path) -> AdaptedCheckpoint:
    """Compare every tensor with PEFT's, and all that we say is touched with what PEFT changes."""
    wanted, plain, source = merged(base, *folders), Checkpoint(base), adapted(base, *folders)
    changed = {name for name in plain.entries() if not torch.equal(wanted[name], whole(plain, name))}
    assert changed
    assert changed <= source.touched()
    for name in source.entries():
        torch.testing.assert_close(whole(source, name), wanted[name], rtol=0, atol=1e-6)
    return source


@pytest.fixture
def biased(tmp_path: Path) -> Path:
    """Return a Qwen2 with biases, an odd width of blocks, and an untied head."""
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_equals_what_peft_merges(biased: Path, tmp_path: Path, kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(biased)
    folder = trained(model, tmp_path / "adapter", kinds()[kind])
    require_equal(biased, folder)


def test_the_bias_of_the_second_factor_is_added(biased: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj", "v_proj"], lora_bias=True)
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", config)
    source = require_equal(biased, folder)
    assert "model.layers.0.self_attn.q_proj.bias" in source.touched()


@pytest.mark.parametrize(
    "config",
    [
        lora(target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True, use_dora=True),
        lora(target_modules=["wte", "wpe", "c_attn"], fan_in_fan_out=True),
        lora(target_modules=["c_attn", "lm_head"], fan_in_fan_out=False),
        peft.VeraConfig(r=6, target_modules=["c_attn"], save_projection=True, fan_in_fan_out=True),
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["c_attn"], fan_in_fan_out=True),
        peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ],
    ids=["dora", "embeddings", "mixed layers", "vera", "adalora", "ia3"],
)
@pytest.mark.filterwarnings("ignore")
def test_transposed_layers_equal_what_peft_merges(tmp_path: Path, config: PeftConfig) -> None:
    torch.manual_seed(0)
    settings = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(settings)
    model.save_pretrained(tmp_path / "base")
    folder = trained(model, tmp_path / "adapter", config)
    require_equal(tmp_path / "base", folder)


def test_ranks_that_adalora_took_away_are_gone(biased: Path, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], lora_alpha=6)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased), config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    stem = "model.layers.{}.self_attn.q_proj.lora_E.default"
    model.peft_config["default"].rank_pattern = {stem.format(0): [True, False, True, True], stem.format(1): [False] * 4}
    model.save_pretrained(tmp_path / "adapter")
    source = adapted(biased, tmp_path / "adapter")
    assert [one.rank for one in source.adapters[0].factors.values()] == [3, 0]
    require_equal(biased, tmp_path / "adapter")


@pytest.mark.parametrize("kinds_", [("plain", "dora"), ("dora", "plain"), ("dora", "dora"), ("plain", "oft")])
def test_adapters_of_two_kinds_on_one_tensor_equal_what_peft_merges(
    biased: Path, tmp_path: Path, kinds_: tuple[str, str]
) -> None:
    configs = {
        "plain": lambda: lora(target_modules=["q_proj"]),
        "dora": lambda: lora(target_modules=["q_proj"], use_dora=True),
        "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    }
    folders = [
        trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / f"a{index}", configs[kind](), seed=index)
        for index, kind in enumerate(kinds_)
    ]
    if "oft" in kinds_:
        # PEFT does not mix these two types: it merges them one after the other.
        first = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(biased), folders[0]).merge_and_unload()
        wanted = PeftModel.from_pretrained(first, folders[1]).merge_and_unload().state_dict()
    else:
        wanted = merged(biased, *folders)
    source = adapted(biased, *folders)
    for name in source.entries():
        torch.testing.assert_close(whole(source, name), wanted[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "kind", ["dora", "dora of an embedding", "loha", "lokr", "ia3", "oft", "trained tokens", "vera"]
)
def test_no_kind_gives_bits_that_depend_on_the_range(
    biased: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("keelwright.models.adapter_changes.BLOCK_ELEMENTS", 5 * 32)
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", kinds()[kind])
    source = adapted(biased, folder)
    for name in sorted(source.touched())[:3]:
        size = source.entries()[name].elements
        everything = source.read(name, 0, size)
        for step in (7, 32, 100, 161):
            again = adapted(biased, folder)
            starts = range(0, size, step)
            # Backwards too: what was read before must not matter.
            parts = {start: again.read(name, start, min(start + step, size)) for start in reversed(starts)}
            assert torch.equal(torch.cat([parts[start] for start in starts]), everything)


def test_trained_tokens_of_a_tied_embedding_stay_tied(gpt2: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[1, 4])
    folder = trained(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "adapter", config)
    source = open_source(parse_ref(f"{gpt2}+{folder}"))
    wanted = merged(gpt2, folder)
    assert torch.equal(wanted["lm_head.weight"], wanted["transformer.wte.weight"])
    torch.testing.assert_close(whole(source, "transformer.wte.weight"), wanted["transformer.wte.weight"])


@pytest.mark.parametrize("places", [["transformer.wte"], ["lm_head", "transformer.wte"]])
def test_a_tied_embedding_that_is_saved_with_its_tie_stays_tied(gpt2: Path, tmp_path: Path, places: list[str]) -> None:
    config = lora(target_modules=["c_attn"], modules_to_save=["transformer.wte"], ensure_weight_tying=True)
    folder = trained(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "adapter", config)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    saved = next(tensors.pop(key) for key in list(tensors) if "wte" in key)
    places_of_it = {f"base_model.model.{place}.weight": saved.clone() for place in places}
    save_file({**tensors, **places_of_it}, path, metadata={"format": "pt"})
    source = require_equal(gpt2, folder)
    assert set(source.adapters[0].full_tensors) == {"transformer.wte.weight"}


def test_other_changes_of_a_tied_embedding_are_refused(gpt2: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["wte"], use_dora=True)
    folder = trained(AutoModelForCausalLM.from_pretrained(gpt2), tmp_path / "adapter", config)
    with pytest.raises(ModelMismatchError, match="changes a tensor that the base ties to another"):
        open_source(parse_ref(f"{gpt2}+{folder}"))


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"], ["down_proj", "gate_up_proj"]])
def test_experts_equal_what_peft_merges(tmp_path: Path, targets: list[str], square: bool) -> None:
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16 if square else 24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    settings = lora(
        target_modules=["q_proj"],
        target_parameters=[f"mlp.experts.{one}" for one in targets],
        rank_pattern={"experts.down_proj": 2},
    )
    folder = trained(model, tmp_path / "adapter", settings)
    source = require_equal(tmp_path / "base", folder)
    found = source.adapters[0].changes
    assert {name.rpartition(".")[2] for name, one in found.items() if isinstance(one, ExpertFactors)} == set(targets)


def test_experts_of_an_unknown_architecture_are_placed_by_shape_or_refused(tmp_path: Path) -> None:
    def folder(rows: int, columns: int) -> tuple[Path, Path]:
        place = tmp_path / f"{rows}x{columns}"
        (place / "base").mkdir(parents=True)
        (place / "adapter").mkdir()
        (place / "base" / "config.json").write_text('{"model_type": "unheard_of"}')
        random = torch.Generator().manual_seed(0)
        save_file({"m.experts.up": torch.zeros(3, rows, columns)}, place / "base" / "model.safetensors")
        parts = {
            "base_model.model.m.experts.lora_A.weight": torch.randn(3 * 2, columns, generator=random),
            "base_model.model.m.experts.lora_B.weight": torch.randn(rows, 3 * 2, generator=random),
        }
        save_file(parts, place / "adapter" / "adapter_model.safetensors")
        (place / "adapter" / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_parameters": ["experts.up"]}'
        )
        return place / "base", place / "adapter"

    base, adapter = folder(5, 4)
    one = adapted(base, adapter).adapters[0].changes["m.experts.up"]
    small = load_file(adapter / "adapter_model.safetensors")
    small_a, small_b = (small[f"base_model.model.m.experts.lora_{part}.weight"] for part in "AB")
    wanted = torch.einsum("ore,eri->eoi", small_b.reshape(5, 2, 3), small_a.reshape(3, 2, 4))
    torch.testing.assert_close(one.delta().view(3, 5, 4), wanted)
    base, adapter = folder(4, 4)
    with pytest.raises(ModelMismatchError, match=r"cannot be placed on 'm\.experts\.up'"):
        adapted(base, adapter)


def test_vera_without_its_projections_is_refused(biased: Path, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=8, target_modules=["q_proj"], save_projection=False)
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", config)
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder)
    assert "save_projection=True" in str(caught.value.fix)


def test_a_converted_pissa_adapter_is_plain(biased: Path, tmp_path: Path) -> None:
    config = lora(target_modules=["q_proj"], init_lora_weights="pissa")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased), config)
    # The way to convert that PEFT documents: the untrained adapter is saved before training starts.
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    source = require_equal(biased, tmp_path / "plain")
    model.peft_config["default"].init_lora_weights = "pissa"
    trained_weights = model.merge_and_unload().state_dict()
    for name in source.touched():
        torch.testing.assert_close(whole(source, name), trained_weights[name], rtol=0, atol=1e-5)


def test_dora_without_magnitudes_is_refused(biased: Path, tmp_path: Path) -> None:
    folder = trained(
        AutoModelForCausalLM.from_pretrained(biased),
        tmp_path / "adapter",
        lora(target_modules=["q_proj"], use_dora=True),
    )
    path = folder / "adapter_model.safetensors"
    save_file({key: one for key, one in load_file(path).items() if "magnitude" not in key}, path)
    with pytest.raises(DataError, match="do not fit its settings") as caught:
        read_adapter(folder)
    assert "lora_magnitude_vector" in str(caught.value.expected)


@pytest.mark.parametrize("kind", ["ia3", "oft", "vera", "trained tokens", "loha"])
def test_an_adapter_of_another_kind_of_another_model_is_refused(
    biased: Path, make_folder: MakeFolder, tmp_path: Path, kind: str
) -> None:
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", kinds()[kind])
    # IA3 and OFT fit any height, so both sides differ.
    other = make_folder("llama", hidden_size=48, intermediate_size=80, num_attention_heads=4, vocab_size=30)
    with pytest.raises(ModelMismatchError):
        adapted(other, folder)
    shallow = make_folder("gemma2", name="shallow")
    (shallow / "model.safetensors").unlink()
    save_file({"other.weight": torch.zeros(2, 2)}, shallow / "model.safetensors")
    with pytest.raises(ModelMismatchError, match="was not made for"):
        adapted(shallow, folder)


def test_trained_rows_beyond_the_embedding_are_refused(biased: Path, tmp_path: Path) -> None:
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", kinds()["trained tokens"])
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("30", "32"))
    with pytest.raises(ModelMismatchError, match=r"do not fit 'model\.embed_tokens\.weight'"):
        adapted(biased, folder)


def test_an_adapter_in_memory_that_is_no_low_rank_sum_is_refused(biased: Path) -> None:
    config = lora(target_modules=["q_proj"], use_dora=True)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(biased), config)
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(DataError, match="is no low-rank sum at"):
        factors_from_state(state, {**config.to_dict(), "peft_type": "LORA"})


@pytest.mark.parametrize("kind", ["dora", "loha", "oft", "vera", "ia3"])
def test_digests_follow_the_values_of_every_kind_and_sources_survive_pickling(
    biased: Path, tmp_path: Path, kind: str
) -> None:
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", kinds()[kind])
    source = adapted(biased, folder)
    again = pickle.loads(pickle.dumps(source))
    assert again.data_digest() == source.data_digest() == adapted(biased, folder).data_digest()
    name = sorted(source.touched())[0]
    assert torch.equal(whole(again, name), whole(source, name))
    before = read_adapter(folder).data_digest()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[-1]
    tensors[key].view(-1)[0] += 0.5
    save_file(tensors, path)
    assert read_adapter(folder).data_digest() != before
    assert adapted(biased, folder).data_digest() != source.data_digest()


def test_a_sum_of_factors_reads_as_before(biased: Path, tmp_path: Path) -> None:
    folder = trained(AutoModelForCausalLM.from_pretrained(biased), tmp_path / "adapter", lora(target_modules=LINEAR))
    assert all(isinstance(one, LoraFactors) for one in read_adapter(folder).factors.values())
    assert not read_adapter(folder).changes
