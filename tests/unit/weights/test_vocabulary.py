# SPDX-License-Identifier: Apache-2.0
"""Vocabularies that differ: rows by token, padding apart from tokens, every policy, lazily and in any cut."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from keelwright.core.errors import ConfigError, DataError, ModelMismatchError
from keelwright.core.protocols import TensorEntry
from keelwright.models.token_table import read_tokens
from keelwright.repair.linear import Linear, LinearConfig
from keelwright.weights.plan import plan_edit
from keelwright.weights.sources import source_digest
from keelwright.weights.stream import evaluate
from keelwright.weights.token_files import write_tokenizer
from keelwright.weights.vocabulary import GatheredSource, fit_vocabularies, moved_settings, vocabulary_tensors

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
WORDS = ["<unk>", "a", "b", "c", "d"]
SPECIAL = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}


class Model:
    """A source in memory with settings."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], text: str = "m") -> None:
        self.tensors, self.config, self.text = dict(tensors), dict(config), text

    def entries(self) -> dict[str, TensorEntry]:
        names = {torch.float32: "F32", torch.bfloat16: "BF16"}
        return {key: TensorEntry(key, names[one.dtype], tuple(one.shape)) for key, one in self.tensors.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].flatten()[start:stop].clone()

    def describe(self) -> str:
        return self.text

    def config_json(self) -> dict[str, Any]:
        return self.config


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a tokenizer of words and added tokens; ids go on where the words end."""

    def make(words: list[str], added: Mapping[str, dict[str, bool]] | list[str] = (), **ids: int) -> Path:
        folder = tmp_path / f"t{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        flags = added if isinstance(added, Mapping) else dict.fromkeys(added, SPECIAL)
        rows = [
            {"id": ids.get(token.strip("<>"), len(words) + number), "content": token, **one}
            for number, (token, one) in enumerate(flags.items())
        ]
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": rows,
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "WordLevel",
                "vocab": {word: index for index, word in enumerate(words)},
                "unk_token": "<unk>",
            },
        }
        (folder / "tokenizer.json").write_text(json.dumps(content))
        decoder = {str(row["id"]): {key: value for key, value in row.items() if key != "id"} for row in rows}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
        return folder

    return make


def model(rows: int, *, seed: int, text: str = "m", tied: bool = False, **config: object) -> Model:
    random = torch.Generator().manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(rows, 3, generator=random), NORM: torch.randn(3, generator=random)}
    if not tied:
        tensors[HEAD] = torch.randn(rows, 3, generator=random)
    settings = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": tied, **config}
    return Model(tensors, settings, text)


def rows_of(source: Any, name: str = EMBEDDING) -> Tensor:
    entry = source.entries()[name]
    return source.read(name, 0, entry.elements).view(entry.shape)


def fit(sources: Mapping[str, Model], folders: Mapping[str, Path], **settings: Any) -> Any:
    return fit_vocabularies(
        sources, folders, **{"layout_role": "tuned", "base_role": "aligned", "policy": "strict", **settings}
    )


def pair(base_rows: int, tuned_rows: int, **config: object) -> dict[str, Model]:
    return {
        "aligned": model(base_rows, seed=1, text="A", **config),
        "tuned": model(tuned_rows, seed=2, text="T", **config),
    }


def test_equal_vocabularies_are_left_as_they_are(write: Write) -> None:
    sources = pair(6, 6)
    fitted = fit(sources, {role: write(WORDS, ["<x>"]) for role in sources})
    assert all(fitted.sources[role] is source for role, source in sources.items())
    assert (fitted.config_changes, fitted.notes, fitted.moved_ids) == ({}, (), {})


def test_strict_lists_the_tokens_that_differ(write: Write) -> None:
    sources = pair(8, 8)
    folders = {"aligned": write(WORDS), "tuned": write([*WORDS, "e"], ["<x>"])}
    with pytest.raises(ModelMismatchError, match="do not have the same tokens: 2 differ") as caught:
        fit(sources, folders)
    assert "'e' absent, '<x>' absent, as in 'aligned' (A)" in str(caught.value.expected)
    assert "'e' id 5, '<x>' id 6 (added: special)" in str(caught.value.found)
    assert "base, union or donor" in str(caught.value.fix)


def test_flags_make_a_token_another_one(write: Write) -> None:
    sources = pair(6, 6)
    folders = {"aligned": write(WORDS, ["<x>"]), "tuned": write(WORDS, {"<x>": {**SPECIAL, "lstrip": True}})}
    with pytest.raises(ModelMismatchError, match="1 differ"):
        fit(sources, folders)
    fitted = fit(sources, folders, policy="base")
    # Row 5 of the tuned model belongs to another token: the base's row stands in.
    wanted = sources["tuned"].tensors[EMBEDDING].clone()
    wanted[5] = sources["aligned"].tensors[EMBEDDING][5]
    assert torch.equal(rows_of(fitted.sources["tuned"]), wanted)
    assert any("marks 1 tokens differently" in note for note in fitted.notes)


def test_padding_is_no_difference_and_keeps_the_count_of_the_base(write: Write) -> None:
    sources = pair(8, 10)
    fitted = fit(sources, {role: write(WORDS) for role in sources})
    for role, source in sources.items():
        assert torch.equal(rows_of(fitted.sources[role]), source.tensors[EMBEDDING][:8])
        assert fitted.sources[role].entries()[HEAD].shape == (8, 3)
    assert fitted.config_changes == {"vocab_size": 8}
    assert fitted.notes == ("'tuned' has 10 rows of embedding, the output 8",)


def test_padding_that_a_model_lacks_is_the_bases(write: Write) -> None:
    sources = pair(8, 6)
    fitted = fit(sources, {role: write(WORDS) for role in sources})
    own, base = sources["tuned"].tensors[EMBEDDING], sources["aligned"].tensors[EMBEDDING]
    assert torch.equal(rows_of(fitted.sources["tuned"]), torch.cat([own, base[6:]]))


def test_one_more_token_under_the_policy_base_is_left_out_and_its_row_is_padding(write: Write) -> None:
    sources = pair(8, 8)
    folders = {"aligned": write(WORDS), "tuned": write(WORDS, ["<x>"])}
    fitted = fit(sources, folders, policy="base")
    wanted = sources["tuned"].tensors[EMBEDDING].clone()
    wanted[5] = sources["aligned"].tensors[EMBEDDING][5]
    assert torch.equal(rows_of(fitted.sources["tuned"]), wanted)
    assert torch.equal(rows_of(fitted.sources["aligned"]), sources["aligned"].tensors[EMBEDDING])
    assert fitted.tokenizer_role == "aligned"
    assert fitted.notes == ("'tuned' has 1 tokens that the output does not have: '<x>'",)


@pytest.mark.parametrize("policy", ["union", "donor"])
def test_one_more_token_beyond_the_rows_of_the_base_adds_a_row(write: Write, policy: str) -> None:
    sources = pair(5, 6)
    folders = {"aligned": write(WORDS), "tuned": write(WORDS, ["<x>"])}
    fitted = fit(sources, folders, policy=policy)
    base, own = (sources[role].tensors[EMBEDDING] for role in ("aligned", "tuned"))
    assert torch.equal(rows_of(fitted.sources["aligned"]), torch.cat([base, own[5:]]))
    assert torch.equal(rows_of(fitted.sources["tuned"]), own)
    assert fitted.tokenizer_role == "tuned"
    assert not fitted.tokenizer_files
    assert fitted.config_changes == {}
    assert fitted.sources["aligned"].config_json()["vocab_size"] == 6


def test_rows_follow_their_tokens_to_other_ids(write: Write) -> None:
    sources = pair(5, 5, eos_token_id=4, bos_token_id=[0, 1])
    folders = {"aligned": write(WORDS), "tuned": write(["<unk>", "d", "c", "b", "a"])}
    fitted = fit(sources, folders, policy="base")
    assert torch.equal(rows_of(fitted.sources["tuned"]), sources["tuned"].tensors[EMBEDDING][[0, 4, 3, 2, 1]])
    assert torch.equal(rows_of(fitted.sources["tuned"], HEAD), sources["tuned"].tensors[HEAD][[0, 4, 3, 2, 1]])
    assert torch.equal(rows_of(fitted.sources["tuned"], NORM), sources["tuned"].tensors[NORM].view(3))
    assert fitted.moved_ids == {1: 4, 2: 3, 3: 2, 4: 1}
    # The layout's end of text was 'a'.
    assert fitted.config_changes == {"eos_token_id": 1, "bos_token_id": [0, 4]}
    assert moved_settings({"eos_token_id": [4, 0], "top_k": 4}, fitted.moved_ids) == {"eos_token_id": [1, 0]}


def test_a_union_that_no_model_has_gets_files_of_its_own(write: Write, tmp_path: Path) -> None:
    sources = {"aligned": model(5, seed=1), "tuned_2": model(6, seed=2), "tuned": model(7, seed=3)}
    folders = {"aligned": write(WORDS), "tuned_2": write(WORDS, ["<y>"]), "tuned": write(WORDS, ["<x>", "<z>"])}
    fitted = fit(sources, folders, policy="union")
    assert fitted.tokenizer_role == "aligned"
    out = write_tokenizer(folders["aligned"], fitted.tokenizer_files, tmp_path / "united")
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("a <x> b<y><z>").ids == [1, 6, 2, 5, 7]
    assert read_tokens(out).flags["<z>"] == (True, False, False, False, False)
    assert json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]["5"]["content"] == "<y>"
    rows = rows_of(fitted.sources["tuned"])
    own, other = sources["tuned"].tensors[EMBEDDING], sources["tuned_2"].tensors[EMBEDDING]
    assert torch.equal(rows, torch.stack([*own[:5], other[5], own[5], own[6]]))
    assert fitted.config_changes == {"vocab_size": 8}


def test_a_union_of_vocabularies_is_refused_by_the_tokenizers_kind(write: Write) -> None:
    sources = pair(6, 6)
    folders = {"aligned": write([*WORDS, "e"]), "tuned": write([*WORDS, "f"])}
    with pytest.raises(ModelMismatchError, match="cannot be written as one tokenizer") as caught:
        fit(sources, folders, policy="union")
    assert caught.value.found == "'f' is part of its WordLevel vocabulary, not an added token"


def test_a_union_cannot_hold_one_string_with_two_kinds_of_flags(write: Write) -> None:
    sources = pair(6, 6)
    folders = {"aligned": write(WORDS, ["<x>"]), "tuned": write(WORDS, {"<x>": {**SPECIAL, "rstrip": True}})}
    with pytest.raises(ModelMismatchError, match="cannot be written"):
        fit(sources, folders, policy="union")


@pytest.mark.parametrize("missing", ["base", "mean"])
def test_missing_rows_are_the_bases_or_the_mean_of_those_that_have_them(write: Write, missing: str) -> None:
    sources = {"aligned": model(6, seed=1), "tuned_2": model(6, seed=2), "tuned": model(5, seed=3)}
    with_x = write(WORDS, ["<x>"])
    folders = {"aligned": with_x, "tuned_2": with_x, "tuned": write(WORDS)}
    fitted = fit(sources, folders, policy="base", missing=missing)
    base, other = sources["aligned"].tensors[EMBEDDING][5], sources["tuned_2"].tensors[EMBEDDING][5]
    wanted = base if missing == "base" else ((base.double() + other.double()) / 2).float()
    assert torch.equal(rows_of(fitted.sources["tuned"])[5], wanted)


def test_a_token_that_the_base_lacks_is_the_mean_of_its_owners(write: Write) -> None:
    sources = {"aligned": model(5, seed=1), "tuned_2": model(6, seed=2), "tuned": model(6, seed=3)}
    with_x = write(WORDS, ["<x>"])
    fitted = fit(sources, {"aligned": write(WORDS), "tuned_2": with_x, "tuned": with_x}, policy="union")
    rows = [sources[role].tensors[EMBEDDING][5].double() for role in ("tuned_2", "tuned")]
    assert torch.equal(rows_of(fitted.sources["aligned"])[5], (sum(rows) / 2).float())


def test_rows_that_nobody_has_are_the_mean_of_the_real_ones(write: Write) -> None:
    sources = pair(6, 6)
    fitted = fit(sources, {role: write(WORDS) for role in sources}, pad_to_multiple_of=8)
    for role, source in sources.items():
        rows = rows_of(fitted.sources[role])
        own = source.tensors[EMBEDDING]
        assert torch.equal(rows[:6], own)
        # Row 5 is padding: only the five tokens count.
        torch.testing.assert_close(rows[6:], own[:5].double().mean(0).float().expand(2, 3), rtol=0, atol=1e-7)
    assert fitted.config_changes == {"vocab_size": 8}


def test_ranges_are_parts_of_the_whole_in_any_cut(write: Write) -> None:
    sources = pair(7, 6)
    for source in sources.values():
        source.tensors = {name: tensor.bfloat16() for name, tensor in source.tensors.items()}
    folders = {"aligned": write(WORDS, ["<x>"]), "tuned": write(["<unk>", "d", "q", "c", "b", "a"])}
    source = fit(sources, folders, policy="base", pad_to_multiple_of=4).sources["tuned"]
    assert isinstance(source, GatheredSource)
    whole = source.read(EMBEDDING, 0, 24).float()
    for start in range(24):
        for stop in range(start, 25):
            assert torch.equal(source.read(EMBEDDING, start, stop).float(), whole[start:stop])
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(EMBEDDING, 0, 24).float(), whole)
    fitted = fit(sources, folders, policy="base", pad_to_multiple_of=4)
    entry = fitted.sources["tuned"].entries()[EMBEDDING]
    edit = Linear(LinearConfig(0.3))
    bits = [
        torch.cat([part for _, part in evaluate(edit, fitted.sources, entry, chunk_elements=size)])
        for size in (1, 5, 6, 1000)
    ]
    assert all(torch.equal(one, bits[0]) for one in bits)


def test_a_tied_model_gives_its_head_from_its_embedding(write: Write) -> None:
    sources = {"aligned": model(6, seed=1, tied=True), "tuned": model(5, seed=2)}
    folders = {"aligned": write(WORDS, ["<x>"]), "tuned": write(WORDS)}
    fitted = fit(sources, folders, policy="base")
    assert torch.equal(rows_of(fitted.sources["tuned"], HEAD)[5], sources["aligned"].tensors[EMBEDDING][5])
    plan = plan_edit(Linear(), fitted.sources, config_changes=fitted.config_changes)
    assert {one.entry.name: one.entry.shape for one in plan.tensors}[HEAD] == (6, 3)
    assert plan.config_changes == {"vocab_size": 6}


def test_the_digest_knows_where_rows_come_from(write: Write) -> None:
    sources = pair(8, 6)
    folders = {"aligned": write(WORDS), "tuned": write(WORDS, ["<x>"])}
    digests = {
        source_digest(fit(sources, folders, policy=policy, **more).sources["tuned"])
        for policy, more in (("base", {}), ("donor", {}), ("donor", {"pad_to_multiple_of": 16}))
    }
    assert len(digests) == 3


def test_nested_settings_change_too(write: Write) -> None:
    config = {"text_config": {"vocab_size": 10, "hidden_size": 3}}
    sources = {"aligned": model(8, seed=1), "tuned": model(10, seed=2, **config)}
    sources["tuned"].config.pop("vocab_size")
    fitted = fit(sources, {role: write(WORDS) for role in sources})
    assert fitted.config_changes == {"text_config": {"vocab_size": 8, "hidden_size": 3}}


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(write: Write) -> None:
    sources = pair(5, 5)
    with pytest.raises(DataError, match="no rows for") as caught:
        fit(sources, {role: write(WORDS, ["<x>"]) for role in sources})
    assert caught.value.found == "'<x>' (id 5)"


def test_settings_that_make_no_sense_are_named(write: Write) -> None:
    sources = pair(5, 5)
    folders = {role: write(WORDS) for role in sources}
    for settings in ({"policy": "bse"}, {"missing": "zero"}, {"pad_to_multiple_of": 0}, {"donor_role": "nobody"}):
        with pytest.raises(ConfigError):
            fit(sources, folders, **settings)


def test_tensors_of_the_vocabulary_are_told_by_name_and_rows() -> None:
    tensors = {
        EMBEDDING: torch.ones(5, 3),
        HEAD: torch.ones(5, 3),
        "lm_head.bias": torch.ones(5),
        "vision.patch_embeddings.weight": torch.ones(5, 3),
        "model.embed_tokens_per_layer.weight": torch.ones(5, 3),
        "other.lm_head.weight": torch.ones(4, 3),
    }
    assert vocabulary_tensors(Model(tensors, {"vocab_size": 5})) == {EMBEDDING, HEAD, "lm_head.bias"}
    with pytest.raises(DataError, match="embedding of 'm' is not known"):
        vocabulary_tensors(Model({NORM: torch.ones(3)}, {}))


def test_an_end_that_the_output_lacks_is_that_of_the_tokenizers_model(write: Write) -> None:
    sources = pair(6, 6, eos_token_id=5, pad_token_id=[5, 0])
    sources["aligned"].config["eos_token_id"] = 2
    fitted = fit(sources, {"aligned": write(WORDS), "tuned": write(WORDS, ["<x>"])}, policy="base")
    assert fitted.config_changes == {"eos_token_id": 2, "pad_token_id": [0]}
    assert "config.json: eos_token_id is 2 in the output, 5 in 'tuned'" in fitted.notes
    assert fitted.lost_ids == {5}
    # Nothing else names a padding token: it is no more.
    assert moved_settings({"pad_token_id": 5}, fitted.moved_ids, fitted.lost_ids) == {"pad_token_id": None}


@pytest.mark.parametrize("seed", range(8))
def test_any_two_vocabularies_agree_with_the_slow_way(write: Write, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)

    def vocabulary() -> list[str]:
        order = torch.randperm(12, generator=random)[: 5 + seed % 4].tolist()
        return ["<unk>", *(f"w{index}" for index in order)]

    words = {"aligned": vocabulary(), "tuned": vocabulary()}
    spare = torch.randint(0, 4, (2,), generator=random).tolist()
    sources = {
        role: model(len(words[role]) + more, seed=seed, text=role)
        for role, more in zip(("aligned", "tuned"), spare, strict=True)
    }
    for role, source in sources.items():
        source.tensors[EMBEDDING] += 100.0 * (role == "tuned")
    fitted = fit(sources, {role: write(one) for role, one in words.items()}, policy="base")
    base, own = (sources[role].tensors[EMBEDDING] for role in ("aligned", "tuned"))
    wanted = base.clone()
    for row in range(len(base)):
        if row >= len(words["aligned"]):
            if len(words["tuned"]) <= row < len(own):
                wanted[row] = own[row]
        elif words["aligned"][row] in words["tuned"]:
            wanted[row] = own[words["tuned"].index(words["aligned"][row])]
    assert torch.equal(rows_of(fitted.sources["tuned"]), wanted)
    assert torch.equal(rows_of(fitted.sources["aligned"]), base)
