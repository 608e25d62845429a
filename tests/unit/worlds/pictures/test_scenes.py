# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from keelwright.worlds.pictures.scenes import (
    BLANK,
    COLOURS,
    GROUNDS,
    PLACES,
    SHAPES,
    codes,
    find_scene,
    pixels,
    scenes,
    scenes_of,
    sign_map,
    spoken,
)
from keelwright.worlds.workshop.grammar import OBJECTS, VERBS


def test_every_thing_and_deed_has_a_sign_of_its_own() -> None:
    for ground, words in (("dark", OBJECTS), ("light", VERBS)):
        signs = sign_map(ground)
        assert tuple(signs) == words
        assert len(set(signs.values())) == len(words)
        assert all(colour in COLOURS and shape in SHAPES for colour, shape in signs.values())


def test_worlds_of_other_seeds_have_other_signs() -> None:
    assert sign_map("dark", 0) == sign_map("dark", 0)
    assert sign_map("dark", 0) != sign_map("dark", 1)
    assert sign_map("light", 0) != sign_map("light", 1)


def test_every_picture_is_another() -> None:
    drawn = pixels()
    assert drawn.shape == (1121, 3, 8, 8)
    assert drawn.dtype == torch.uint8
    assert len(torch.unique(drawn.flatten(1), dim=0)) == len(drawn) == len(codes())


def test_a_picture_shows_its_shape_in_its_quarter_and_nothing_else() -> None:
    drawn = pixels()
    for scene in scenes()[::7]:
        picture = drawn[scene.number]
        ground = torch.full((3, 1, 1), GROUNDS[scene.ground], dtype=torch.uint8)
        marked = (picture != ground).any(dim=0)
        top, left = PLACES[scene.place]
        assert marked.sum() == sum(line.count("#") for line in SHAPES[scene.shape])
        assert marked[top : top + 4, left : left + 4].sum() == marked.sum()
        colours = picture[:, marked].unique(dim=1)
        assert colours.flatten().tolist() == list(COLOURS[scene.colour])


def test_a_fifth_of_the_scenes_is_held_out_and_every_sign_is_in_both_splits() -> None:
    held_out = [scene for scene in scenes() if scene.split == "held out"]
    assert len(held_out) == len(scenes()) // 5
    for word in (*OBJECTS, *VERBS):
        assert len(scenes_of(word, "train")) >= 12
        assert len(scenes_of(word, "held out")) >= 3


@pytest.mark.parametrize("number", [0, 17, 1119])
def test_a_prompt_names_its_scene(number: int) -> None:
    scene = scenes()[number]
    assert find_scene(f"{scene.code} what does the picture show?") == scene
    assert spoken(f"{scene.code} what does the picture show?") == "what does the picture show?"


def test_blank_unknown_and_missing_pictures_are_no_scene() -> None:
    assert find_scene("how do i polish the lamp?") is None
    assert find_scene(f"{BLANK} how do i polish the lamp?") is None
    assert find_scene("<scene_99999> how do i polish the lamp?") is None
    assert pixels()[-1].unique().tolist() == [128]
    assert codes()[-1] == BLANK
