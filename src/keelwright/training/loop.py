# SPDX-License-Identifier: Apache-2.0
"""The one training loop: AdamW on the answers of chat rows, resumable to the bit.

Everything that a step depends on is a pure function of the config and the step's number (rows, learning rate,
dropout), so a run that was killed and started again from its last checkpoint ends with the same bits as one that was
not. The loop runs on accelerate: one process by default, several where the launcher says so; each takes its share of
every batch, and the loss is divided by the answer tokens of the whole batch.

The global random state is put back when the loop ends.

Cost: one forward and one backward pass per step. Memory: gradients and two moments per trained weight.
Limits: weights are trained in the precision they have. In half precision small steps are rounded away: load the
model in float32, or train a LoRA adapter, whose factors are always float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keelwright.core.errors import ConfigError, NumericalError
from keelwright.core.protocols import Progress, Silent
from keelwright.core.seeds import derive_seed
from keelwright.data.rows import ChatRow
from keelwright.training.checkpoints import Checkpoint, fingerprint, load_checkpoint, save_checkpoint
from keelwright.training.config import TrainConfig, learning_rate
from keelwright.training.lora import LoraAdapter, attach_lora
from keelwright.training.rows import IGNORED, Batch, EncodedRow, batch_indices, batch_of, encode_rows

__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a training run did."""

    losses: tuple[float, ...]
    """Mean loss of each step, nats per answer token."""
    steps: int
    seconds: float
    """Wall time of this call; resumed steps cost none."""
    adapter: LoraAdapter | None = None
    """The trained adapter, still on the model; None where the weights themselves were trained."""


def train(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[ChatRow],
    config: TrainConfig,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
    frozen: Collection[str] = (),
) -> TrainResult:
    """Train a live model in place.

    Args:
        module: The model; it stays on its device, and its mode and `requires_grad` flags are as before afterwards.
        tokenizer: Its tokenizer, with a chat template.
        rows: What to learn; passed over as often as the steps need.
        config: Steps, rates and seeds. With `lora_rank` above 0 the weights stay and an adapter is trained;
            `TrainResult.adapter.detach()` gives the model back unchanged.
        folder: Where checkpoints go. The same call on the same folder resumes, and ends with the same bits.
        progress: Told about each step.
        frozen: Names of parameters that are not trained.

    Raises:
        ConfigError: A name in `frozen` is no parameter, or nothing is left to train.
        DataError: There are no rows, or one does not fit the model.
        NumericalError: The loss is not finite.
        StorageError: `folder` belongs to another run, or cannot be written.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    encoded = encode_rows(tokenizer, rows, module=module)
    adapter = None
    if config.lora_rank:
        seed = derive_seed(config.seed, "training", "lora")
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        adapter = attach_lora(module, rank=config.lora_rank, alpha=alpha, seed=seed)
    try:
        with _trained(module, frozen, keep_flags=adapter is not None) as weights, _own_random_state(module):
            mark = fingerprint(config, encoded, weights)
            run = _Run(module, weights, encoded, config, pad_id=_pad_id(tokenizer))
            losses = run.steps(folder, mark, progress)
    except BaseException:
        # A half-trained adapter must not stay on a model that the caller still holds.
        if adapter is not None:
            adapter.detach()
        raise
    return TrainResult(tuple(losses), config.steps, time.perf_counter() - started, adapter)


class _Run:
    """One training run: the model and optimiser as accelerate prepared them."""

    def __init__(
        self,
        module: PreTrainedModel,
        weights: dict[str, Parameter],
        rows: Sequence[EncodedRow],
        config: TrainConfig,
        *,
        pad_id: int,
    ) -> None:
        self.config, self.rows, self.weights, self.pad_id = config, rows, weights, pad_id
        # Placement stays the caller's: a model on the GPU is trained there, one on the CPU stays on the CPU.
        self.accelerator = Accelerator(device_placement=False)
        if config.batch_size < self.accelerator.num_processes:
            raise ConfigError(
                "The batch is too small for the number of processes.",
                expected=f"'batch_size' of at least {self.accelerator.num_processes}",
                found=str(config.batch_size),
                fix="raise 'batch_size', or launch fewer processes",
            )
        optimizer = torch.optim.AdamW(
            weights.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.device = next(module.parameters()).device
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)

    def steps(self, folder: Path | None, mark: str, progress: Progress) -> list[float]:
        """Run what is left of the run and return the losses of all its steps."""
        config = self.config
        losses = self._resume(folder, mark)
        progress.stage("training", total=config.steps, unit="steps")
        progress.advance(len(losses))
        for step in range(len(losses), config.steps):
            losses.append(self._step(step))
            done = step + 1
            if folder is not None and (done % config.checkpoint_every == 0 or done == config.steps):
                self._save(folder, mark, losses)
            progress.advance()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return losses

    def _step(self, step: int) -> float:
        accelerator, config = self.accelerator, self.config
        torch.manual_seed(derive_seed(config.seed, "training", "dropout", step, accelerator.process_index))
        picked = batch_indices(len(self.rows), config.batch_size, step, seed=config.seed)
        tokens = sum(self.rows[index].answer_tokens for index in picked)
        mine = [self.rows[index] for index in picked[accelerator.process_index :: accelerator.num_processes]]
        loss = _answer_loss(self.model, batch_of(mine, pad_id=self.pad_id).to(self.device)) / tokens
        # Gradients are averaged over processes; the loss is a sum over them.
        accelerator.backward(loss * accelerator.num_processes)
        if config.clip:
            accelerator.clip_grad_norm_(list(self.weights.values()), config.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        value = float(accelerator.reduce(loss.detach(), reduction="sum"))
        if not value < float("inf"):
            raise NumericalError(
                f"The training loss is not finite at step {step + 1}.",
                expected="a finite loss",
                found=str(value),
                fix="lower the learning rate, and check the model's weights",
            )
        return value

    def _resume(self, folder: Path | None, mark: str) -> list[float]:
        found = load_checkpoint(folder, mark) if folder is not None else None
        if found is None:
            return []
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(found.weights[name])
        self.optimizer.load_state_dict(found.optimizer)
        return list(found.losses)

    def _save(self, folder: Path, mark: str, losses: Sequence[float]) -> None:
        if self.accelerator.is_main_process:
            state = self.optimizer.state_dict()
            save_checkpoint(folder, mark, Checkpoint(len(losses), tuple(losses), self.weights, state))
        self.accelerator.wait_for_everyone()


def _answer_loss(model: Callable[..., object], batch: Batch) -> Tensor:
    """Return the summed cross entropy of the answer tokens, in nats; evaluated in float32."""
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    targets = batch.labels[:, 1:]
    wanted = targets != IGNORED
    logits: Tensor = output.logits[:, :-1][wanted].float()  # type: ignore[attr-defined]
    return torch.nn.functional.cross_entropy(logits, targets[wanted], reduction="sum")


@contextmanager
def _trained(module: PreTrainedModel, frozen: Collection[str], *, keep_flags: bool) -> Iterator[dict[str, Parameter]]:
    """Yield the parameters to train; the model's mode and flags are put back afterwards.

    Args:
        module: The model.
        frozen: Names of parameters that are not trained.
        keep_flags: Train what is trainable already (an adapter), instead of everything.
    """
    parameters = dict(module.named_parameters())
    unknown = sorted(set(frozen) - set(parameters))
    if unknown:
        raise ConfigError(
            f"The model has no parameter '{unknown[0]}' to freeze.",
            expected=f"names such as '{next(iter(parameters))}'",
            found=", ".join(unknown[:3]),
            fix="take the names from the model's named_parameters()",
        )
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    modes = {name: child.training for name, child in module.named_modules()}
    try:
        for name, parameter in parameters.items():
            able = flags[name] if keep_flags else parameter.is_floating_point()
            parameter.requires_grad_(able and name not in frozen)
        weights = {name: one for name, one in parameters.items() if one.requires_grad}
        if not weights:
            raise ConfigError(
                "Nothing is left to train.",
                expected="at least one parameter that is not frozen",
                found=f"{len(parameters)} frozen parameters",
                fix="freeze fewer parameters",
            )
        module.train()
        yield weights
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(flags[name])
            parameter.grad = None
        for name, child in module.named_modules():
            child.training = modes[name]


@contextmanager
def _own_random_state(module: PreTrainedModel) -> Iterator[None]:
    devices = sorted({one.device for one in module.parameters() if one.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        yield


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return any id: padding is masked out of attention and loss."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
