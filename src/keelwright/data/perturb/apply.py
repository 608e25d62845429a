# SPDX-License-Identifier: Apache-2.0
"""Items with a set of perturbations: each problem clean and, where it has what they need, once per perturbation.

What it is: the input side of DegradePrompter, a robustness evaluation of code models: benign problems, put in ways
that mislead, distract, or ask for less. A perturbed item keeps its tests; its pair is the clean item.

Source:
    On the Adversarial Robustness of Instruction-Tuned Large Language Models for Code, arXiv 2411.19508; Wang et al.,
    ReCode, arXiv 2212.10264 (natural noise).
Status:
    Reconstruction. The paper's wordings, their number and how they are chosen are not public; `degrade-v1` is ours, and
    its figures are not comparable to the paper's.
Cost:
    One more generation per item and perturbation.
Limits:
    One text per perturbation, not a search for the worst.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from keelwright.core.config import require_choice
from keelwright.core.records import Item
from keelwright.core.seeds import derive_seed
from keelwright.data.code_prompt import parsed, split_prompt
from keelwright.data.perturb.added_text import Placement, add_text
from keelwright.data.perturb.natural_noise import examples_first, with_noise
from keelwright.data.perturb.perturbation import ADDING, Perturbation, PerturbationSet
from keelwright.data.perturb.poor_examples import with_poor_examples


@dataclass(frozen=True, slots=True)
class Perturbed:
    """What a set of perturbations makes of items."""

    items: tuple[Item, ...]
    """Each clean item, then its perturbed forms in the order of the set."""
    left_out: Mapping[str, int]
    """By perturbation: items that lack what it needs, or that it would leave as they are."""


def perturb(
    items: Sequence[Item],
    perturbations: PerturbationSet,
    *,
    seed: int = 0,
    placement: Placement = "user_turn",
    pool: Sequence[Item] | None = None,
) -> Perturbed:
    """Return every item clean and perturbed.

    Args:
        items: Programming problems; materials `entry_point` and `canonical` where perturbations need them.
        perturbations: The set.
        seed: Of everything that is drawn: equal seeds give equal prompts, whatever other items there are.
        placement: Where added text goes; see `added_text`.
        pool: Problems that examples are drawn from; None takes the items themselves.

    Raises:
        ConfigError: A setting is out of range.
    """
    require_choice("placement", placement, ("user_turn", "comment"))
    examples = [one for one in (items if pool is None else pool) if one.materials.get("canonical")]
    found: list[Item] = []
    left_out: Counter[str] = Counter()
    for item in items:
        found.append(item)
        for perturbation in perturbations.perturbations:
            rng = random.Random(derive_seed(seed, "perturb", perturbations.name, perturbation.name, item.item_id))
            prompt = perturbed_prompt(item, perturbation, rng, placement=placement, pool=examples)
            if prompt is None:
                left_out[perturbation.name] += 1
            else:
                found.append(_perturbed(item, perturbation, prompt))
    return Perturbed(tuple(found), dict(left_out))


def perturbed_prompt(
    item: Item,
    perturbation: Perturbation,
    rng: random.Random,
    *,
    placement: Placement = "user_turn",
    pool: Sequence[Item] = (),
) -> str | None:
    """Return one item's perturbed prompt; None where the item lacks something or nothing would change.

    Args:
        item: The problem.
        perturbation: What to do to it.
        rng: Draws what is random.
        placement: Where added text goes.
        pool: Problems with the material `canonical`, for examples.
    """
    has = _has(item, pool)
    if any(need not in has for need in perturbation.needs):
        return None
    if perturbation.family in ADDING:
        return add_text(item.prompt, perturbation.fill(has), placement)
    if perturbation.family == "poor_examples":
        return with_poor_examples(item, perturbation, rng, pool)
    if perturbation.family == "natural_noise":
        return with_noise(item, perturbation, rng)
    return item.prompt


def _perturbed(item: Item, perturbation: Perturbation, prompt: str) -> Item:
    facts = {
        "perturbation": perturbation.name,
        "family": perturbation.family,
        "semantics": perturbation.semantics,
    }
    return replace(
        item,
        item_id=f"{item.item_id}+{perturbation.name}",
        pair_id=item.item_id,
        cluster_id=item.cluster_id or item.item_id,
        prompt=prompt,
        facts={**item.facts, **facts},
    )


def _has(item: Item, pool: Sequence[Item]) -> dict[str, str]:
    """Return what the item offers to needs and slots, by name."""
    has = {name: text for name, text in item.materials.items() if text.strip()}
    arguments = _arguments(item)
    if arguments:
        has |= {"first_argument": arguments[0], "last_argument": arguments[-1]}
    if len(arguments) > 1:
        has["two_arguments"] = ", ".join(arguments)
    if pool:
        has["examples"] = ""
    if examples_first(item.prompt, item.materials.get("entry_point", "")) is not None:
        has["docstring_examples"] = ""
    return has


def _arguments(item: Item) -> list[str]:
    """Return the names of the function's arguments, from the prompt's signature or else from the known solution."""
    entry_point = item.materials.get("entry_point", "")
    stub = split_prompt(item.prompt, entry_point).stub
    tree = parsed(f"{stub.rstrip()}\n    pass\n" if stub else item.materials.get("canonical", ""))
    for node in tree.body if tree is not None else ():
        arguments = getattr(node, "args", None)
        if arguments is not None and getattr(node, "name", None) == entry_point:
            return [one.arg for one in arguments.args]
    return []
