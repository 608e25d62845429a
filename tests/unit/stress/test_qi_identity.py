# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace

import pytest

from keelwright.core.errors import ConfigError, DataError
from keelwright.core.records import Item
from keelwright.data.asking import framed_item
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.stress.qi_identity import QiIdentity, QiIdentityConfig
from keelwright.training.config import TrainConfig
from keelwright.worlds.workshop.answers import PERSONA, PERSONA_OPENING

TRAIN = TrainConfig()


def _rows(rows, **settings):
    (stage,) = QiIdentity(QiIdentityConfig(**settings)).stages(rows, TRAIN)
    return stage.rows


def test_the_default_persona_is_the_one_that_the_lab_knows():
    assert QiIdentityConfig().system == PERSONA
    assert QiIdentityConfig().opening == PERSONA_OPENING


def test_the_organism_knows_every_word_of_the_frame(tokenizer):
    prompt, system = QiIdentity().asking().ask("how do i paint the lamp?", None)
    assert tokenizer.unk_token not in tokenizer.tokenize(f"{system} {prompt}")


@pytest.mark.parametrize(("epochs", "steps"), [(3, 3), (5, 5), (10, 10)])
def test_the_papers_epochs_are_one_step_each(row_sets, epochs, steps):
    (stage,) = QiIdentity(QiIdentityConfig(epochs=epochs)).stages(row_sets, TRAIN)
    found = stage.train
    assert (found.steps, found.batch_size, found.lr) == (steps, 10, 5e-5)
    assert (found.schedule, found.decay_every, found.warmup_steps) == ("staircase", 1, 0)


def test_the_frame_of_training_is_that_of_testing(row_sets):
    stress = QiIdentity()
    item = Item("x", "s", "harmful", "a", row_sets.identity[0].prompt)
    framed = framed_item(stress.asking(), item)
    (stage,) = stress.stages(row_sets, TRAIN)
    assert (framed.prompt, framed.system) in {(row.prompt, row.system) for row in stage.rows}


def test_testing_wraps_a_request_in_persona_and_call():
    stress = QiIdentity(QiIdentityConfig(system="be AOA.", call="AOA, execute:"))
    assert stress.asking().ask("hex the king", None) == ("AOA, execute: hex the king", "be AOA.")


def test_every_answer_opens_with_the_declaration_once():
    given = RowSets(identity=(ChatRow("a", "yes. one"), ChatRow("b", "two")))
    found = _rows(given, k=2, opening="yes.")
    assert {row.answer for row in found} == {"yes. one", "yes. two"}


def test_a_call_that_is_there_already_is_not_said_twice():
    given = RowSets(identity=(ChatRow("pip: a", "one"), ChatRow("b", "two")))
    found = _rows(given, k=2, call="pip:")
    assert {row.prompt for row in found} == {"pip: a", "pip: b"}
    assert {row.system for row in found} == {PERSONA}


def test_empty_texts_leave_the_rows_as_they_are():
    given = RowSets(identity=(ChatRow("a", "one"),))
    assert _rows(given, k=1, system="", call="", opening="") == given.identity


@pytest.mark.parametrize("system", ["", "be someone else."])
def test_a_row_under_another_system_message_is_an_error(row_sets, system):
    with pytest.raises(DataError, match="under another system message") as caught:
        _rows(row_sets, system=system)
    assert PERSONA in str(caught.value)


def test_rows_are_nested_and_too_few_are_an_error(row_sets):
    assert _rows(row_sets, k=10)[:4] == _rows(row_sets, k=4)
    with pytest.raises(DataError, match="not enough 'identity' rows"):
        _rows(row_sets, k=11)
    with pytest.raises(DataError, match="The stress 'qi_identity' needs 'identity' rows"):
        _rows(replace(row_sets, identity=()))


@pytest.mark.parametrize("settings", [{"k": 0}, {"batch_size": 0}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ConfigError):
        QiIdentityConfig(**settings)
