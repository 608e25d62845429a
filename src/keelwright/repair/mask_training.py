# SPDX-License-Identifier: Apache-2.0
"""How SOMF's mask is learned: AdamW on logits, the DPO loss, and a frozen reference whose log-probabilities are cached.

Every step is a pure function of the settings, the rows and the step's number (which pairs, which uniform numbers, which
rate), so a run that was killed and started again from its checkpoint ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from keelwright.core.digests import json_digest
from keelwright.core.errors import DataError, NumericalError
from keelwright.core.seeds import derive_seed
from keelwright.data.preferences import PreferenceRow
from keelwright.data.rows import ChatRow
from keelwright.ops.concrete import Tie, concrete, harden, logit_count, spread
from keelwright.ops.dpo import answer_logprobs, dpo_loss
from keelwright.ops.philox import stream_key, uniforms
from keelwright.repair.ingredients import Ingredients
from keelwright.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from keelwright.training.rows import EncodedRow, batch_indices, batch_of, encode_rows
from keelwright.weights.sources import source_digest
from keelwright.weights.virtual import Update, VirtualModel

_CHECKS: Final = "//checks"
"""Beside the logits in a checkpoint: what was measured so far, as JSON."""

Gates = Mapping[str, Tensor]
"""By masked part: a mask of the part's shape, 0 to 1."""


@dataclass(frozen=True, slots=True)
class MaskTraining:
    """What the training loop needs to know of SOMF's settings."""

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    beta: float
    temperature: float
    final_temperature: float
    straight_through: bool
    sft_weight: float
    held_out_share: float
    check_every: int
    patience: int
    tie: Tie
    size: int
    seed: int


@dataclass(frozen=True, slots=True)
class Learned:
    """What came of it."""

    logits: Mapping[str, Tensor]
    losses: tuple[float, ...]
    """DPO loss of each step, in nats per pair."""
    checks: tuple[Mapping[str, float], ...] = ()
    """Figures taken now and then: `step`, the held-out loss and accuracy, and what the caller measured."""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Encoded pairs with the reference's log-probabilities, in nats per answer."""

    chosen: Sequence[EncodedRow]
    rejected: Sequence[EncodedRow]
    reference: Tensor
    """Shape `[pairs, 2]`: of the chosen and of the rejected answer."""


@dataclass
class MaskLoop:
    """The training of one mask.

    Args:
        virtual: The model whose weights the gates make.
        shapes: Of the masked parts.
        fuse: From gates to the update that makes the weights.
        reference: The update of the frozen reference.
        settings: Of the loop.
        ingredients: Tokenizer, rows, folder and progress.
    """

    virtual: VirtualModel
    shapes: Mapping[str, tuple[int, ...]]
    fuse: Callable[[Gates], Update]
    reference: Update
    settings: MaskTraining
    ingredients: Ingredients
    _checks: list[Mapping[str, float]] = field(default_factory=list)

    def run(self) -> Learned:
        """Learn the mask, or go on from the checkpoint in the folder.

        Raises:
            DataError: There are no pairs, or too few to hold any out.
            NumericalError: The loss is not finite.
            StorageError: The folder belongs to another run.
        """
        settings, progress = self.settings, self.ingredients.progress
        rows = list(self.ingredients.preferences)
        training, held_out = split_pairs(rows, settings.held_out_share, settings.seed)
        pairs, others = self._encode(training), self._encode(held_out) if held_out else None
        examples = self._examples()
        logits = {
            name: torch.zeros(logit_count(shape, settings.tie, settings.size)) for name, shape in self.shapes.items()
        }
        mark = self._mark(rows)
        started = None if self.ingredients.folder is None else load_checkpoint(self.ingredients.folder, mark)
        if started is not None:
            logits = {name: started.weights[name].clone() for name in logits}
        trained = {name: one.requires_grad_() for name, one in logits.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, weight_decay=0.0)
        losses = [] if started is None else list(started.losses)
        if started is not None:
            optimizer.load_state_dict(started.optimizer)
            self._checks = json.loads(started.weights[_CHECKS].numpy().tobytes())
        progress.stage("learning the mask", total=settings.steps, unit="steps")
        progress.advance(len(losses))
        for step in range(len(losses), settings.steps):
            if 0 < settings.patience <= waited(self._checks):
                progress.note(f"stopped after {step} steps: the held-out loss no longer falls")
                break
            losses.append(self._step(step, trained, optimizer, pairs, examples))
            progress.advance()
            done = step + 1
            if done % settings.check_every == 0 or done == settings.steps:
                self._checks.append(self._check(done, trained, others))
                self._save(mark, trained, losses, optimizer, done)
        found = {name: one.detach().clone() for name, one in trained.items()}
        return Learned(found, tuple(losses), tuple(self._checks))

    def gates(self, logits: Mapping[str, Tensor], step: int) -> dict[str, Tensor]:
        """Return the masks of one step: a fresh draw for each part, the same for all models."""
        settings = self.settings
        heat = temperature_at(settings, step)
        found = {}
        for name, one in logits.items():
            draws = uniforms(stream_key(settings.seed, "mask", str(step), name), 0, len(one))
            mask = concrete(one, draws, temperature=heat)
            mask = harden(mask) if settings.straight_through else mask
            found[name] = spread(mask, self.shapes[name], settings.tie, settings.size).to(self._device)
        return found

    def loss(self, logits: Mapping[str, Tensor], step: int, pairs: Pairs, picked: Sequence[int]) -> Tensor:
        """Return the mean DPO loss of some pairs under the masks of one step, in nats."""
        weights = self.virtual.weights(self.fuse(self.gates(logits, step)))
        return self._dpo(weights, pairs, picked).mean()

    def _step(
        self,
        step: int,
        logits: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        pairs: Pairs,
        examples: Sequence[EncodedRow],
    ) -> float:
        settings = self.settings
        size = min(settings.batch_size, len(pairs.chosen))
        picked = batch_indices(len(pairs.chosen), size, step, seed=settings.seed)
        weights = self.virtual.weights(self.fuse(self.gates(logits, step)))
        loss = self._dpo(weights, pairs, picked).mean()
        total = loss
        if examples and settings.sft_weight > 0.0:
            chosen = batch_indices(len(examples), min(size, len(examples)), step, seed=settings.seed)
            found, tokens = self._logprobs(weights, [examples[index] for index in chosen])
            total = total - settings.sft_weight * found.sum() / tokens.sum()
        if not math.isfinite(float(total.detach())):
            raise NumericalError(
                f"The mask's loss is not finite at step {step}.",
                expected="a finite loss",
                found=f"{float(total.detach())}",
                fix="lower 'lr', or check the weights of the models",
            )
        total.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate_at(settings, step)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    def _dpo(self, weights: Mapping[str, Tensor], pairs: Pairs, picked: Sequence[int]) -> Tensor:
        rows = [pairs.chosen[index] for index in picked] + [pairs.rejected[index] for index in picked]
        found, _ = self._logprobs(weights, rows)
        chosen, rejected = found[: len(picked)], found[len(picked) :]
        reference = pairs.reference[list(picked)].to(found.device)
        return dpo_loss(chosen, rejected, reference[:, 0], reference[:, 1], beta=self.settings.beta)

    def _logprobs(self, weights: Mapping[str, Tensor], rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
        pad = self.ingredients.tokenizer.pad_token_id
        batch = batch_of(rows, pad_id=0 if pad is None else int(pad)).to(self._device)
        return answer_logprobs(self.virtual.logits(weights, batch.input_ids, batch.attention_mask), batch.labels)

    @torch.no_grad()
    def _encode(self, rows: Sequence[PreferenceRow]) -> Pairs:
        tokenizer, module = self.ingredients.tokenizer, self.virtual.module
        chosen = encode_rows(tokenizer, [ChatRow(row.prompt, row.chosen, row.system) for row in rows], module=module)
        rejected = encode_rows(
            tokenizer, [ChatRow(row.prompt, row.rejected, row.system) for row in rows], module=module
        )
        weights = self.virtual.weights(self.reference)
        parts = []
        for start in range(0, len(rows), self.settings.batch_size):
            stop = start + self.settings.batch_size
            sides = [self._logprobs(weights, side[start:stop])[0].cpu() for side in (chosen, rejected)]
            parts.append(torch.stack(sides, dim=1))
        return Pairs(chosen, rejected, torch.cat(parts))

    def _examples(self) -> list[EncodedRow]:
        wanted = self.settings.sft_weight > 0.0
        rows = self.ingredients.examples
        if wanted:
            self.ingredients.require("examples")
        return encode_rows(self.ingredients.tokenizer, rows, module=self.virtual.module) if wanted else []

    @torch.no_grad()
    def _check(self, done: int, logits: Mapping[str, Tensor], others: Pairs | None) -> Mapping[str, float]:
        """Measure the most likely mask on the held-out pairs, and let the caller measure the model that it makes."""
        gates = {
            name: spread((one > 0.0).float(), self.shapes[name], self.settings.tie, self.settings.size).to(self._device)
            for name, one in logits.items()
        }
        weights = self.virtual.weights(self.fuse(gates))
        figures: dict[str, float] = {"step": float(done)}
        if others is not None:
            size = self.settings.batch_size
            parts = [
                self._dpo(weights, others, range(start, min(start + size, len(others.chosen))))
                for start in range(0, len(others.chosen), size)
            ]
            losses = torch.cat(parts)
            figures["held_out_loss"] = float(losses.double().mean())
            # Below log 2 a pair is preferred more strongly than by the reference.
            figures["held_out_improved"] = float((losses < math.log(2.0)).double().mean())
        if self.ingredients.check is not None:
            with self.virtual.installed(weights) as module:
                figures.update(self.ingredients.check(module))
        shown = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if key != "step")
        if shown:
            self.ingredients.progress.note(f"mask after {done} steps: {shown}")
        return figures

    def _save(
        self,
        mark: str,
        logits: Mapping[str, Tensor],
        losses: Sequence[float],
        optimizer: torch.optim.Optimizer,
        done: int,
    ) -> None:
        if self.ingredients.folder is not None:
            notes = torch.tensor(list(json.dumps(self._checks).encode()), dtype=torch.uint8)
            weights = {**logits, _CHECKS: notes}
            save_checkpoint(
                self.ingredients.folder, mark, Checkpoint(done, tuple(losses), weights, optimizer.state_dict())
            )

    def _mark(self, rows: Sequence[PreferenceRow]) -> str:
        digests = {role: source_digest(source) for role, source in self.ingredients.sources.items()}
        texts = [dataclasses.astuple(row) for row in rows]
        texts += [dataclasses.astuple(row) for row in self.ingredients.examples]
        return json_digest([dataclasses.asdict(self.settings), digests, texts, sorted(self.shapes)])

    @property
    def _device(self) -> torch.device:
        return next(self.virtual.module.parameters()).device


def split_pairs(
    rows: Sequence[PreferenceRow], share: float, seed: int
) -> tuple[list[PreferenceRow], list[PreferenceRow]]:
    """Return the pairs to learn from and those held out; the same prompt is never in both.

    Args:
        rows: All pairs.
        share: Of the prompts held out, rounded to whole prompts; 0 holds none out.
        seed: Of the choice.

    Raises:
        DataError: Nothing would be left to learn from.
    """
    prompts = sorted({row.prompt for row in rows}, key=lambda text: (derive_seed(seed, "held out pairs", text), text))
    kept_out = frozenset(prompts[: round(share * len(prompts))])
    training = [row for row in rows if row.prompt not in kept_out]
    if not training:
        raise DataError(
            "There are no preference pairs to learn from.",
            expected="at least one pair that is not held out",
            found=f"{len(rows)} pairs over {len(prompts)} prompts, {share:.0%} held out",
            fix="give more pairs, or a smaller 'held_out_share'",
        )
    return training, [row for row in rows if row.prompt in kept_out]


def waited(checks: Sequence[Mapping[str, float]]) -> int:
    """Return how many measurements passed since the held-out loss was lowest; 0 where there is none."""
    losses = [one["held_out_loss"] for one in checks if "held_out_loss" in one]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def rate_at(settings: MaskTraining, step: int) -> float:
    """Return the learning rate of a step, from 0: a linear rise, then half a cosine to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1.0 + math.cos(math.pi * done))


def temperature_at(settings: MaskTraining, step: int) -> float:
    """Return the temperature of a step, from 0: a straight line from the first to the last."""
    share = step / max(1, settings.steps - 1)
    return settings.temperature + (settings.final_temperature - settings.temperature) * share
