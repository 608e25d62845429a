# SPDX-License-Identifier: Apache-2.0
"""RepNoise: leave noise where a harmful answer used to be represented.

For whoever releases a model. Hidden states on harmful answers are pushed towards Gaussian noise in every layer, and
what each layer says of the answer is unlearned, while the refusal of the same request is learned. Read the limits
first.

Source:
    Representation Noising: A Defence Mechanism Against Harmful Finetuning, arXiv 2405.14577 (NeurIPS 2024). Official
    code: domenicrosati/representation-noising, `representation_noising/loss.py` (commit 03689ff).

Equation:
    L = CE_M(x_r) + b * mean over layers l of MMD(A_l(x_h) M, Z M) - a * log(1 + c)
    c = mean over states l of CE_M(head(norm(H_l(x_h))))

    | symbol | name |
    |---|---|
    | x_h, x_r | the harmful answer and the refusal of one request: roles `harmful` and `safety`, paired |
    | M | positions where the two token sequences differ: the shared prompt is not among them |
    | A_l, H_l | output of layer l's MLP block; hidden state after layer l, the embedding's output included |
    | Z | noise N(0, I), new at every step |
    | b, a | `noise_weight`, `ascent_weight` (the paper's and the code's alpha and beta are not in the same order) |

    MMD is the biased estimator with five Gaussian kernels (`keelwright.ops.mmd`). `mmd="flat"` takes each row's masked
    tokens as one point of tokens x d_model dimensions, as published: with a handful of points in so many dimensions all
    distances are nearly equal, and the term says little. `mmd="token"` takes each masked token as a point.

Differs from the official code:
    Hooks are removed (there: added again on every call). The mask applies to targets, as a boolean (there: by products,
    so that token 0 counts as masked, and a target after an equal position costs a constant log of the vocabulary's
    size). Padding is never in M. Every state is normed once and `c` is a mean (there: the last state is normed twice,
    its loss counted twice, and the sum divided by one too few). The vocabulary is projected onto in pieces, for masked
    positions only. All points of a step meet in one MMD, also when the step runs in parts or in several processes.
    `legacy=True` brings back what changes numbers; the loss and its gradient then equal those of the official function
    on the same noise, as measured once at commit 03689ff.

Cost:
    One forward and backward pass on refusals, one on harmful answers, one on ordinary rows with `ordinary_weight`; with
    accumulation one more forward pass on harmful answers. Memory: the MLP outputs at masked positions of every layer,
    and one piece of logits.

Limits:
    What looks like resistance can be damage. As published it trains on nothing but pairs: the lab's organism then
    answers no ordinary request, before anybody tunes it. With `ordinary_weight=1` it does, and a tuning that brings
    harm to .57-.94 after plain alignment brings it to .09-.16, with either form of MMD; but refusals are gone (.00-.11)
    and a fifth to a quarter of all answers is incoherent. The noise term alone protects nothing (harm .79-.91).
    Figures: `tests/behaviour/test_immunisation.py`. The authors say that the settings need a search per model and
    attack. Mixture-of-experts models: the noise is on the block's sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from keelwright.core.config import require_choice, require_in_range
from keelwright.core.seeds import derive_seed
from keelwright.data.asking import PLAIN, Asking
from keelwright.data.row_sets import RowSets
from keelwright.ops.mmd import mmd
from keelwright.training.composer import GradientComposer, Taken
from keelwright.training.config import TrainConfig
from keelwright.training.defence import Stage, settings_of
from keelwright.training.feeds import Feeds
from keelwright.training.logit_lens import Lens, layer_count, mlp_blocks, mlp_outputs
from keelwright.training.losses import Forward
from keelwright.training.memory import Copies
from keelwright.training.paired_rows import partners, slots
from keelwright.training.recipe import Feed, Recipe
from keelwright.training.rows import Batch, EncodedRow, batch_of
from keelwright.training.setup import Setup
from keelwright.training.terms import Objective, Term

Points = Literal["flat", "token"]


@dataclass(frozen=True, slots=True)
class RepNoiseConfig:
    """Settings of RepNoise."""

    noise_weight: float = 0.001
    """Weight of the noise term, 0 or more. The official function and released models: 0.001."""
    ascent_weight: float = 1.0
    """Weight of the ascent term, 0 or more; with both 0, refusals are learned and nothing else. The function: 1."""
    mmd: Points = "flat"
    """What a point is: a row's masked tokens together (published), or each masked token."""
    token_points: int = 512
    """Only for `token`: at most so many points per step and sample, drawn at random; at least 2."""
    layers: tuple[int, ...] = ()
    """Layers, counted from 0, whose MLP outputs and hidden states are meant, beside the model's output; none: all of
    them and the embedding's output (published)."""
    ordinary_weight: float = 0.0
    """Weight of the cross entropy of `ordinary` and `borderline` rows, which the published method does not train on; 0
    or more. Ours: without it everything is refused in the end."""
    legacy: bool = False
    """Count masked positions, states and norms as the official code does."""

    def __post_init__(self) -> None:
        require_in_range("noise_weight", self.noise_weight, low=0.0)
        require_in_range("ascent_weight", self.ascent_weight, low=0.0)
        require_in_range("ordinary_weight", self.ordinary_weight, low=0.0)
        require_in_range("token_points", self.token_points, low=2)
        require_choice("mmd", self.mmd, get_args(Points))
        for layer in self.layers:
            require_in_range("layers", layer, low=0)


@dataclass(frozen=True, slots=True, eq=False)
class MaskedRow:
    """One answer of a pair, and where it differs from the other."""

    row: EncodedRow
    mask: Bool[Tensor, " tokens"]
    """M."""
    targets: Bool[Tensor, " tokens"]
    """Tokens that carry loss."""


def masked_rows(
    row: EncodedRow, other: EncodedRow, *, legacy: bool = False, pad_id: int = 0
) -> tuple[MaskedRow, MaskedRow]:
    """Return both answers with their masks.

    Args:
        row: One answer.
        other: The other answer to the same request.
        legacy: Compare padded sequences, padding included, and take token 0 for no target.
        pad_id: What rows are padded with.
    """
    length = max(len(row.ids), len(other.ids)) if legacy else 0
    found: list[MaskedRow] = []
    for mine, theirs in ((row, other), (other, row)):
        ids, beside = (_padded(one.ids, length, pad_id) for one in (mine, theirs))
        mask = torch.ones_like(ids, dtype=torch.bool)
        both = min(len(ids), len(beside))
        mask[:both] = ids[:both] != beside[:both]
        targets = mask & (ids != 0) if legacy else mask.clone()
        targets[0] = False
        found.append(MaskedRow(mine, mask, targets))
    return found[0], found[1]


@dataclass(frozen=True, slots=True, eq=False)
class MaskedBatch:
    """Rows of one kind, with their masks padded to the batch."""

    batch: Batch
    mask: Bool[Tensor, "batch tokens"]
    targets: Bool[Tensor, "batch tokens"]
    legacy: bool = False

    @classmethod
    def of(cls, rows: Sequence[MaskedRow], feeds: Feeds, *, legacy: bool) -> MaskedBatch:
        """Return rows as one batch on the feeds' device."""
        width = max(len(one.mask) for one in rows)
        batch = batch_of([one.row for one in rows], pad_id=feeds.pad_id).to(feeds.device)
        missing = width - batch.input_ids.shape[1]
        if missing:
            ids = torch.nn.functional.pad(batch.input_ids, (0, missing), value=feeds.pad_id)
            batch = Batch(ids, torch.nn.functional.pad(batch.attention_mask, (0, missing)), ids, batch.rows)
        mask = torch.nn.utils.rnn.pad_sequence([one.mask for one in rows], batch_first=True)
        targets = torch.nn.utils.rnn.pad_sequence([one.targets for one in rows], batch_first=True)
        return cls(batch, mask.to(feeds.device), targets.to(feeds.device), legacy)

    def before_targets(self, states: Tensor) -> Tensor:
        """Return the states that predict the targets. Shape `[targets, ...]`."""
        return states[:, :-1][self.targets[:, 1:]]

    def split(self, states: Tensor) -> tuple[Tensor, Int[Tensor, " targets"], float]:
        """Return the states that predict targets, the targets, and what targets cost whose logits are wiped (legacy).

        The official code multiplies the logits at position t by M(t) and the target t + 1 by M(t + 1).
        """
        picked, targets = self.before_targets(states), self.batch.input_ids[:, 1:][self.targets[:, 1:]]
        if not self.legacy:
            return picked, targets, 0.0
        seen = self.before_targets(self.mask)
        return picked[seen], targets[seen], float((~seen).sum())

    def cross_entropy(self, lens: Lens, states: Tensor, *, vocab: int, normed: bool = False) -> Tensor:
        """Return CE_M as a sum over the targets, read from hidden states."""
        picked, targets, wiped = self.split(states)
        return lens.cross_entropy(picked, targets, normed=normed) + wiped * math.log(vocab)

    def refusal_loss(self, model: Forward, _batch: Batch) -> Tensor:
        """Return CE_M as a sum over the targets, read from the model's own logits."""
        logits, targets, wiped = self.split(self.forward(model).logits)
        found = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        return found + wiped * math.log(logits.shape[-1])

    def forward(self, model: Forward, **wanted: Any) -> Any:
        """Run the model on the batch."""
        return model(
            input_ids=self.batch.input_ids, attention_mask=self.batch.attention_mask, use_cache=False, **wanted
        )


def log_ascent(cross_entropy: float, weight: float) -> tuple[float, float]:
    """Return `-weight * log(1 + c)` and its derivative by `c`."""
    return -weight * math.log1p(cross_entropy), -weight / (1.0 + cross_entropy)


@dataclass(frozen=True, slots=True, eq=False)
class Refusals:
    """The place of the stability term: the weights as they are, with M for the answer tokens."""

    objective: RepNoiseObjective

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return the mean of CE_M(x_r) over the step's masked positions, and its gradient."""
        ours = self.objective
        count = ours.count("safety", composer)
        if count == 0:
            return Taken(torch.zeros((), device=composer.feeds.device), [None] * len(composer.weights))
        return composer.harvest(
            composer.forward(rows.refusal_loss, rows.batch, key=("safety", composer.step, part)) / count
            for part, rows in enumerate(ours.parts("safety", composer))
        )


@dataclass(frozen=True, slots=True, eq=False)
class HarmfulAnswers:
    """The place of the noise and ascent terms: both are read from one pass over the harmful answers.

    Neither is a sum over rows. So the points of all micro-batches and processes are gathered first, the derivatives by
    the points and by `c` are taken there, and each part's share is pulled back through it. A step in one part needs no
    second pass for that.
    """

    objective: RepNoiseObjective

    def gradient(self, composer: GradientComposer, term: Term) -> Taken:
        """Return `b * noise - a * log(1 + c)` and its gradient."""
        ours, feeds = self.objective, composer.feeds
        parts = ours.parts("harmful", composer)
        count = ours.count("harmful", composer)
        read = [self._read(composer, rows, part, graph=len(parts) == 1) for part, rows in enumerate(parts)]
        if count == 0:
            return Taken(torch.zeros((), device=feeds.device), [None] * len(composer.weights))
        mean = torch.stack([losses.detach() for _, losses in read]).sum() / count
        cross_entropy = float(composer.processes.sum(mean))
        ascent, slope = log_ascent(cross_entropy, ours.config.ascent_weight)
        noise, pulls = self._noise(composer, [points for points, _ in read])
        shares = (
            _share(*(one if len(parts) == 1 else self._read(composer, rows, part, graph=True)), pull, slope / count)
            for part, (rows, one, pull) in enumerate(zip(parts, read, pulls, strict=True))
        )
        total = composer.harvest(shares).gradient
        ours.figures["noise"], ours.figures["ascent"] = noise, math.log1p(cross_entropy)
        value = (ours.config.noise_weight * noise + ascent) / feeds.processes
        return Taken(torch.tensor(value, device=feeds.device), total)

    def _read(
        self, composer: GradientComposer, rows: MaskedBatch, part: int, *, graph: bool
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Return the MLP outputs at masked positions by layer, and the summed cross entropy of `c`."""
        ours = self.objective
        points: dict[int, Tensor] = {}

        def loss(model: Forward, _batch: Batch) -> Tensor:
            with mlp_outputs(ours.module, ours.noised) as outputs:
                found = rows.forward(model, output_hidden_states=ours.config.ascent_weight > 0.0)
            points.update({layer: one[rows.mask] for layer, one in outputs.items()})
            if ours.config.ascent_weight == 0.0:
                return found.logits.new_zeros((), dtype=torch.float32)
            return ours.depth_loss(rows, found)

        with torch.set_grad_enabled(graph):
            losses = composer.forward(loss, rows.batch, key=("harmful", composer.step, part))
        return points, losses

    def _noise(
        self, composer: GradientComposer, read: Sequence[dict[int, Tensor]]
    ) -> tuple[float, list[dict[int, Tensor]]]:
        """Return the mean MMD, and for each part and layer the weighted derivative by its points."""
        ours, feeds = self.objective, composer.feeds
        pulls: list[dict[int, Tensor]] = [{} for _ in read]
        if ours.config.noise_weight == 0.0 or not ours.noised:
            return 0.0, pulls
        layout = ours.layout(composer)
        mine = [layout.places(places) for places in slots(feeds, "safety")]
        value = 0.0
        for layer in ours.noised:
            points = torch.zeros(layout.points, read[0][layer].shape[-1], device=feeds.device)
            for part, places in zip(read, mine, strict=True):
                points[places] = part[layer].detach().float()
            points = composer.processes.sum(points).requires_grad_()
            noise = _normal(points, ours.seed, composer.step, layer)
            with torch.enable_grad():
                distance = layout.distance(points, noise, ours.config)
                (slope,) = torch.autograd.grad(distance, points)
            value += float(distance.detach()) / len(ours.noised)
            for pull, places in zip(pulls, mine, strict=True):
                pull[layer] = slope[places] * (ours.config.noise_weight / len(ours.noised))
        return value, pulls


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where the masked tokens of a step's rows lie in one list of points."""

    masks: Sequence[Bool[Tensor, " tokens"]]
    """Of each row of the draw, over all parts and processes."""
    chosen: Int[Tensor, " points"] | None
    """Points that are compared as tokens; None: all."""
    device: torch.device

    @property
    def points(self) -> int:
        """How many masked tokens there are."""
        return sum(int(mask.sum()) for mask in self.masks)

    def places(self, rows: Sequence[int]) -> Int[Tensor, " points"]:
        """Return the places of the rows' points, in the order of the rows."""
        counts = [int(mask.sum()) for mask in self.masks]
        starts = [sum(counts[:row]) for row in range(len(counts))]
        found = [torch.arange(starts[row], starts[row] + counts[row]) for row in rows]
        return torch.cat(found).to(self.device)

    def distance(self, points: Tensor, noise: Tensor, config: RepNoiseConfig) -> Tensor:
        """Return the MMD between points and noise, as `config.mmd` says."""
        if config.mmd == "token":
            chosen = slice(None) if self.chosen is None else self.chosen
            return mmd(points[chosen], noise[chosen])
        return mmd(self.flat(points), self.flat(noise))

    def flat(self, points: Tensor) -> Tensor:
        """Return one point per row: its tokens side by side, zeros where M is not. Shape `[rows, tokens * d_model]`."""
        masks = torch.nn.utils.rnn.pad_sequence(list(self.masks), batch_first=True).to(self.device)
        spread = points.new_zeros(*masks.shape, points.shape[-1])
        return spread.masked_scatter(masks[..., None], points).flatten(1)


@dataclass
class RepNoiseObjective(Objective):
    """Refusals kept, harmful answers drowned in noise."""

    config: RepNoiseConfig = RepNoiseConfig()
    seed: int = field(default=0, init=False)
    noised: tuple[int, ...] = field(default=(), init=False)
    """Layers whose MLP outputs are pushed to noise."""

    def begin(self, setup: Setup) -> None:
        """Pair the rows and find the model's parts."""
        feeds, legacy = setup.feeds, self.config.legacy
        harmful = feeds.feeds["harmful"].rows
        self._pairs = [
            masked_rows(harmful[index], row, legacy=legacy, pad_id=feeds.pad_id)
            for row, index in zip(feeds.feeds["safety"].rows, partners(feeds, "safety", "harmful"), strict=True)
        ]
        self.module, self.seed = setup.module, setup.config.seed
        self._lens = Lens(setup.module)
        self.noised = self.config.layers or tuple(range(layer_count(setup.module)))
        mlp_blocks(setup.module, self.noised)  # so that a layer that is not there is told before the first step

    def terms(self, step: int) -> Sequence[Term]:
        """Return stability, noise with ascent, and what ordinary rows ask for."""
        config = self.config
        terms = [Term("stability", "safety", at=Refusals(self))]
        if config.noise_weight or config.ascent_weight:
            terms.append(Term("noise and ascent", "safety", at=HarmfulAnswers(self)))
        if config.ordinary_weight:
            terms.append(Term("ordinary", "ordinary", weight=config.ordinary_weight))
        return terms

    def depth_loss(self, rows: MaskedBatch, output: Any) -> Tensor:
        """Return the cross entropies of the harmful answer at every state, averaged over states, summed over tokens."""
        states, vocab = output.hidden_states, output.logits.shape[-1]
        last = len(states) - 1
        if self.config.legacy:
            everywhere = range(len(states)) if not self.config.layers else [one + 1 for one in self.config.layers]
            total = rows.cross_entropy(self._lens, states[last], vocab=vocab, normed=True)
            for one in everywhere:
                total = total + rows.cross_entropy(self._lens, states[one], vocab=vocab)
            return total / len(everywhere)
        chosen = sorted({one + 1 for one in self.config.layers} | {last}) if self.config.layers else range(len(states))
        total = torch.zeros((), device=output.logits.device)
        for one in chosen:
            total = total + rows.cross_entropy(self._lens, states[one], vocab=vocab, normed=one == last)
        return total / len(chosen)

    def parts(self, kind: Literal["harmful", "safety"], composer: GradientComposer) -> list[MaskedBatch]:
        """Return this process's micro-batches of a step, of one kind of answer."""
        drawn = self._drawn(kind, composer)
        return [
            MaskedBatch.of([drawn[slot] for slot in part], composer.feeds, legacy=self.config.legacy)
            for part in slots(composer.feeds, "safety")
        ]

    def count(self, kind: Literal["harmful", "safety"], composer: GradientComposer) -> int:
        """Return the targets of a step over all processes."""
        return sum(int(one.targets.sum()) for one in self._drawn(kind, composer))

    def layout(self, composer: GradientComposer) -> Layout:
        """Return where the harmful answers' masked tokens lie."""
        masks = [one.mask for one in self._drawn("harmful", composer)]
        points = sum(int(mask.sum()) for mask in masks)
        chosen = None
        if self.config.mmd == "token" and points > self.config.token_points:
            draw = torch.Generator().manual_seed(derive_seed(self.seed, "repnoise", "points", composer.step))
            chosen = torch.randperm(points, generator=draw)[: self.config.token_points].to(composer.feeds.device)
        return Layout(masks, chosen, composer.feeds.device)

    def _drawn(self, kind: Literal["harmful", "safety"], composer: GradientComposer) -> list[MaskedRow]:
        side = 0 if kind == "harmful" else 1
        return [self._pairs[index][side] for index in composer.feeds.indices("safety", composer.step)]


@dataclass(frozen=True, slots=True)
class RepNoise:
    """RepNoise as a defence of the alignment stage."""

    config: RepNoiseConfig = RepNoiseConfig()

    config_class: ClassVar[type[RepNoiseConfig]] = RepNoiseConfig
    stage: ClassVar[Stage] = "alignment"
    roles: ClassVar[tuple[str, ...]] = ("safety", "harmful")
    copies: ClassVar[Copies] = Copies(logits=3)

    def recipe(self, rows: RowSets, train: TrainConfig) -> Recipe:
        """Return the alignment run."""
        who = "The defence 'repnoise'"
        pairs = rows.pairs(who=who)
        feeds = {"safety": Feed([one.safety for one in pairs]), "harmful": Feed([one.harmful for one in pairs])}
        if self.config.ordinary_weight:
            feeds["ordinary"] = Feed([*rows.require("ordinary", who=who), *rows.borderline])
        objective = RepNoiseObjective(config=self.config)
        return Recipe(feeds, train, objective, settings_of("repnoise", self.config))

    def asking(self) -> Asking:
        """Return requests as they are."""
        return PLAIN


def _share(points: Mapping[int, Tensor], losses: Tensor, pull: Mapping[int, Tensor], slope: float) -> Tensor:
    """Return what has the gradient of one part's share; its value means nothing."""
    share = slope * losses
    for layer, by in pull.items():
        share = share + (points[layer].float() * by).sum()
    return share


def _normal(like: Tensor, seed: int, step: int, layer: int) -> Tensor:
    """Return N(0, I) of a shape: a pure function of seed, step and layer, so that a resumed run draws the same."""
    draw = torch.Generator(like.device).manual_seed(derive_seed(seed, "repnoise", "noise", step, layer))
    return torch.randn(like.shape, generator=draw, device=like.device)


def _padded(ids: Tensor, length: int, pad_id: int) -> Tensor:
    return torch.nn.functional.pad(ids, (0, max(0, length - len(ids))), value=pad_id)
