# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from keelwright.core.errors import MissingError, ModelMismatchError
from keelwright.models.refs import LocalModel, parse_ref, resolve
from keelwright.models.sources import open_source
from keelwright.repair.format import Format
from keelwright.repair.materialise import repair
from keelwright.repair.tokens import fit_tokens

MakeFolder = Callable[..., Path]


def opened(folders: dict[str, Path]) -> tuple[dict[str, Any], dict[str, LocalModel]]:
    locals_ = {role: resolve(parse_ref(folder), offline=True) for role, folder in folders.items()}
    return {role: open_source(local) for role, local in locals_.items()}, locals_


def add_token(folder: Path, token: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def pair(make_folder: MakeFolder) -> dict[str, Path]:
    return {"aligned": make_folder("aligned", 1), "tuned": make_folder("tuned", 2, near=1)}


def test_equal_tokens_change_nothing(pair: dict[str, Path], tmp_path: Path) -> None:
    sources, locals_ = opened(pair)
    found = fit_tokens(sources, locals_, tmp_path / "x", policy="strict", layout_role="tuned", base_role="aligned")
    assert all(found.sources[role] is sources[role] for role in sources)
    assert (found.config_changes, found.generation_changes, found.tokenizer, found.notes) == ({}, {}, None, ())


def test_the_tokenizer_is_that_of_the_policy(pair: dict[str, Path], tmp_path: Path) -> None:
    add_token(pair["tuned"], "<task>")
    sources, locals_ = opened(pair)
    for policy, role in (("base", "aligned"), ("donor", "tuned"), ("union", "tuned")):
        found = fit_tokens(sources, locals_, tmp_path / policy, policy=policy, layout_role="tuned", base_role="aligned")  # type: ignore[arg-type]
        assert found.tokenizer == pair[role]
    with pytest.raises(ModelMismatchError, match="do not have the same tokens"):
        fit_tokens(sources, locals_, tmp_path / "x", policy="strict", layout_role="tuned", base_role="aligned")


def test_a_union_that_no_model_has_is_written_to_the_place(pair: dict[str, Path], tmp_path: Path) -> None:
    add_token(pair["tuned"], "<task>")
    add_token(pair["aligned"], "<safe>")
    sources, locals_ = opened(pair)
    place = tmp_path / "place"
    found = fit_tokens(sources, locals_, place, policy="union", layout_role="tuned", base_role="aligned")
    assert found.tokenizer is not None and found.tokenizer.is_relative_to(place)
    vocabulary = AutoTokenizer.from_pretrained(found.tokenizer).get_vocab()
    assert {"<task>", "<safe>"} <= set(vocabulary)


def test_models_in_memory_bring_their_tokenizers(make_live: Callable[..., Any], tmp_path: Path) -> None:
    aligned, tuned = make_live(1), make_live(2, near=1)
    tuned.tokenizer.add_tokens(["<task>"])
    # 40 rows hold 12 tokens: the new one takes a row of the padding.
    repair("linear", aligned=aligned, tuned=tuned, coefficient=0.5, out=tmp_path / "out", output_format=Format("union"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<task>") == 12
    found = open_source(parse_ref(str(tmp_path / "out"))).read("model.embed_tokens.weight", 12 * 16, 13 * 16)
    assert torch.equal(found, tuned.module.get_input_embeddings().weight[12].detach())


def test_a_model_without_a_tokenizer_cannot_be_fitted(pair: dict[str, Path], tmp_path: Path) -> None:
    for path in pair["aligned"].glob("tokenizer*"):
        path.unlink()
    sources, locals_ = opened(pair)
    with pytest.raises(MissingError, match="tokenizer"):
        fit_tokens(sources, locals_, tmp_path / "x", policy="base", layout_role="tuned", base_role="aligned")
