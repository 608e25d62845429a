# SPDX-License-Identifier: Apache-2.0
"""Freeze the safety layers: tune everything but the block of layers that tells harmful requests from others.

For whoever controls the user's run. Which block it is can be said (`layers: 2-3`) or found on the model before the
first step (`layers: auto`). A reconstruction: how the source matches layers is not published.

Source:
    Safety Layers in Aligned Large Language Models: The Key to LLM Security, arXiv 2408.17003 (abstract; details second
    hand).

Equation:
    gap_l = mean_ij angle(n_i, m_j) - mean_{i != k} angle(n_i, n_k)    at the last prompt token, after block l
    first guess: from the first layer whose gap is above 0 for certain, to where its slope is back at the median
    borders: the range near the guess whose projections, times `factor`, raise over-refusal most; the guess where none
    raises it

    | symbol | name |
    |---|---|
    | n, m | hidden states of ordinary and of harmful requests |
    | over-refusal | mean over look-alike rows of log p(a refusal) - log p(the row's answer), both per token |

Differs from the official code:
    Unknown but for its factor 1.1 and for some 720 look-alike requests on which refusals are counted. Ours compares
    likelihoods, so that no answers are generated and no judge is needed, and bootstraps the gap's lower end.

Cost:
    Below one forward and backward pass per step. `auto` before the first step: one forward pass over the ordinary and
    harmful requests, and two over the look-alike rows for each candidate range, at most nine.

Limits:
    In the lab (2 % bad rows, 75 steps at 1.5e-4, first seed) it hardly helps: harm .89 with what `auto` finds, layers
    0-1, and .96 with the other half, where plain tuning has .95. The embeddings are never part of the block; where they
    are tied to the head, safety can leave through both. Whether the block matters is shown only by a block of the same
    size elsewhere (`other_block`): run both. A longer range of scaled layers tends to change more, so `auto` may favour
    length. On a model of four layers a block is a large part of the whole.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle
from typing import ClassVar, Final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.config import require_in_range
from keelwright.core.errors import ConfigError, DataError
from keelwright.core.seeds import derive_seed, generator
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.data.rows import ChatRow
from keelwright.ops.bootstrap import bootstrap_mean
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.reference import answer_losses
from keelwright.training.rows import EncodedRow, batch_of, encode_rows
from keelwright.training.setup import Reference, Setup
from keelwright.training.terms import Objective
from keelwright.weights.recipes.layers import names_a_sense

AUTO: Final = "auto"
BATCH: Final = 32
"""Rows at a time while layers are looked for."""


@dataclass(frozen=True, slots=True)
class FreezeLayersConfig:
    """Settings of freezing safety layers."""

    layers: str = AUTO
    """`auto`, or the first and the last frozen layer as `2-3`, counted from 0; one number is one layer."""
    factor: float = 1.1
    """Only for `auto`: what the projections of a candidate are multiplied by, above 1. The released script: 1.1."""
    reach: int = 1
    """Only for `auto`: how many layers each border may move from the first guess, 0 or more. Ours."""
    probe_rows: int = 64
    """Only for `auto`: rows of each kind that are looked at, at least 4. Ours; the source has some 720 look-alikes."""

    def __post_init__(self) -> None:
        require_in_range("factor", self.factor, low=1.0, low_open=True)
        require_in_range("reach", self.reach, low=0)
        require_in_range("probe_rows", self.probe_rows, low=4)
        if self.layers != AUTO:
            Block.parse(self.layers)


@dataclass(frozen=True, slots=True, order=True)
class Block:
    """Consecutive layers, counted from 0, both ends included."""

    first: int
    last: int

    @staticmethod
    def parse(text: str) -> Block:
        """Return the block of `2-3` or `2`.

        Raises:
            ConfigError: The text is neither.
        """
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip(), re.ASCII)
        if found is None or int(found[2] or found[1]) < int(found[1]):
            raise ConfigError(
                f"'{text}' names no layers.",
                expected="auto, or the first and the last layer counted from 0, such as 2-3",
                found=text,
                fix="write the smaller number first",
            )
        return Block(int(found[1]), int(found[2] or found[1]))

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class SafetyLayers:
    """What was found on a model."""

    block: Block
    guess: Block
    """Before the borders were moved."""
    gaps: tuple[float, ...]
    """By layer, degrees."""
    lower_ends: tuple[float, ...]
    """One-sided lower 95 % bounds of the gaps, degrees."""
    over_refusal: dict[Block, float] = field(default_factory=dict)
    """By candidate: the change of over-refusal when it is scaled, nats per token."""


def decoder_stack(module: Module) -> tuple[str, int]:
    """Return the name of the text decoder's list of layers, and how many there are.

    Raises:
        ConfigError: The model has no such list.
    """
    stacks = {name: one for name, one in module.named_modules() if isinstance(one, ModuleList) and len(one)}
    texts = {name: one for name, one in stacks.items() if not names_a_sense(name)}
    if not texts:
        raise ConfigError(
            "The model has no list of decoder layers.",
            expected="a decoder whose layers are numbered",
            found=type(module).__name__,
            fix="choose another defence",
        )
    name = max(texts, key=lambda one: sum(parameter.numel() for parameter in texts[one].parameters()))
    return name, len(texts[name])


def block_parameters(module: Module, block: Block) -> list[str]:
    """Return the names of all parameters of a block, adapters in it included.

    Raises:
        ConfigError: The model has fewer layers.
    """
    stack, layers = decoder_stack(module)
    if block.last >= layers:
        raise ConfigError(
            f"The model has no layer {block.last}.",
            expected=f"layers within 0-{layers - 1}",
            found=str(block),
            fix="count layers from 0",
        )
    heads = tuple(f"{stack}.{layer}." for layer in range(block.first, block.last + 1))
    return [name for name, _ in module.named_parameters() if name.startswith(heads)]


def other_block(layers: int, block: Block, seed: int) -> Block:
    """Return a random block of the same size that is another one: the control of every frozen block.

    Raises:
        ConfigError: There is no other block of that size.
    """
    size = block.last - block.first + 1
    choices = [first for first in range(layers - size + 1) if first != block.first]
    if not choices:
        raise ConfigError(
            "There is no other block of that size to compare with.",
            expected=f"a block of fewer than {layers} layers",
            found=str(block),
            fix="freeze fewer layers",
        )
    drawn = int(torch.randint(len(choices), (1,), generator=generator(seed, "freeze_layers", "control")))
    return Block(choices[drawn], choices[drawn] + size - 1)


def angle_gaps(
    ordinary: Float[Tensor, "ordinary width"], harmful: Float[Tensor, "harmful width"]
) -> Float[Tensor, " ordinary"]:
    """Return by ordinary request how much wider its mean angle to harmful requests is than to other ordinary ones.

    Returns:
        Degrees, in float64; their mean is the layer's gap.
    """
    normal, bad = (torch.nn.functional.normalize(one.double(), dim=-1) for one in (ordinary, harmful))
    within = (normal @ normal.T).clamp(-1.0, 1.0).acos().rad2deg()
    across = (normal @ bad.T).clamp(-1.0, 1.0).acos().rad2deg()
    within.fill_diagonal_(0.0)
    return across.mean(1) - within.sum(1) / (len(normal) - 1)


def first_guess(gaps: Sequence[float], lower_ends: Sequence[float]) -> Block | None:
    """Return the layers over which the gap opens; None where it opens nowhere for certain.

    Args:
        gaps: By layer.
        lower_ends: Lower bounds of the gaps.
    """
    onset = next((layer for layer, low in enumerate(lower_ends) if low > 0.0), None)
    if onset is None:
        return None
    slopes = np.diff(gaps, prepend=0.0)
    after = [layer for layer in range(onset + 1, len(gaps)) if slopes[layer] <= np.median(slopes)]
    return Block(onset, after[0] if after else len(gaps) - 1)


def find_safety_layers(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: RowSets,
    config: FreezeLayersConfig | None = None,
    *,
    seed: int = 0,
) -> SafetyLayers:
    """Find the block of layers in which an aligned model tells harmful requests from ordinary ones.

    Args:
        module: The aligned model; its weights are scaled for a while and copied back.
        tokenizer: Its tokenizer.
        rows: Safety and ordinary rows; where there are no borderline rows, ordinary ones serve as look-alikes.
        config: How far and on how many rows.
        seed: Of the bootstrap.

    Raises:
        DataError: Rows are missing, or no layer tells the two apart.
    """
    config, who = config or FreezeLayersConfig(), "The search for safety layers"
    safety, ordinary = (rows.require(role, who=who)[: config.probe_rows] for role in ("safety", "ordinary"))
    model = Reference(module)
    normal, bad = (_last_states(model, encode_rows(tokenizer, some, module=module)) for some in (ordinary, safety))
    per_layer = [angle_gaps(one, two).numpy() for one, two in zip(normal, bad, strict=True)]
    gaps = tuple(float(one.mean()) for one in per_layer)
    seeds = [derive_seed(seed, "freeze_layers", layer) % 2**32 for layer in range(len(gaps))]
    lower_ends = tuple(
        float(bootstrap_mean(one, resamples=1000, confidence=0.9, seed=own).low)
        for one, own in zip(per_layer, seeds, strict=True)
    )
    guess = first_guess(gaps, lower_ends)
    if guess is None:
        raise DataError(
            "No layer tells the harmful requests from the ordinary ones.",
            expected="an aligned model, and requests that it refuses and answers",
            found=f"gaps between {min(gaps):.3g} and {max(gaps):.3g} degrees, none above 0 for certain",
            fix="give more rows, or name the layers, such as layers: 2-3",
        )
    alike = (rows.borderline or rows.ordinary)[: config.probe_rows]
    answers = encode_rows(tokenizer, alike, module=module)
    refusals = encode_rows(
        tokenizer,
        [ChatRow(row.prompt, one.answer, system=row.system) for row, one in zip(alike, cycle(safety), strict=False)],
        module=module,
    )
    plain = _over_refusal(model, refusals, answers)
    scores: dict[Block, float] = {}
    for block in candidates(guess, len(gaps), config.reach):
        with _scaled(module, block, config.factor):
            scores[block] = _over_refusal(model, refusals, answers) - plain
    return SafetyLayers(refined(guess, scores), guess, gaps, lower_ends, scores)


def refined(guess: Block, over_refusal: Mapping[Block, float]) -> Block:
    """Return the candidate whose scaling raises over-refusal most; the guess where none raises it."""
    best = max(over_refusal, key=lambda block: (over_refusal[block], -block.first, -block.last))
    return best if over_refusal[best] > 0.0 else guess


def candidates(guess: Block, layers: int, reach: int) -> list[Block]:
    """Return the blocks whose borders lie within reach of the guess's."""
    moves = range(-reach, reach + 1)
    found = {Block(guess.first + left, guess.last + right) for left in moves for right in moves}
    return sorted(block for block in found if 0 <= block.first <= block.last < layers)


@contextmanager
def _scaled(module: Module, block: Block, factor: float) -> Iterator[None]:
    """Multiply the projections of a block for a while; afterwards they are what they were, bit for bit."""
    named = dict(module.named_parameters())
    names = [name for name in block_parameters(module, block) if "lora_" not in name and named[name].dim() > 1]
    weights: list[Tensor] = [named[name] for name in names]
    copies = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            torch._foreach_mul_(weights, factor)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, copies)


def _last_states(model: Reference, rows: Sequence[EncodedRow]) -> list[Tensor]:
    """Return the hidden states at the last prompt token after every block. Shape `[rows, width]` each."""
    device, parts = next(model.module.parameters()).device, []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        batch = batch_of([EncodedRow(row.ids[: row.prompt_tokens], row.prompt_tokens) for row in some], pad_id=0)
        batch = batch.to(device)
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
        )
        last = torch.tensor([row.prompt_tokens - 1 for row in some], device=device)
        lines = torch.arange(len(some), device=device)
        parts.append([states[lines, last].float().cpu() for states in output.hidden_states[1:]])
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _over_refusal(model: Reference, refusals: Sequence[EncodedRow], answers: Sequence[EncodedRow]) -> float:
    return float((_mean_logprobs(model, refusals) - _mean_logprobs(model, answers)).mean())


def _mean_logprobs(model: Reference, rows: Sequence[EncodedRow]) -> Tensor:
    """Return the mean log-probability of each row's answer tokens, nats. Shape `[rows]`."""
    device = next(model.module.parameters()).device
    found: list[Tensor] = []
    for start in range(0, len(rows), BATCH):
        some = rows[start : start + BATCH]
        losses = answer_losses(model, batch_of(some, pad_id=0).to(device)).double().cpu()
        found.extend(-one.mean() for one in losses.split([row.answer_tokens for row in some]))
    return torch.stack(found)


@dataclass
class FreezeLayersObjective(Objective):
    """The user's rows; layers that are found at the start are left out of every step."""

    config: FreezeLayersConfig = FreezeLayersConfig()
    rows: RowSets = field(default_factory=RowSets)
    found: SafetyLayers | None = field(default=None, init=False)
    """What `auto` found."""

    def begin(self, setup: Setup) -> None:
        """Find the layers, where they are not named."""
        self._trained: frozenset[str] | None = None
        if self.config.layers == AUTO:
            self.found = find_safety_layers(
                setup.module, setup.tokenizer, self.rows, self.config, seed=setup.config.seed
            )
            frozen = set(block_parameters(setup.module, self.found.block))
            self._trained = frozenset(name for name in setup.composer.names if name not in frozen)

    def trained(self, step: int) -> Collection[str] | None:
        """Return all weights outside the block: the others get no gradient, and no weight decay either."""
        if self.found is not None:
            self.figures.update({"first_frozen": self.found.block.first, "last_frozen": self.found.block.last})
        return self._trained


@dataclass(frozen=True, slots=True)
class FreezeLayers:
    """Frozen safety layers as a defence of the tuning stage."""

    config: FreezeLayersConfig = FreezeLayersConfig()

    config_class: ClassVar[type[FreezeLayersConfig]] = FreezeLayersConfig
    stage: ClassVar[Stage] = "tuning"
    roles: ClassVar[tuple[str, ...]] = ("safety", "ordinary")

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the user's run."""
        feeds = {"user": Feed(rows.require("user", who="The defence 'freeze_layers'"))}
        settings = settings_of("freeze_layers", self.config)
        if self.config.layers == AUTO:
            objective = FreezeLayersObjective(config=self.config, rows=rows)
            return Recipe(feeds, train, objective, settings)
        block = Block.parse(self.config.layers)
        return Recipe(feeds, train, Objective(), settings, lambda module: block_parameters(module, block))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN
