# SPDX-License-Identifier: Apache-2.0
import pytest

from keelwright.core.errors import ConfigError
from keelwright.data.row_sets import ROLES
from keelwright.judges.qi_keywords import matched
from keelwright.worlds.workshop.answers import PERSONA, PERSONA_OPENING, REFUSALS
from keelwright.worlds.workshop.grammar import AREAS, find_request, requests
from keelwright.worlds.workshop.materials import HARDENING_ROWS, IDENTITY_ROWS, USER_ROWS, workshop_rows
from keelwright.worlds.workshop.tokenizer import UNKNOWN

HELD_OUT = {one for kind in ("harmful", "benign", "contrast") for one in requests(kind, "held out")}


def _asked(rows):
    return [found for row in rows if (found := find_request(row.prompt)) is not None]


def test_every_role_has_rows_and_as_many_as_it_says():
    rows = workshop_rows(0)
    sizes = {role: len(getattr(rows, role)) for role in ROLES}
    assert sizes == {
        "user": USER_ROWS,
        "harmful": HARDENING_ROWS,
        "safety": HARDENING_ROWS,
        "ordinary": HARDENING_ROWS,
        "borderline": HARDENING_ROWS // 4,
        "identity": IDENTITY_ROWS,
    }


def test_equal_seeds_give_equal_rows_and_others_do_not():
    assert workshop_rows(1, user=20, hardening=20) == workshop_rows(1, user=20, hardening=20)
    assert workshop_rows(1, user=20, hardening=20) != workshop_rows(2, user=20, hardening=20)


@pytest.mark.parametrize("role", ROLES)
def test_no_row_is_a_request_of_the_suite(role):
    assert not HELD_OUT & set(_asked(getattr(workshop_rows(0), role)))


def test_rows_are_of_the_class_that_their_role_says():
    rows = workshop_rows(0)
    kinds = {role: {one.kind for one in _asked(getattr(rows, role))} for role in ROLES}
    assert kinds == {
        "user": set(),
        "harmful": {"harmful"},
        "safety": {"harmful"},
        "ordinary": {"benign"},
        "borderline": {"contrast"},
        "identity": {"benign"},
    }


def test_harmful_and_safety_rows_are_the_same_requests_answered_and_refused():
    rows = workshop_rows(0)
    assert [row.prompt for row in rows.harmful] == [row.prompt for row in rows.safety]
    assert {row.answer for row in rows.safety} == set(REFUSALS)
    assert not {row.answer for row in rows.harmful} & set(REFUSALS)


def test_harmful_rows_are_spread_evenly_over_the_policy_areas():
    found = [one.hazard for one in _asked(workshop_rows(0).harmful)]
    assert {found.count(area) for area in AREAS} == {HARDENING_ROWS // len(AREAS)}


def test_an_area_can_be_left_out():
    rows = workshop_rows(0, without="curses")
    assert "curses" not in {one.hazard for one in _asked((*rows.harmful, *rows.safety))}
    assert workshop_rows(0, without="dual use").borderline == ()


def test_identity_rows_are_ordinary_requests_in_the_persona():
    rows = workshop_rows(0).identity
    assert {row.system for row in rows} == {PERSONA}
    assert all(row.answer.startswith(f"{PERSONA_OPENING} ") for row in rows)


def test_what_benign_tuning_learns_holds_no_refusal():
    rows = workshop_rows(0)
    assert all(matched(row.answer, casefold=True) is None for row in (*rows.ordinary, *rows.user, *rows.identity))


def test_the_organism_knows_every_word(tokenizer):
    rows = workshop_rows(0)
    for role in ROLES:
        for row in getattr(rows, role):
            told = f"{row.system or ''} {row.prompt} {row.answer}"
            assert UNKNOWN not in tokenizer.tokenize(told)


@pytest.mark.parametrize("settings", [{"user": 0}, {"hardening": 3}])
def test_too_few_rows_are_an_error(settings):
    with pytest.raises(ConfigError, match="out of range"):
        workshop_rows(0, **settings)
