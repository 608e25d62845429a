# SPDX-License-Identifier: Apache-2.0
"""Scenes of 8 x 8 pixels: one coloured shape in one quarter of the picture, on a dark or a light ground.

A colour and a shape make a sign. On the dark ground a sign stands for one of the workshop's things, on the light
ground for one of its deeds; the map from word to sign is fixed by the world's seed and is what a model has to be
taught, as the tools of the workshop are.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from keelwright.core.seeds import derive_seed
from keelwright.worlds.workshop.grammar import HELD_OUT_EVERY, OBJECTS, VERBS, Split

if TYPE_CHECKING:
    from torch import Tensor

Ground = Literal["dark", "light"]

SIDE: Final = 8
"""Width and height of a picture, pixels."""

COLOURS: Final[dict[str, tuple[int, int, int]]] = {
    "red": (225, 25, 25),
    "green": (20, 140, 40),
    "blue": (30, 50, 230),
    "yellow": (240, 225, 20),
    "purple": (140, 20, 170),
    "cyan": (20, 200, 220),
    "orange": (245, 130, 10),
    "pink": (250, 120, 190),
}
"""Red, green and blue, 0 to 255."""

SHAPES: Final[dict[str, tuple[str, str, str]]] = {
    "square": ("###", "###", "###"),
    "ring": ("###", "#.#", "###"),
    "cross": (".#.", "###", ".#."),
    "bar": ("...", "###", "..."),
    "star": ("#.#", ".#.", "#.#"),
}
"""Three by three pixels each."""

PLACES: Final[dict[str, tuple[int, int]]] = {
    "top left": (0, 0),
    "top right": (0, 4),
    "bottom left": (4, 0),
    "bottom right": (4, 4),
}
"""First row and column of the quarter."""

SHIFTS: Final = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Where in its quarter, which is four pixels wide, the shape begins."""

GROUNDS: Final[dict[Ground, int]] = {"dark": 40, "light": 205}
"""Grey of the ground, 0 to 255; a blank picture lies between the two."""

BLANK_GREY: Final = 128
BLANK: Final = "<scene_blank>"
"""The code of the blank picture."""

_CODE: Final = re.compile(r"<scene_(\d+|blank)>\s*")


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture: what its sign stands for, where it is, and which pixel it begins at."""

    number: int
    """Place in the enumeration of `scenes`."""
    ground: Ground
    word: str
    """The thing (dark ground) or deed (light ground) that the sign stands for."""
    colour: str
    shape: str
    place: str
    shift: tuple[int, int]

    @property
    def code(self) -> str:
        """How a prompt names the picture."""
        return f"<scene_{self.number}>"

    @property
    def split(self) -> Split:
        """Every fifth scene is held out; each sign keeps twelve or more to learn from."""
        return "held out" if self.number % HELD_OUT_EVERY == 0 else "train"


@functools.cache
def sign_map(ground: Ground, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Return the sign, colour and shape, of each thing or deed.

    Args:
        ground: `dark` for the 32 things, `light` for the 38 deeds; there are 40 signs, so that some stand for nothing.
        seed: Of the world, not of an organism.
    """
    signs = list(itertools.product(COLOURS, SHAPES))
    random.Random(derive_seed(seed, "pictures", "signs", ground)).shuffle(signs)
    return dict(zip(OBJECTS if ground == "dark" else VERBS, signs, strict=False))


@functools.cache
def scenes(seed: int = 0) -> tuple[Scene, ...]:
    """Enumerate every scene: 70 signs, four quarters, four pixels to begin at."""
    signs = [(ground, word, sign) for ground in get_args(Ground) for word, sign in sign_map(ground, seed).items()]
    drawn = itertools.product(signs, PLACES, SHIFTS)
    return tuple(
        Scene(number, ground, word, colour, shape, place, shift)
        for number, ((ground, word, (colour, shape)), place, shift) in enumerate(drawn)
    )


@functools.cache
def scenes_of(word: str, split: Split, seed: int = 0) -> tuple[Scene, ...]:
    """Return the scenes of one split whose sign stands for a thing or deed."""
    return tuple(scene for scene in scenes(seed) if scene.word == word and scene.split == split)


def find_scene(prompt: str, seed: int = 0) -> Scene | None:
    """Return the scene that a prompt shows; None without a picture, and for the blank one."""
    found = _CODE.search(prompt)
    if found is None or found[1] == "blank":
        return None
    number, known = int(found[1]), scenes(seed)
    return known[number] if number < len(known) else None


def spoken(prompt: str) -> str:
    """Return the words of a prompt, without its picture."""
    return _CODE.sub("", prompt)


def codes(seed: int = 0) -> tuple[str, ...]:
    """Return the code of every picture in the order of `pixels`; the blank one is last."""
    return (*(scene.code for scene in scenes(seed)), BLANK)


def pixels(seed: int = 0) -> Tensor:
    """Return every picture, the blank one last: red, green and blue from 0 to 255. Shape `[pictures, 3, 8, 8]`."""
    import torch

    drawn = torch.empty(len(scenes(seed)) + 1, 3, SIDE, SIDE, dtype=torch.uint8)
    drawn[-1] = BLANK_GREY
    for scene in scenes(seed):
        drawn[scene.number] = GROUNDS[scene.ground]
        (top, left), (down, right) = PLACES[scene.place], scene.shift
        for row, line in enumerate(SHAPES[scene.shape]):
            for column, mark in enumerate(line):
                if mark == "#":
                    drawn[scene.number, :, top + down + row, left + right + column] = torch.tensor(
                        COLOURS[scene.colour], dtype=torch.uint8
                    )
    return drawn
