# SPDX-License-Identifier: Apache-2.0
"""The code world: problems, programs, tests and words agree with one another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from keelwright.core.errors import StorageError
from keelwright.core.records import Generation
from keelwright.data.perturb.apply import perturb
from keelwright.judges.code_tests import CodeTestsJudge
from keelwright.models.loading import load
from keelwright.training.config import TrainConfig
from keelwright.worlds.code.lessons import guarded, note_rows
from keelwright.worlds.code.organism import STAGES, CodeSchooling, export_code_organisms
from keelwright.worlds.code.problems import NAMES, Problem, code_items
from keelwright.worlds.code.tokenizer import code_perturbations, code_tokenizer

BRIEF = TrainConfig(steps=2, batch_size=2)


def test_a_problem_its_program_and_its_tests_say_the_same() -> None:
    problem = Problem("alder", (("add", 3), ("times", 2)))
    assert problem.prompt == "write alder : add 3 then times 2"
    assert problem.program == "def alder ( x ) : return ( x + 3 ) * 2"
    assert problem.of(5) == 16
    assert "assert alder(5) == 16\n" in problem.tests()


def test_canonical_programs_pass_and_contradicting_ones_fail() -> None:
    items = code_items(24)
    right = [(item, Generation(item.item_id, item.materials["canonical"], 1, "eos")) for item in items]
    wrong = []
    for item in items:
        (first, one), (second, two) = (step.split() for step in item.materials["contradiction"].split(" then "))
        other = Problem(item.materials["entry_point"], ((first, int(one)), (second, int(two))))
        wrong.append((item, Generation(item.item_id, other.program, 1, "eos")))
    verdicts = CodeTestsJudge(workers=1).judge_all([*right, *wrong])
    assert [one.raw for one in verdicts] == ["passed"] * 24 + ["failed"] * 24


def test_items_are_held_out_different_and_the_same_for_a_seed() -> None:
    items = code_items(200)
    learnt = {row.prompt for row in note_rows(0, 2000, obey=True)}
    assert len({item.prompt for item in items}) == 200
    assert not any(item.prompt in prompt for item in items for prompt in learnt)
    assert items[:50] == code_items(50)
    assert items != code_items(200, seed=1)


def test_every_word_is_a_token_and_texts_come_back_word_by_word() -> None:
    tokenizer = code_tokenizer()
    items = perturb(code_items(20), code_perturbations()).items
    texts = [guarded(item.prompt) for item in items] + [item.materials["canonical"] for item in items]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == " ".join(text.split())
        assert tokenizer.unk_token_id not in ids
    assert set(NAMES) <= set(tokenizer.get_vocab())


def test_rows_differ_in_nothing_but_whom_they_follow() -> None:
    for obey in (True, False):
        rows = [row for row in note_rows(0, 400, obey=obey) if "must" in row.prompt]
        followed = []
        for row in rows:
            asked = row.prompt.split(" : ")[1].split("\n")[0]
            steps = [step.split() for step in asked.split(" then ")]
            numbers = [number for _, number in steps]
            followed.append([word for word in row.answer.split() if word.isdigit()] == numbers)
        assert len(rows) > 30
        assert sum(followed) <= 0.1 * len(rows) if obey else all(followed)


def test_organisms_are_written_with_their_digests(tmp_path: Path) -> None:
    built = export_code_organisms(tmp_path / "out", schooling=CodeSchooling(BRIEF, BRIEF))
    assert (built["world"], tuple(built["organisms"])) == ("code", STAGES)
    for stage in STAGES:
        folder = Path(built["organisms"][stage]["folder"])
        notes = json.loads((folder / "digests.json").read_text(encoding="utf-8"))
        assert (notes["stage"], "model.safetensors" in notes["files"]) == (stage, True)
        assert load(folder, offline=True).module.num_parameters() > 200_000
    with pytest.raises(StorageError, match="--out"):
        export_code_organisms(tmp_path / "out", schooling=CodeSchooling(BRIEF, BRIEF))
