# SPDX-License-Identifier: Apache-2.0
"""The VL merge: the tests of its sheet, on tensors in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keelwright.core.errors import ConfigError, ModelMismatchError
from keelwright.core.protocols import Reach, TensorEntry
from keelwright.models.dtypes import STORED_NAMES
from keelwright.models.token_table import TokenTable
from keelwright.repair.text_stacks import KeptRows
from keelwright.repair.vl import Vl, VlConfig, layer_coefficients, vl
from keelwright.weights.plan import plan_edit
from keelwright.weights.sources import source_digest
from keelwright.weights.stream import evaluate

ROWS, OWN, WIDTH, LAYERS = 7, 2, 4, 2
NAMINGS = {
    "plain": lambda name: name,
    "current": lambda name: name.replace("model.", "model.language_model.") if name.startswith("model.") else name,
    "old": lambda name: f"language_model.{name}",
}


class Memory:
    """Tensors in memory as a source."""

    def __init__(self, tensors: dict[str, Tensor], text: str = "memory") -> None:
        self.tensors, self.text = tensors, text

    def entries(self) -> dict[str, TensorEntry]:
        return {
            name: TensorEntry(name, STORED_NAMES[one.dtype], tuple(one.shape)) for name, one in self.tensors.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop].clone()

    def describe(self) -> str:
        return self.text


def stack(
    seed: int, *, rows: int = ROWS, layers: int = LAYERS, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (rows, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (rows, WIDTH),
    }
    shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (5, WIDTH) for layer in range(layers)}
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def vision(seed: int, *, naming: str = "current", rows: int = ROWS + OWN, **settings) -> dict[str, Tensor]:
    texts = {NAMINGS[naming](name): one for name, one in stack(seed, rows=rows, **settings).items()}
    random = torch.Generator().manual_seed(seed + 100)
    eyes = {
        "model.vision_tower.encoder.layers.0.mlp.up_proj.weight": torch.randn(5, WIDTH, generator=random),
        "model.multi_modal_projector.linear_1.weight": torch.randn(3, 3, generator=random),
    }
    return {**eyes, **texts}


def run(edit: Vl, *, tokens=None, chunk_elements: int = 1 << 18, **models: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return every tensor of the output."""
    edit, sources, _ = edit.arranged({role: Memory(one, role) for role, one in models.items()}, tokens or {})
    plan = plan_edit(edit, sources)
    return {
        one.entry.name: torch.cat(
            [part for _, part in evaluate(plan.edit, plan.sources, one.entry, chunk_elements=chunk_elements)]
        ).view(one.entry.shape)
        for one in plan.tensors
    }


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def table(*words: str, added: tuple[str, ...] = ()) -> TokenTable:
    plain = (True, False, False, False, False)
    return TokenTable({word: at for at, word in enumerate(words)}, dict.fromkeys(added, plain), "WordLevel", "")


def test_the_sum_of_the_sheet_by_hand() -> None:
    aligned, tuned, ancestor = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]), torch.tensor([2.0, 1.0])
    assert torch.allclose(vl(aligned, tuned, coefficient=0.25), torch.tensor([1.5, 1.0]), atol=1e-6)
    # gamma = 0.5: [3, 4] + 0.5 ([1, 0] - [2, 1])
    assert torch.allclose(vl(aligned, tuned, ancestor, coefficient=0.5), torch.tensor([2.5, 3.5]), atol=1e-6)
    assert torch.allclose(vl(aligned, tuned, ancestor, coefficient=-1.0), torch.tensor([1.0, 2.0]), atol=1e-6)


def test_the_engine_gives_the_same_sum() -> None:
    tuned, aligned, ancestor = vision(0), stack(1), stack(2)
    linear = run(Vl(VlConfig(0.25)), aligned=aligned, tuned=tuned)
    added = run(Vl(VlConfig(0.25), referenced=True), aligned=aligned, reference=ancestor, tuned=tuned)
    for name, one in aligned.items():
        own = tuned[NAMINGS["current"](name)]
        rows = slice(0, len(one))
        expected = 0.25 * own[rows] + 0.75 * one
        assert torch.allclose(linear[NAMINGS["current"](name)][rows], expected, atol=1e-6)
        expected = own[rows] + 0.75 * (one - ancestor[name])
        assert torch.allclose(added[NAMINGS["current"](name)][rows], expected, atol=1e-6)


@pytest.mark.parametrize("referenced", [False, True])
def test_coefficient_one_returns_the_vision_language_model_byte_for_byte(referenced: bool) -> None:
    tuned = vision(0, dtype=torch.bfloat16)
    more = {"reference": stack(2)} if referenced else {}
    found = run(Vl(VlConfig(1.0), referenced=referenced), aligned=stack(1), tuned=tuned, **more)
    assert found.keys() == tuned.keys()
    assert all(same(found[name], tuned[name]) for name in tuned)


def test_coefficient_zero_returns_the_safe_text_stack_under_the_vision_side() -> None:
    tuned, aligned = vision(0), stack(1)
    found = run(Vl(VlConfig(0.0)), aligned=aligned, tuned=tuned)
    for name, one in aligned.items():
        assert same(found[NAMINGS["current"](name)][: len(one)], one)
    for name in (
        "model.vision_tower.encoder.layers.0.mlp.up_proj.weight",
        "model.multi_modal_projector.linear_1.weight",
    ):
        assert same(found[name], tuned[name])


@pytest.mark.parametrize("coefficient", [0.0, 0.1, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("referenced", [False, True])
def test_vision_side_and_own_rows_never_move(coefficient: float, referenced: bool) -> None:
    tuned = vision(0, dtype=torch.bfloat16)
    more = {"reference": stack(2)} if referenced else {}
    found = run(Vl(VlConfig(coefficient), referenced=referenced), aligned=stack(1), tuned=tuned, **more)
    assert all(same(found[name], tuned[name]) for name in tuned if "vision" in name or "projector" in name)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        assert same(found[name][ROWS:], tuned[name][ROWS:])
        assert coefficient == 1.0 or not torch.equal(found[name][:ROWS], tuned[name][:ROWS])


@pytest.mark.parametrize("aligned_naming", NAMINGS)
def test_the_naming_of_either_side_does_not_matter(aligned_naming: str) -> None:
    aligned = {NAMINGS[aligned_naming](name): one for name, one in stack(1).items()}
    results = []
    for naming, rename in NAMINGS.items():
        found = run(Vl(VlConfig(0.3)), aligned=aligned, tuned=vision(0, naming=naming))
        back = {rename(name): name for name in stack(0)}
        results.append({back.get(name, name): one for name, one in found.items()})
    plain = run(Vl(VlConfig(0.3)), aligned=stack(1), tuned=vision(0, naming="plain"))
    for found in results:
        assert found.keys() == plain.keys()
        assert all(same(found[name], plain[name]) for name in plain)


def test_with_the_vision_language_model_as_reference_it_is_the_linear_form() -> None:
    tuned, aligned = vision(0), stack(1)
    linear = run(Vl(VlConfig(0.3)), aligned=aligned, tuned=tuned)
    added = run(Vl(VlConfig(0.3), referenced=True), aligned=aligned, reference=vision(0), tuned=tuned)
    assert all(torch.allclose(linear[name], added[name], atol=1e-6) for name in tuned)


def test_a_model_merged_with_its_own_text_stack_stays() -> None:
    tuned = vision(0)
    own = {name: tuned[NAMINGS["current"](name)][:ROWS] for name in stack(0)}
    for edit, more in ((Vl(VlConfig(0.37)), {}), (Vl(VlConfig(0.37), referenced=True), {"reference": own})):
        found = run(edit, aligned=own, tuned=tuned, **more)
        assert all(same(found[name], tuned[name]) for name in tuned)


@pytest.mark.parametrize("chunk", [1, 3, 1 << 18])
def test_the_bits_do_not_depend_on_the_size_of_the_chunks(chunk: int) -> None:
    models = {"aligned": stack(1), "reference": stack(2, rows=ROWS - 1), "tuned": vision(0, dtype=torch.bfloat16)}
    whole = run(Vl(VlConfig(0.3), referenced=True), **models)
    parts = run(Vl(VlConfig(0.3), referenced=True), chunk_elements=chunk, **models)
    assert all(same(whole[name], parts[name]) for name in whole)
    # The row that the reference lacks is no part of the safety vector.
    name = "model.language_model.embed_tokens.weight"
    assert same(whole[name][ROWS - 1 :], models["tuned"][name][ROWS - 1 :])


def test_a_16_bit_model_with_a_32_bit_text_stack_rounds_once() -> None:
    tuned, aligned = vision(0, dtype=torch.bfloat16), stack(1)
    found = run(Vl(VlConfig(0.5)), aligned=aligned, tuned=tuned)
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    expected = (0.5 * tuned[name].float() + 0.5 * aligned["model.layers.1.mlp.up_proj.weight"]).to(torch.bfloat16)
    assert same(found[name], expected)
    replaced = run(Vl(VlConfig(0.0)), aligned=aligned, tuned=tuned)
    assert same(replaced[name], aligned["model.layers.1.mlp.up_proj.weight"].to(torch.bfloat16))


@pytest.mark.parametrize("side", ["aligned", "tuned"])
def test_one_missing_tensor_is_refused_by_name_unless_partial(side: str) -> None:
    models = {"aligned": stack(1), "tuned": vision(0)}
    name = "model.layers.1.mlp.up_proj.weight"
    lost = name if side == "aligned" else NAMINGS["current"](name)
    models[side] = {one: value for one, value in models[side].items() if one != lost}
    with pytest.raises(ModelMismatchError, match=r"layers\.1\.mlp\.up_proj"):
        run(Vl(VlConfig(0.5)), **models)
    found = run(Vl(VlConfig(0.5, partial=True)), **models)
    assert found.keys() == models["tuned"].keys()
    if side == "aligned":
        assert same(found[NAMINGS["current"](name)], models["tuned"][NAMINGS["current"](name)])


def test_an_extra_layer_on_either_side_is_refused() -> None:
    with pytest.raises(ModelMismatchError, match=r"layers\.2\."):
        run(Vl(), aligned=stack(1, layers=3), tuned=vision(0))
    with pytest.raises(ModelMismatchError, match=r"layers\.2\."):
        run(Vl(), aligned=stack(1), tuned=vision(0, layers=3))


def test_a_language_model_alone_is_no_vision_language_model() -> None:
    with pytest.raises(ModelMismatchError, match="no vision-language model") as caught:
        run(Vl(), aligned=stack(1), tuned=stack(0))
    assert "linear" in str(caught.value)


def test_an_image_token_in_the_padding_of_the_vocabulary_keeps_its_row() -> None:
    tuned, aligned = vision(0, rows=ROWS), stack(1)
    words = [*"abcde"]
    tokens = {"tuned": table(*words, "<image>", added=("<image>",)), "aligned": table(*words)}
    found = run(Vl(VlConfig(0.0)), tokens=tokens, aligned=aligned, tuned=tuned)
    for name, text in (
        ("model.language_model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight",) * 2,
    ):
        assert same(found[name][5], tuned[name][5])
        assert same(found[name][:5], aligned[text][:5])
        assert same(found[name][6:], aligned[text][6:])


def test_a_reserved_token_made_an_image_token_keeps_its_row_and_another_tokenizer_is_refused() -> None:
    tuned, aligned = vision(0, rows=ROWS), stack(1)
    reserved = table(*"abcd", "<spare>", "f", "g", added=("<spare>",))
    image = table(*"abcd", "<image>", "f", "g", added=("<image>",))
    found = run(Vl(VlConfig(0.4)), tokens={"tuned": image, "aligned": reserved}, aligned=aligned, tuned=tuned)
    assert same(found["lm_head.weight"][4], tuned["lm_head.weight"][4])
    assert not torch.equal(found["lm_head.weight"][3], tuned["lm_head.weight"][3])
    other = table(*"abcx", "<image>", "f", "g", added=("<image>",))
    with pytest.raises(ModelMismatchError, match="different tokenizers") as caught:
        run(Vl(), tokens={"tuned": other, "aligned": reserved}, aligned=aligned, tuned=tuned)
    assert "id 3 for the token 'd', as in 'aligned'" in str(caught.value)
    assert "the token 'x' in 'tuned'" in str(caught.value)


def test_a_larger_table_of_the_language_model_is_cut_to_the_output() -> None:
    tuned, aligned = vision(0), stack(1, rows=ROWS + 10)
    found = run(Vl(VlConfig(0.0)), aligned=aligned, tuned=tuned)
    assert same(found["lm_head.weight"], aligned["lm_head.weight"][: ROWS + OWN])


def test_a_tied_language_model_lends_its_embedding_as_head() -> None:
    tuned = vision(0)
    aligned = {name: one for name, one in stack(1).items() if name != "lm_head.weight"}
    found = run(Vl(VlConfig(0.0)), aligned=aligned, tuned=tuned)
    assert same(found["lm_head.weight"][:ROWS], aligned["model.embed_tokens.weight"])


def test_a_tied_vision_language_model_gets_a_head_where_the_other_has_one() -> None:
    tuned = {name: one for name, one in vision(0).items() if name != "lm_head.weight"}
    aligned = stack(1)
    edit, _, notes = Vl(VlConfig(0.5)).arranged({"aligned": Memory(aligned), "tuned": Memory(tuned)}, {})
    assert edit.config_changes["tie_word_embeddings"] is False
    assert any("ties its head" in note for note in notes)
    found = run(Vl(VlConfig(0.5)), aligned=aligned, tuned=tuned)
    embedding = tuned["model.language_model.embed_tokens.weight"]
    expected = 0.5 * embedding[:ROWS] + 0.5 * aligned["lm_head.weight"]
    assert torch.allclose(found["lm_head.weight"][:ROWS], expected, atol=1e-6)
    assert same(found["lm_head.weight"][ROWS:], embedding[ROWS:])


def test_each_layer_may_have_its_own_coefficient() -> None:
    tuned, aligned = vision(0), stack(1)
    found = run(Vl(VlConfig(0.5, layer_coefficient=(1.0, 0.0))), aligned=aligned, tuned=tuned)
    first, second = (f"model.language_model.layers.{layer}.mlp.up_proj.weight" for layer in range(2))
    assert same(found[first], tuned[first])
    assert same(found[second], aligned["model.layers.1.mlp.up_proj.weight"])
    norm = "model.language_model.norm.weight"
    assert torch.allclose(found[norm], 0.5 * tuned[norm] + 0.5 * aligned["model.norm.weight"], atol=1e-6)
    with pytest.raises(ConfigError, match=r"2 numbers, one for each layer") as caught:
        run(Vl(VlConfig(0.5, layer_coefficient=(1.0,))), aligned=aligned, tuned=tuned)
    assert "found:    1" in str(caught.value)


def test_layers_whose_separability_fell_are_merged() -> None:
    assert layer_coefficients(torch.tensor([0.2, -0.1, 0.0]), 0.4) == (1.0, 0.4, 1.0)


def test_the_coefficient_has_its_limits() -> None:
    with pytest.raises(ConfigError, match="coefficient"):
        VlConfig(1.5)
    with pytest.raises(ConfigError, match="only with a reference"):
        Vl(VlConfig(-0.5))
    with pytest.raises(ConfigError, match="only with a reference"):
        Vl(VlConfig(0.5, layer_coefficient=(0.1, -0.1)))
    assert Vl(VlConfig(-0.5), referenced=True).reach("model.norm.weight") is Reach.POINTWISE


def test_kept_rows_have_a_digest_of_both_models() -> None:
    def digest(seed: int, rows: tuple[tuple[int, int], ...]) -> str:
        table = {"t": torch.full((3, 2), float(seed))}
        return source_digest(KeptRows(Memory({"t": torch.zeros(2, 2)}), Memory(table), {"t": rows}))

    assert digest(0, ((2, 3),)) == digest(0, ((2, 3),))
    assert len({digest(0, ((2, 3),)), digest(1, ((2, 3),)), digest(0, ((1, 3),))}) == 3
