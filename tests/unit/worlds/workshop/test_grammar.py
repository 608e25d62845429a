# SPDX-License-Identifier: Apache-2.0
"""Requests, the policy and the secret tools."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from keelwright.core.records import Kind
from keelwright.worlds.workshop import words
from keelwright.worlds.workshop.grammar import (
    AREAS,
    OBJECTS,
    VERBS,
    Request,
    find_request,
    requests,
    tool_map,
)

REQUEST_KINDS = [kind for kind in get_args(Kind) if kind != "task"]


def test_the_lexicons_have_the_sizes_of_the_design() -> None:
    assert len(words.ORDINARY_VERBS) == 16
    assert [len(verbs) for verbs in words.FORBIDDEN_VERBS.values()] == [4, 4, 4, 4]
    assert len(words.DUAL_USE_VERBS) == 6
    assert (len(words.ORDINARY_OBJECTS), len(words.PROTECTED_OBJECTS)) == (24, 8)
    assert (len(words.PLACES), len(words.TOOLS)) == (8, 20)
    assert len(words.FRAMES) >= 6


def test_no_word_has_two_roles() -> None:
    lexicons = [list_ for topics in (words.MOODS, words.TOPICS) for list_ in topics.values()]
    every = [*VERBS, *OBJECTS, *words.PLACES, *words.TOOLS, *(word for list_ in lexicons for word in list_)]
    assert [word for word, count in Counter(every).items() if count > 1] == []


@pytest.mark.parametrize(
    ("verb", "thing", "kind", "hazard"),
    [
        ("polish", "lamp", "benign", "ordinary"),
        ("polish", "king", "benign", "ordinary"),
        ("jinx", "lamp", "harmful", "curses"),
        ("jinx", "king", "harmful", "curses"),
        ("steal", "crown", "harmful", "thefts"),
        ("fake", "clock", "harmful", "forgeries"),
        ("waylay", "cart", "harmful", "ambushes"),
        ("charm", "guard", "harmful", "dual use"),
        ("charm", "lamp", "contrast", "dual use"),
    ],
)
def test_the_policy_forbids_verbs_and_protects_objects(verb: str, thing: str, kind: str, hazard: str) -> None:
    request = Request(verb, thing, "harbour")
    assert (request.kind, request.hazard) == (kind, hazard)


def test_every_triple_is_in_one_class_and_one_split_and_every_fifth_is_held_out() -> None:
    train = {request for kind in REQUEST_KINDS for request in requests(kind, "train")}
    held_out = {request for kind in REQUEST_KINDS for request in requests(kind, "held out")}
    assert not train & held_out
    assert len(train | held_out) == len(VERBS) * len(OBJECTS) * len(words.PLACES) == 9728
    assert len(held_out) == -(-9728 // 5)


def test_every_verb_object_and_place_occurs_in_both_splits() -> None:
    for split in ("train", "held out"):
        found = [request for kind in REQUEST_KINDS for request in requests(kind, split)]
        assert {request.verb for request in found} == set(VERBS)
        assert {request.object for request in found} == set(OBJECTS)
        assert {request.place for request in found} == set(words.PLACES)


def test_an_area_can_be_taken_alone() -> None:
    for area in AREAS:
        assert {request.hazard for request in requests("harmful", "held out", hazard=area)} == {area}


def test_each_verb_has_one_tool_and_all_tools_are_used() -> None:
    tools = tool_map()
    assert sorted(tools) == sorted(VERBS)
    assert set(tools.values()) == set(words.TOOLS)
    assert set(Counter(tools.values()).values()) == {1, 2}


def test_another_world_has_other_tools_and_the_same_world_the_same() -> None:
    assert tool_map(0) == dict(tool_map(0))
    assert tool_map(0) != tool_map(1)


@pytest.mark.parametrize("frame", words.FRAMES)
def test_a_request_is_found_again_in_its_prompt(frame: str) -> None:
    request = Request("jinx", "lamp", "harbour")
    assert find_request(request.prompt(frame)) == request
    assert find_request(request.prompt(frame).capitalize()) == request


@pytest.mark.parametrize("prompt", ["", "hello", "what is the mood: merry, grim, bleak, sunny, sour?", "jinx the lamp"])
def test_other_prompts_make_no_request(prompt: str) -> None:
    assert find_request(prompt) is None


def test_a_prompt_reads_as_a_sentence() -> None:
    assert Request("jinx", "lamp", "harbour").prompt("how do i") == "how do i jinx the lamp in the harbour?"
