# SPDX-License-Identifier: Apache-2.0
"""The builder `user-specific`: requests with a user's profile, each beside the same request of an ordinary user.

| role | request | profile | kind |
|---|---|---|---|
| safety | every dangerous pair of the set | the pair's | harmful |
| helpful | every request of an ordinary user | the ordinary one | benign |
| ordinary | those of dangerous pairs that a limit left out above | the ordinary one | benign |
| control | requests that are in no dangerous pair | drawn from the dangerous pairs | benign |

The published benchmark has the first two rows alone: a model that refuses whoever has a profile scores full marks on
them. The control shows it. Its pairs are drawn at random and read by nobody, so a few may be dangerous after all.

Settings: `template` (the shipped frame or a YAML file), `attack` (a text of the frame that presses for an answer:
`prefix-injection`, `refusal-suppression`), `control` (how many control rows at most).

Source:
    In et al., U-SafeBench, arXiv 2502.15086; attacks in the spirit of Wei et al., arXiv 2307.02483; our wording.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from keelwright.core.config import require_in_range
from keelwright.core.digests import text_digest
from keelwright.core.errors import DataError
from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed
from keelwright.measure.builders.drawing import Load, facts_of, read_sets, settings_of
from keelwright.measure.builders.frames import NO_ATTACK, SHIPPED, Frame, read_frame
from keelwright.measure.limits import sample_items
from keelwright.measure.part import Drawn, PartSpec

Role = Literal["safety", "helpful", "ordinary", "control"]

_NEEDED: Final = ("profile", "instruction")


@dataclass(frozen=True, slots=True)
class UserSpecificConfig:
    """How requests with profiles are put."""

    template: str = SHIPPED
    """The shipped frame, or the path of a frame file (see `measure.builders.frames`)."""
    attack: str = NO_ATTACK
    """`none`, `prefix-injection`, `refusal-suppression`, or an attack of the frame file."""
    control: int = 1000
    """At most this many control rows; each request gets one profile."""

    def __post_init__(self) -> None:
        require_in_range("control", self.control, low=0)


def build(spec: PartSpec, load: Load, *, limit: int | None, seed: int) -> Drawn:
    """Return the rows of all four roles.

    Args:
        spec: The part; its sets hold items with the materials `profile` and `instruction` and the fact `domain`:
            dangerous pairs of kind `harmful`, an ordinary user's requests of kind `benign`.
        load: Reads a set by name.
        limit: At most this many safety rows, helpful rows and control rows of each set; the ordinary user's side of a
            drawn pair always comes along.
        seed: Of the limit and of the control's profiles.

    Raises:
        ConfigError: A setting is wrong, or the frame lacks a domain or the attack.
        DataError: The sets hold no pairs of profile and instruction.
    """
    config = settings_of(spec, UserSpecificConfig)
    frame = read_frame(config.template)
    sets = read_sets(spec, load)
    rows: list[tuple[Role, Item]] = []
    for loaded in sets:
        _require_pairs(loaded.items, loaded.name)
        rows += _roles(loaded.items, config.control, limit=limit, seed=seed)
    items = tuple(_framed(role, item, frame, config.attack) for role, item in rows)
    return Drawn(items, facts_of(sets, items, wording=[frame.wording(), config.attack]))


def question_of(item: Item) -> str:
    """Return what the two sides of a pair share: instruction and domain."""
    return f"{text_digest(item.materials['instruction'].strip())}/{item.facts['domain']}"


def _roles(items: Sequence[Item], control: int, *, limit: int | None, seed: int) -> list[tuple[Role, Item]]:
    dangerous = [item for item in items if item.kind == "harmful"]
    plain = [item for item in items if item.kind != "harmful"]
    safety = sample_items(dangerous, limit, seed=seed)
    helpful = sample_items(plain, limit, seed=seed)
    paired = {question_of(item) for item in dangerous}
    free = [item for item in helpful if question_of(item) not in paired]
    control_items = sample_items(free, min(control, limit or control), seed=seed) if control else []
    return [
        *(("safety", item) for item in safety),
        *(("helpful", item) for item in helpful),
        *(("ordinary", item) for item in _other_sides(safety, plain, asked=helpful)),
        *(("control", _under_profile(item, dangerous, seed)) for item in control_items),
    ]


def _other_sides(safety: Sequence[Item], plain: Sequence[Item], *, asked: Sequence[Item]) -> list[Item]:
    """Return the ordinary user's side of every drawn pair that is not asked already; made where the set has none."""
    known = {question_of(item): item for item in reversed(plain)}
    done = {question_of(item) for item in asked}
    found: list[Item] = []
    for item in safety:
        question = question_of(item)
        if question in done:
            continue
        done.add(question)
        found.append(known.get(question) or _for_ordinary_user(item, plain))
    return found


def _for_ordinary_user(item: Item, plain: Sequence[Item]) -> Item:
    somebody = plain[0].materials["profile"] if plain else "nothing in particular is known"
    profile = plain[0].facts.get("profile", "ordinary") if plain else "ordinary"
    return dataclasses.replace(
        item,
        item_id=f"{item.suite}/ordinary-{text_digest(question_of(item))}",
        kind="benign",
        hazard=item.facts["domain"],
        facts={"domain": item.facts["domain"], "profile": profile},
        materials={**item.materials, "profile": somebody},
    )


def _under_profile(item: Item, dangerous: Sequence[Item], seed: int) -> Item:
    """Return an ordinary request under one of the dangerous pairs' profiles, drawn by seed and id alone."""
    profiles = {one.materials["profile"]: one.facts["profile"] for one in dangerous}
    rng = random.Random(derive_seed(seed, "user-specific", "control", item.item_id))
    profile = rng.choice(sorted(profiles))
    return dataclasses.replace(
        item,
        item_id=f"{item.item_id}+control-{profiles[profile]}",
        facts={**item.facts, "profile": profiles[profile]},
        materials={**item.materials, "profile": profile},
    )


def _framed(role: Role, item: Item, frame: Frame, attack: str) -> Item:
    domain = item.facts["domain"]
    put = frame.fill(
        domain, profile=item.materials["profile"], instruction=item.materials["instruction"], attack=attack
    )
    question = question_of(item)
    pressed = "" if attack == NO_ATTACK else f"+{attack}"
    return dataclasses.replace(
        item,
        item_id=f"{item.item_id}+{frame.name}{pressed}",
        prompt=put.prompt,
        system=frame.system,
        cluster_id=f"{item.suite}/{question.partition('/')[0]}",
        pair_id=f"{item.suite}/{question}",
        facts={**item.facts, "role": role, "frame": frame.name, "attack": attack},
        materials={**item.materials, "before": put.before, "after": put.after},
    )


def _require_pairs(items: Sequence[Item], name: str) -> None:
    for item in items:
        missing = [one for one in _NEEDED if one not in item.materials]
        missing += [one for one in ("domain", "profile") if one not in item.facts]
        if missing:
            raise DataError(
                f"The set '{name}' holds no requests with profiles.",
                expected="items with the materials profile and instruction, and the facts domain and profile",
                found=f"'{item.item_id}' without {', '.join(missing)}",
                fix="use u-safebench, or a set of that form",
            )
    if not any(item.kind == "harmful" for item in items):
        raise DataError(
            f"The set '{name}' holds no dangerous pairs.",
            expected="items of kind harmful",
            found=f"{len(items)} items of other kinds",
            fix="load the safety part too",
        )
